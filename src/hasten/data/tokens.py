"""Encoded examples on disk, memory-mapped and keyed by content.

    Corpus --tokenizer, format--> tokens.bin    all token ids, uint16 or uint32
                                  offsets.npy   (R + 1,) int64
                                  types.bin     segment of each token, where segments are separate
                                  meta.json     how many sequences were cut

A second run with the same rows and the same tokenizer skips the work.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from hasten.core.errors import UsageError
from hasten.data.cache import cached, content_key
from hasten.data.corpus import Corpus
from hasten.data.tokenizer import CLASS, SEPARATOR, unknown_id

_FORMAT = 1
_CHUNK = 1000


@dataclass(frozen=True)
class EncodingFormat:
    """How the text cells of a row become one sequence.

    Attributes:
        max_length: longer sequences are cut to this many tokens, the longest segment first.
        class_token: begin with the class token, for pooling by the first token.
        separate_segments: put a separator between cells and number them as token types.
    """

    max_length: int = 512
    class_token: bool = False
    separate_segments: bool = False


@dataclass(frozen=True)
class EncodedText:
    """One sequence: token ids, the segment of each, and how many tokens were cut off."""

    token_ids: list[int]
    token_types: list[int]
    num_cut: int


@dataclass(frozen=True)
class TokenStore:
    """The sequences of a corpus, row for row.

    Attributes:
        token_ids: (T,) all tokens, memory-mapped.
        offsets: (R + 1,) int64, where each sequence starts.
        token_types: (T,) uint8, or None where there are no segments.
        num_truncated: sequences that were cut to the maximum length.
    """

    token_ids: np.ndarray
    offsets: np.ndarray
    token_types: np.ndarray | None
    num_truncated: int

    @cached_property
    def lengths(self) -> np.ndarray:
        """(R,) int64 tokens of each sequence."""
        return np.diff(self.offsets)


def encode_texts(
    tokenizer: Tokenizer, rows: Sequence[tuple[str, ...]], form: EncodingFormat
) -> list[EncodedText]:
    """Encodes rows of text cells.

    Raises:
        UsageError: the format needs a special token that the tokenizer lacks.
    """
    cells = list(itertools.chain.from_iterable(rows))
    encoded = iter(tokenizer.encode_batch_fast(cells, add_special_tokens=False))
    special = special_ids(tokenizer, form)
    return [join_segments([next(encoded).ids for _ in row], form, special) for row in rows]


def special_ids(tokenizer: Tokenizer, form: EncodingFormat) -> tuple[list[int], list[int], int]:
    """Returns the ids that begin a sequence, those between segments, and that of no text at all.

    Raises:
        UsageError: the format needs a special token that the tokenizer lacks.
    """
    first = [_special(tokenizer, CLASS, "<s>")] if form.class_token else []
    between = [_special(tokenizer, SEPARATOR, "</s>")] if form.separate_segments else []
    return first, between, unknown_id(tokenizer)


def join_segments(
    segments: list[list[int]], form: EncodingFormat, special: tuple[list[int], list[int], int]
) -> EncodedText:
    """Makes one sequence of the tokens of a row's cells, cut to the maximum length."""
    first, between, unknown = special
    room = form.max_length - len(first) - len(between) * (len(segments) - 1)
    num_cut = _cut(segments, max(0, room))
    ids, types = list(first), [0] * len(first)
    for number, tokens in enumerate(segments):
        joined = tokens if number == 0 else [*between, *tokens]
        ids += joined
        types += [number if form.separate_segments else 0] * len(joined)
    if not ids:
        ids, types = [unknown], [0]
    # Separators alone may be too many for a very small maximum.
    return EncodedText(ids[: form.max_length], types[: form.max_length], num_cut)


def open_tokens(corpus: Corpus, tokenizer: Tokenizer, form: EncodingFormat) -> TokenStore:
    """Returns the encoded rows of a corpus, from the cache where they were encoded before."""
    definition = tokenizer.to_str()
    key = content_key(
        format=_FORMAT,
        rows=corpus.key,
        tokenizer=hashlib.sha256(definition.encode()).hexdigest(),
        form=[form.max_length, form.class_token, form.separate_segments],
    )
    dtype = np.dtype(np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.uint32)
    folder = cached("tokens", key, lambda target: _build(corpus, tokenizer, form, dtype, target))
    types = folder / "types.bin"
    return TokenStore(
        token_ids=np.memmap(folder / "tokens.bin", dtype=dtype, mode="r"),
        offsets=np.load(folder / "offsets.npy"),
        token_types=np.memmap(types, dtype=np.uint8, mode="r") if types.exists() else None,
        num_truncated=json.loads((folder / "meta.json").read_text())["num_truncated"],
    )


def _build(
    corpus: Corpus, tokenizer: Tokenizer, form: EncodingFormat, dtype: np.dtype, folder: Path
) -> None:
    ends, num_truncated = array("q", [0]), 0
    with (folder / "tokens.bin").open("wb") as tokens, (folder / "types.bin").open("wb") as types:
        for rows in _chunks(corpus.texts()):
            for text in encode_texts(tokenizer, rows, form):
                tokens.write(np.asarray(text.token_ids, dtype=dtype).tobytes())
                if form.separate_segments:
                    types.write(bytes(text.token_types))
                ends.append(ends[-1] + len(text.token_ids))
                num_truncated += text.num_cut > 0
    if not form.separate_segments:
        (folder / "types.bin").unlink()
    np.save(folder / "offsets.npy", np.frombuffer(ends, dtype=np.int64))
    (folder / "meta.json").write_text(json.dumps({"num_truncated": num_truncated}))


def _chunks(texts: Iterable[tuple[str, ...]]) -> Iterator[list[tuple[str, ...]]]:
    iterator = iter(texts)
    while chunk := list(itertools.islice(iterator, _CHUNK)):
        yield chunk


def _cut(segments: list[list[int]], room: int) -> int:
    """Cuts the longest segments until all fit into ``room``; returns the number of tokens cut."""
    excess = sum(map(len, segments)) - room
    if excess <= 0:
        return 0
    left = room
    for rank, i in enumerate(sorted(range(len(segments)), key=lambda i: len(segments[i]))):
        # The shortest take what they need; what they leave is shared by the longer ones.
        segments[i] = segments[i][: max(0, left // (len(segments) - rank))]
        left -= len(segments[i])
    return excess


def _special(tokenizer: Tokenizer, *names: str) -> int:
    for name in names:
        found = tokenizer.token_to_id(name)
        if found is not None:
            return found
    raise UsageError(f"the tokenizer has no {names[0]} token, which this model's input needs.")
