"""A file of labelled texts as a ``torch.utils.data.Dataset``, for people with their own loop.

    train.csv -> rows -> columns -> tokenizer -> token ids, label numbers    all in memory
    test.csv  -> rows ---- like=train ---------> token ids, label numbers    in the same numbering

    train = TextDataset("train.csv")
    test = TextDataset("test.csv", like=train)
    loader = DataLoader(train, batch_size=64, shuffle=True, collate_fn=train.collate)
    for input_ids, mask, labels in loader: ...

Shapes: B examples of a batch, T tokens of the longest of them.
"""

from __future__ import annotations

import itertools
import warnings
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from hasten.core.errors import DataError, UsageError, nearest
from hasten.data.columns import (
    CellError,
    check_label_values,
    choose_columns,
    label_of,
    resolve_columns,
    texts_of,
)
from hasten.data.rows import Rejected, Row, RowFile, open_rows
from hasten.data.tokenizer import (
    KINDS,
    PAD,
    choose_vocab_size,
    load_tokenizer,
    train_tokenizer,
)
from hasten.data.tokens import EncodingFormat, encode_texts

MAX_REJECTED_FRACTION = 0.1
_SAMPLE_ROWS = 1000
_CHUNK = 1000

Example = tuple[Tensor, int]
Batch = tuple[Tensor, Tensor, Tensor]


class TextDataset(Dataset[Example]):
    """Labelled texts of one file, encoded and held in memory.

    Args:
        path: CSV, TSV, JSON lines, JSON or Parquet; or a file opened with ``open_rows``, where
            delimiter, header or encoding are not to be detected.
        like: the training set, whose columns, tokenizer, labels and length limit this one takes.
        text_columns: names or numbers of the text columns, whose texts are joined; guessed from
            the column names and contents by default.
        label_column: name or number of the label column; guessed likewise.
        tokenizer: the kind that is trained on this file (bpe, wordpiece, unigram, word, char,
            byte), or the path of a tokenizer.json.
        vocab_size: largest number of tokens of a trained tokenizer; chosen from the amount of
            text by default.
        max_length: longer texts are cut to this many tokens, and counted.

    Attributes:
        vocab: each token's id; its ``len()`` is the vocabulary size.
        labels: the label names; a label's number is its place here.
        tokenizer: what encoded the texts.
        text_columns: names of the text columns.
        label_column: name of the label column.
        max_length: the length limit in tokens.
        rejected: the rows not used, each with its line and the reason; a warning tells of them.
        num_truncated: texts that were cut to ``max_length`` tokens.

    Raises:
        DataError: the file cannot be used; names the file and, where there is one, the line.
        UsageError: a column or a tokenizer that is not there, or an option beside ``like``.
    """

    def __init__(
        self,
        path: str | Path | RowFile,
        *,
        like: TextDataset | None = None,
        text_columns: Sequence[str] | None = None,
        label_column: str | None = None,
        tokenizer: str | Path | None = None,
        vocab_size: int | None = None,
        max_length: int | None = None,
    ) -> None:
        chosen = (text_columns, label_column, tokenizer, vocab_size, max_length)
        if like is not None and any(value is not None for value in chosen):
            raise UsageError("like= takes everything from the training set: give no other option.")
        file = path if isinstance(path, RowFile) else open_rows(path)
        self.name = file.display_name
        if like is None:
            self.text_columns, self.label_column = _columns(file, text_columns, label_column)
            self.max_length = 512 if max_length is None else max_length
            if self.max_length < 1:
                raise UsageError(f"max_length must be at least 1, not {max_length}.")
        else:
            self.text_columns, self.label_column = like.text_columns, like.label_column
            self.max_length = like.max_length
        rows = _read(file, self.text_columns, self.label_column)
        self.rejected = tuple(rows.rejected)
        if like is None:
            check_label_values(
                Counter(rows.labels), self.label_column, len(rows.labels), file=self.name
            )
            self.labels = _sorted_labels(rows.labels)
            self.tokenizer = _tokenizer(rows.texts, tokenizer, vocab_size)
        else:
            self.labels, self.tokenizer = like.labels, like.tokenizer
            rows.check_labels(self.name, like)
        vocab = self.tokenizer.get_vocab()
        self.vocab: dict[str, int] = dict(sorted(vocab.items(), key=lambda entry: entry[1]))
        self._pad_id = self.vocab.get(PAD, self.vocab.get("<pad>", 0))
        number = {label: i for i, label in enumerate(self.labels)}
        self._label_numbers = torch.tensor([number[label] for label in rows.labels])
        self._token_ids, self._offsets, self.num_truncated = self._encode(rows.texts)

    def __len__(self) -> int:
        """Number of examples."""
        return len(self._label_numbers)

    def __getitem__(self, index: int) -> Example:
        """Returns an example's token ids, (length,) int64, and its label number."""
        position = range(len(self))[index]  # negative ones too; IndexError beyond the end
        start, end = self._offsets[position : position + 2]
        return self._token_ids[start:end].long(), int(self._label_numbers[position])

    def __repr__(self) -> str:
        return (
            f"TextDataset({self.name!r}: {len(self):,} examples, {len(self.labels)} labels, "
            f"{len(self.vocab):,} tokens in the vocabulary)"
        )

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Puts examples into one padded batch, for ``DataLoader(collate_fn=...)``.

        Returns:
            input_ids (B, T) int64, padded on the right; mask (B, T) bool, True at real tokens;
            labels (B,) int64.
        """
        lengths_B1 = torch.tensor([[len(token_ids)] for token_ids, _ in examples])
        input_ids_BT = pad_sequence(
            [token_ids for token_ids, _ in examples], batch_first=True, padding_value=self._pad_id
        )
        mask_BT = torch.arange(input_ids_BT.shape[1]) < lengths_B1
        return input_ids_BT, mask_BT, torch.tensor([label for _, label in examples])

    def _encode(self, texts: Sequence[tuple[str, ...]]) -> tuple[Tensor, list[int], int]:
        """Returns all tokens end to end, where each text begins, and how many were cut."""
        form = EncodingFormat(max_length=self.max_length)
        token_ids, offsets, num_truncated = array("i"), [0], 0
        for start in range(0, len(texts), _CHUNK):
            for text in encode_texts(self.tokenizer, texts[start : start + _CHUNK], form):
                token_ids.extend(text.token_ids)
                offsets.append(len(token_ids))
                num_truncated += text.num_cut > 0
        # A tensor of its own: one over the array's buffer would not reach worker processes.
        return torch.tensor(token_ids, dtype=torch.int32), offsets, num_truncated


class _Rows:
    """The usable rows of a file: text cells, label and line of each."""

    def __init__(self) -> None:
        self.texts: list[tuple[str, ...]] = []
        self.labels: list[str] = []
        self.lines: list[int] = []
        self.rejected: list[Rejected] = []

    def check_labels(self, name: str, training: TextDataset) -> None:
        """Refuses a label that training does not know: it has no number."""
        known = set(training.labels)
        for line, label in zip(self.lines, self.labels, strict=True):
            if label not in known:
                some = ", ".join(f"'{name}'" for name in training.labels[:5])
                more = " ..." if len(training.labels) > 5 else ""
                raise DataError(
                    f"{name}, line {line}: the label '{label}' does not occur in "
                    f"{training.name} (which has {some}{more}); correct or remove such rows."
                )


def _columns(
    file: RowFile, text: Sequence[str] | None, label: str | None
) -> tuple[tuple[str, ...], str]:
    sample = itertools.islice((row for row in file if isinstance(row, Row)), _SAMPLE_ROWS)
    wanted = [text] if isinstance(text, str) else text
    with _naming(file):
        found = choose_columns(
            list(sample), file.columns, text=wanted, label=label, file=file.display_name
        )
    return found.text, found.label


def _read(file: RowFile, text_columns: Sequence[str], label_column: str) -> _Rows:
    """Reads every row; refuses a file of which too much would go unused."""
    with _naming(file):
        *text_at, label_at = resolve_columns(file.columns, [*text_columns, label_column])
    rows = _Rows()
    for row in file:
        if isinstance(row, Rejected):
            rows.rejected.append(row)
            continue
        try:
            texts = texts_of(row.cells, text_at)
            label = label_of(row.cells[label_at])
            "".join(texts).encode()
        except CellError as error:
            rows.rejected.append(Rejected(file.display_name, row.line, str(error)))
            continue
        except UnicodeEncodeError:
            reason = "the text holds half of a surrogate pair"
            rows.rejected.append(Rejected(file.display_name, row.line, reason))
            continue
        rows.texts.append(texts)
        rows.labels.append(label)
        rows.lines.append(row.line)
    _check_rejected(rows, file.display_name)
    return rows


def _check_rejected(rows: _Rows, name: str) -> None:
    """Warns of rows that are not used; too many of them, or no others, are an error."""
    if not rows.rejected:
        if not rows.labels:
            raise DataError(f"{name}: has no rows.")
        return
    num_rejected, first = len(rows.rejected), rows.rejected[0]
    num_read = num_rejected + len(rows.labels)
    found = f"{num_rejected:,} of {num_read:,} rows cannot be used"
    where = f"The first: line {first.line}: {first.reason}."
    if not rows.labels or num_rejected > MAX_REJECTED_FRACTION * num_read:
        raise DataError(
            f"{name}: {found}, more than the {MAX_REJECTED_FRACTION:.0%} allowed. {where}"
        )
    warnings.warn(f"{name}: {found} (see .rejected). {where}", stacklevel=4)


def _tokenizer(
    texts: Sequence[tuple[str, ...]], wanted: str | Path | None, vocab_size: int | None
) -> Tokenizer:
    kind = "bpe" if wanted is None else str(wanted)
    if kind not in KINDS:
        if isinstance(wanted, str) and not wanted.endswith(".json") and not Path(wanted).exists():
            raise UsageError(
                f"tokenizer '{wanted}': neither a file nor a kind.{nearest(kind, KINDS)} "
                f"The kinds are {', '.join(KINDS)}."
            )
        if vocab_size is not None:
            raise UsageError(f"vocab_size: the tokenizer {wanted} has its size already.")
        return load_tokenizer(kind)
    cells = list(itertools.chain.from_iterable(texts))
    if vocab_size is None:
        vocab_size, _ = choose_vocab_size(sum(len(cell.encode()) for cell in cells), kind)
    return train_tokenizer(cells, kind=kind, vocab_size=vocab_size)


def _sorted_labels(labels: Iterable[str]) -> tuple[str, ...]:
    """Orders labels as a run does: whole numbers by value, else by text."""
    distinct = set(labels)
    try:
        return tuple(sorted(distinct, key=lambda label: (int(label), label)))
    except ValueError:
        return tuple(sorted(distinct))


@contextmanager
def _naming(file: RowFile) -> Iterator[None]:
    """Puts the file's name in front of messages about its columns."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{file.display_name}: {error}") from None
