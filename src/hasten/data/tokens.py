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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from hasten.data.cache import cached, content_key
from hasten.data.corpus import Corpus
from hasten.data.messages import learned_turns, read_messages
from hasten.data.template import Template, template_from_json
from hasten.data.tokenizer import CLASS, SEPARATOR, token_named, unknown_id

_FORMAT = 4
_CHUNK = 1000


@dataclass(frozen=True)
class EncodingFormat:
    """How the text cells of a row become one sequence.

    Attributes:
        max_length: longer sequences are cut to this many tokens, the longest segment first; 0 for
            no limit.
        class_token: begin with the class token: for pooling by the first token, and where a
            decoder begins.
        separate_segments: put a separator between cells and number them as token types.
        end_token: end with the separator, which tells a decoder where to stop.
        cells: numbers of the row's cells that are taken; empty for all.
        messages: rows are chats, whose assistant's texts have type 1 and all else type 0.
        template: what a pretrained model wants around and between cells, in place of the above;
            None for a model of our own.
    """

    max_length: int = 512
    class_token: bool = False
    separate_segments: bool = False
    end_token: bool = False
    cells: tuple[int, ...] = ()
    messages: bool = False
    template: Template | None = None

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> EncodingFormat:
        """Rebuilds what ``dataclasses.asdict`` made."""
        template = template_from_json(values.get("template"))
        return cls(**{**values, "cells": tuple(values["cells"]), "template": template})

    @property
    def has_types(self) -> bool:
        """Whether tokens have types that tell segments apart."""
        if self.template is not None:
            return self.template.numbers_segments
        return self.separate_segments

    def take(self, row: tuple[str, ...]) -> tuple[str, ...]:
        """Returns the cells of a row that are encoded."""
        if self.messages:
            return read_messages(row[0])
        return tuple(row[i] for i in self.cells) if self.cells else row


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
    rows = [form.take(row) for row in rows]
    cells = list(itertools.chain.from_iterable(rows))
    encoded = iter(tokenizer.encode_batch_fast(cells, add_special_tokens=False))
    special = SpecialIds.of(tokenizer, form)
    return [
        join_segments(
            [next(encoded).ids for _ in row],
            form,
            special,
            types=learned_turns(row) if form.messages else None,
        )
        for row in rows
    ]


@dataclass(frozen=True)
class SpecialIds:
    """The special tokens that a format puts around and between texts.

    Attributes:
        first: what begins a sequence.
        between: what stands between segments.
        last: what ends a sequence.
        unknown: what stands for no text at all.
    """

    first: tuple[int, ...]
    between: tuple[int, ...]
    last: tuple[int, ...]
    unknown: int

    @classmethod
    def of(cls, tokenizer: Tokenizer, form: EncodingFormat) -> SpecialIds:
        """Looks up those of a format.

        Raises:
            UsageError: the format needs a special token that the tokenizer lacks.
        """
        if (template := form.template) is not None:
            return cls(template.first, template.between, template.last, unknown_id(tokenizer))
        begin, end = (CLASS, "<s>"), (SEPARATOR, "</s>")
        return cls(
            _ids_of(tokenizer, begin) if form.class_token else (),
            _ids_of(tokenizer, end) if form.separate_segments else (),
            _ids_of(tokenizer, end) if form.end_token else (),
            unknown_id(tokenizer),
        )


def template_of(tokenizer: Tokenizer, form: EncodingFormat) -> Template:
    """Returns what a format puts around and between texts.

    Raises:
        UsageError: a special token that the tokenizer lacks.
    """
    special = SpecialIds.of(tokenizer, form)
    return Template(special.first, special.between, special.last, form.has_types)


def join_segments(
    segments: list[list[int]],
    form: EncodingFormat,
    special: SpecialIds,
    types: Sequence[int] | None = None,
) -> EncodedText:
    """Makes one sequence of the tokens of a row's cells, cut to the maximum length.

    Args:
        segments: token ids of each cell.
        form: how they are joined.
        special: what is put around and between them; a separator belongs to the segment before
            it, as in BERT.
        types: token type of each segment; their numbers by default.
    """
    num_cut = 0
    if form.max_length:
        between = len(special.between) * (len(segments) - 1)
        room = form.max_length - len(special.first) - len(special.last) - between
        num_cut = _cut(segments, max(0, room))
    if types is None:
        types = range(len(segments)) if form.has_types else [0] * len(segments)
    ids, token_types = list(special.first), [0] * len(special.first)
    for number, (tokens, kind) in enumerate(zip(segments, types, strict=True)):
        after = special.last if number == len(segments) - 1 else special.between
        ids += [*tokens, *after]
        token_types += [kind] * (len(tokens) + len(after))
    if not ids:
        ids, token_types = [special.unknown], [0]
    # Special tokens alone may be too many for a very small maximum.
    limit = form.max_length or len(ids)
    return EncodedText(ids[:limit], token_types[:limit], num_cut)


def open_tokens(corpus: Corpus, tokenizer: Tokenizer, form: EncodingFormat) -> TokenStore:
    """Returns the encoded rows of a corpus, from the cache where they were encoded before."""
    definition = tokenizer.to_str()
    key = content_key(
        format=_FORMAT,
        rows=corpus.key,
        tokenizer=hashlib.sha256(definition.encode()).hexdigest(),
        form=asdict(form),
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
                if form.has_types:
                    types.write(bytes(text.token_types))
                ends.append(ends[-1] + len(text.token_ids))
                num_truncated += text.num_cut > 0
    if not form.has_types:
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


def _ids_of(tokenizer: Tokenizer, names: tuple[str, ...]) -> tuple[int]:
    found = tokenizer.token_to_id(token_named(tokenizer, *names))
    assert found is not None
    return (found,)
