"""From files to what the loop reads: rows, task, tokenizer, tokens, targets.

    train.csv -> Corpus --hold out--> rows of train, rows of validation
    test.csv  -> Corpus -----------------------------> rows of test
                   |-> task (labels)   |-> tokenizer -> TokenStore -> Split

Every guess is noted with its reason, every row that is not used is kept with its reason.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from hasten.config.schema import DataConfig, RunConfig, settled
from hasten.core.errors import DataError, UsageError
from hasten.data.cache import cache_folder
from hasten.data.columns import (
    ColumnChoice,
    check_label_values,
    choose_columns,
    resolve_columns,
)
from hasten.data.corpus import Corpus, check_rejected, held_out_rows, open_corpus
from hasten.data.rows import Rejected, Row, RowFile, open_rows
from hasten.data.subword import SubwordDropout
from hasten.data.tokenizer import choose_vocab_size, load_tokenizer, train_tokenizer
from hasten.data.tokens import EncodingFormat, TokenStore, open_tokens
from hasten.task.registry import TASKS
from hasten.task.text_classification import LossSettings, TextClassification
from hasten.training.observe import Observer

_SAMPLE_ROWS = 1000
_FEW_EXAMPLES = 10


@dataclass(frozen=True)
class Split:
    """The examples of one split.

    Attributes:
        name: train, validation or test.
        corpus: the file's rows.
        rows: (E,) which of them belong to the split.
        store: tokens of the corpus, row for row.
        targets: (R,) class number of every row of the corpus.
        subword: draws other tokens for each epoch; None where every epoch has the same.
    """

    name: str
    corpus: Corpus
    rows: np.ndarray
    store: TokenStore
    targets: np.ndarray
    subword: SubwordDropout | None = None

    @cached_property
    def lengths(self) -> np.ndarray:
        """(E,) tokens of each example of the split."""
        return self.store.lengths[self.rows]

    def in_epoch(self, epoch: int) -> Split:
        """Returns the split with the tokens of an epoch."""
        if self.subword is None:
            return self
        return dataclasses.replace(self, store=self.subword.store(epoch))

    def lines(self, examples: Iterable[int]) -> list[int]:
        """Returns the file's lines of the examples with the given corpus rows."""
        return [int(self.corpus.lines[row]) for row in examples]


@dataclass(frozen=True)
class Sources:
    """The opened files of a run and the columns read from them."""

    columns: ColumnChoice
    corpora: dict[str, Corpus]
    rows: dict[str, np.ndarray]

    @property
    def rejected(self) -> list[Rejected]:
        """All rows not used, of all files."""
        return [entry for corpus in self.corpora.values() for entry in corpus.rejected]


@dataclass(frozen=True)
class PreparedData:
    """Everything that the data decides."""

    sources: Sources
    task: TextClassification
    tokenizer: Tokenizer
    form: EncodingFormat
    splits: dict[str, Split]


def open_sources(config: DataConfig, observer: Observer) -> Sources:
    """Opens the files, chooses the columns and splits the rows.

    Raises:
        UsageError: no training file, or a column that is not there.
        DataError: a file that cannot be used.
    """
    if config.train is None:
        raise UsageError("there is no training file: hasten train FILE.")
    file = open_file(config.train, config)
    for note in file.notes:
        observer.note(note)
    sample = sample_rows(file)
    columns = choose_columns(
        sample,
        file.columns,
        text=config.text_columns,
        label=config.label_column,
        file=file.display_name,
    )
    for reason in columns.reasons:
        observer.note(reason)
    corpora = {"train": open_corpus(file, columns.text, columns.label)}
    for name, path in (("validation", config.validation), ("test", config.test)):
        if path is not None:
            other = open_file(path, config)
            check_columns(other, (*columns.text, columns.label))
            corpora[name] = open_corpus(other, columns.text, columns.label)
    for corpus in corpora.values():
        check_rejected(corpus, config.max_rejected_fraction)
    train = corpora["train"]
    check_label_values(train.class_counts(), columns.label, len(train), file=train.name)
    rows = {name: np.arange(len(corpus)) for name, corpus in corpora.items()}
    if "validation" not in corpora:
        held = held_out_rows(train, config.validation_fraction)
        rows["train"], rows["validation"] = np.flatnonzero(~held), np.flatnonzero(held)
        observer.note(
            f"validation: {held.sum():,} rows of {train.name} held out by a hash of their text, "
            f"{config.validation_fraction:.0%} of each class"
        )
    return Sources(columns, corpora, rows)


def check_columns(file: RowFile, wanted: tuple[str, ...]) -> None:
    """Looks for the training file's columns in another file.

    Raises:
        DataError: naming the file and the column that it lacks.
    """
    try:
        resolve_columns(file.columns, wanted)
    except UsageError as error:
        raise DataError(f"{file.display_name}: {error}") from None


def open_file(path: str | Path, config: DataConfig) -> RowFile:
    """Opens a file with the reading options of the run."""
    from_stdin = Path(path).is_relative_to(cache_folder())
    return open_rows(
        path,
        delimiter=config.delimiter,
        header=config.header,
        encoding=config.encoding,
        display_name="standard input" if from_stdin else None,
    )


def sample_rows(file: RowFile) -> list[Row]:
    """Returns the first rows of a file."""
    rows = (row for row in file if isinstance(row, Row))
    return list(itertools.islice(rows, _SAMPLE_ROWS))


def prepare_data(
    config: RunConfig, observer: Observer, tokenizer: Tokenizer | None = None
) -> PreparedData:
    """Prepares all splits of a run.

    Args:
        config: of the run.
        observer: told every guess and warning.
        tokenizer: the one of a run that is resumed; None to train or load one.
    """
    sources = open_sources(config.data, observer)
    warn_about_rows(sources, observer)
    train = sources.corpora["train"]
    labels = Counter(train.labels[sources.rows["train"]].tolist())
    task = TASKS["text-classification"].from_counts(
        {train.label_names[label]: count for label, count in labels.items()},
        LossSettings(config.train.loss, config.train.focal_gamma, config.train.label_smoothing),
        config.train.class_weights,
    )
    form = EncodingFormat(
        max_length=config.tokenizer.max_length,
        class_token=config.model.pooling == "first",
        separate_segments=_separate(config.data, sources.columns, observer),
    )
    if tokenizer is None:
        tokenizer = _make_tokenizer(config, sources, observer)
    splits = {}
    for name, rows in sources.rows.items():
        corpus = sources.corpora.get(name, train)
        store = open_tokens(corpus, tokenizer, form)
        targets = task.targets(corpus.label_names, corpus.labels)
        splits[name] = Split(name, corpus, rows, store, targets)
        if store.num_truncated and (name == "train" or corpus is not train):
            observer.warn(
                f"{corpus.name}: {store.num_truncated:,} examples are longer than "
                f"{form.max_length} tokens and were cut (--tokenizer.max_length)"
            )
    return PreparedData(sources, task, tokenizer, form, splits)


def with_subword_dropout(data: PreparedData, config: RunConfig) -> PreparedData:
    """Returns the data with training tokens drawn anew each epoch, where that is configured."""
    rate = settled(config.tokenizer.dropout)
    if rate == 0.0:
        return data
    train = data.splits["train"]
    subword = SubwordDropout.build(
        train.corpus, train.rows, data.tokenizer, data.form, rate=rate, seed=config.train.seed
    )
    splits = {**data.splits, "train": dataclasses.replace(train, subword=subword)}
    return dataclasses.replace(data, splits=splits)


def warn_about_rows(sources: Sources, observer: Observer) -> None:
    """Warns of rejected, duplicate, leaked, rare and unseen rows."""
    train = sources.corpora["train"]
    for corpus in sources.corpora.values():
        used = f"{corpus.name}: {corpus.num_read:,} rows read, {len(corpus):,} used"
        if not corpus.rejected:
            observer.note(used)
            continue
        first = corpus.rejected[0]
        observer.warn(
            f"{used}, {len(corpus.rejected):,} rejected (first: line {first.line}: {first.reason})"
        )
    duplicates = len(train) - len(np.unique(train.hashes))
    if duplicates:
        observer.warn(f"{train.name}: rows that repeat an earlier row's text: {duplicates:,}")
    rare = [name for name, count in train.class_counts().items() if count < _FEW_EXAMPLES]
    if rare:
        observer.warn(
            f"{train.name}: classes with fewer than {_FEW_EXAMPLES} examples: {len(rare)}, namely "
            f"{', '.join(rare[:5])}{' ...' if len(rare) > 5 else ''}"
        )
    for name, corpus in sources.corpora.items():
        if name == "train":
            continue
        shared = int(np.isin(corpus.hashes, train.hashes).sum())
        if shared:
            observer.warn(
                f"{corpus.name}: {shared:,} rows have the same text as a row of {train.name}"
            )
        unseen = sorted(set(corpus.class_counts()) - set(train.class_counts()))
        if unseen:
            observer.warn(
                f"{corpus.name}: labels never seen in training count as errors: "
                f"{', '.join(unseen[:5])}{' ...' if len(unseen) > 5 else ''}"
            )


def _separate(config: DataConfig, columns: ColumnChoice, observer: Observer) -> bool:
    if len(columns.text) == 1:
        return False
    if config.segments == "auto":
        observer.note(
            f"{len(columns.text)} text columns: kept apart as segments (--data.segments join joins)"
        )
    return config.segments != "join"


def _make_tokenizer(config: RunConfig, sources: Sources, observer: Observer) -> Tokenizer:
    settings = config.tokenizer
    if settings.path is not None:
        tokenizer = load_tokenizer(settings.path)
        observer.note(f"tokenizer: {settings.path}, {tokenizer.get_vocab_size():,} tokens")
        return tokenizer
    train, rows = sources.corpora["train"], sources.rows["train"]
    size, reason = settings.vocab_size, "as asked for"
    if size == "auto":
        size, reason = choose_vocab_size(train.num_characters, settings.kind)
    tokenizer = train_tokenizer(
        itertools.chain.from_iterable(train.texts(rows)),
        kind=settings.kind,
        vocab_size=size,
        lowercase=settings.lowercase,
    )
    observer.note(
        f"tokenizer: {settings.kind} trained on the training rows, "
        f"{tokenizer.get_vocab_size():,} tokens ({reason})"
    )
    return tokenizer
