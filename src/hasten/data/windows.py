"""Questions with their contexts as tokens, and the windows in which a model reads them.

    context, question, answer --encode_passages--> Passages     in memory, for some rows
    Corpus --------------------open_passages-----> Passages     in the cache, memory-mapped
    Passages, rows --Windows.over--> Windows --pack--> PackedBatch of
                                                       [CLS] question [SEP] part of the context
    tokens of a window --Windows.characters--> code points of the context as it was given

Windows overlap, so that an answer of at most ``overlap`` tokens is whole in one of them. What is
kept is a few numbers a token, a question and a window, never an object.

Shapes: T tokens of all contexts, C contexts, R questions (rows), W windows.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer

from hasten.core.batch import PackedBatch, SequenceLayout, positions_from_lengths
from hasten.data.cache import cached, content_key
from hasten.data.corpus import Corpus
from hasten.data.packing import places_of
from hasten.data.spans import answers_from_json, cover_text, token_span, window_starts
from hasten.data.template import Template
from hasten.data.tokens import EncodingFormat, template_of

_FORMAT = 1
_CHUNK = 500
_OWN = EncodingFormat(class_token=True, separate_segments=True)


class Passage(NamedTuple):
    """One question with its context.

    Attributes:
        context: where the answer is looked for.
        question: what is asked.
        answer: code points [start, end) of the answer that is learned; None without one.
    """

    context: str
    question: str
    answer: tuple[int, int] | None = None


@dataclass(frozen=True)
class WindowForm:
    """How windows are cut.

    Attributes:
        max_length: tokens of a window in all, at least 8. A question takes at most half of them,
            and leaves room for a token of the context.
        overlap: tokens of the context that neighbouring windows share; at most half of what a
            window holds of the context.
        marks_matches: whether token types tell which tokens of the context are in the question
            too. A model that was not pretrained hardly finds that out from a few thousand
            questions (the exact-match feature of Chen et al., "Reading Wikipedia to Answer
            Open-Domain Questions", 2017; pairs of tokens are ours).
        template: what a pretrained model wants around question and context, which then are its
            first and second segment, with token types as it says; None for a model of our own.
    """

    max_length: int = 512
    overlap: int = 128
    marks_matches: bool = True
    template: Template | None = None

    @property
    def num_token_types(self) -> int:
        """How many token types ``Windows.pack`` gives; 0 for none."""
        if self.template is not None:
            return 2 if self.template.numbers_segments else 0
        return 4 if self.marks_matches else 2

    @property
    def num_special(self) -> int:
        """How many special tokens a window has."""
        return 2 if self.template is None else self.template.num_tokens

    @property
    def max_question(self) -> int:
        """Tokens after which a question is cut."""
        return min(self.max_length // 2, self.max_length - self.num_special - 1)

    def template_for(self, tokenizer: Tokenizer) -> Template:
        """Returns what stands around question and context.

        Raises:
            UsageError: the tokenizer lacks the class token or the separator.
        """
        return self.template or template_of(tokenizer, _OWN)

    def room(self, num_question_tokens: int) -> int:
        """Returns the most tokens of the context that a window holds."""
        return self.max_length - self.num_special - num_question_tokens

    def starts(self, num_context_tokens: int, num_question_tokens: int) -> list[int]:
        """Returns the first token of each window of a context."""
        room = self.room(num_question_tokens)
        return window_starts(num_context_tokens, room, room - min(self.overlap, room // 2))


@dataclass(frozen=True)
class Passages:
    """R questions and their C contexts as tokens; questions in a row share a context.

    Attributes:
        context_ids: (T,) tokens of the contexts.
        places: (T, 2) int32 code points [start, end) of each token in its context.
        context_offsets: (C + 1,) int64, where each context begins.
        contexts: (R,) int64 number of each question's context.
        question_ids: tokens of the questions.
        question_offsets: (R + 1,) int64, where each question begins.
        answers: (R, 2) int32 first and last token of each answer in its context, both inclusive;
            -1 where there is none.
        is_cut: (R,) bool, whether the question was too long.
    """

    context_ids: np.ndarray
    places: np.ndarray
    context_offsets: np.ndarray
    contexts: np.ndarray
    question_ids: np.ndarray
    question_offsets: np.ndarray
    answers: np.ndarray
    is_cut: np.ndarray

    @cached_property
    def num_context_tokens(self) -> np.ndarray:
        """(R,) tokens of each question's context."""
        return np.diff(self.context_offsets)[self.contexts]

    @cached_property
    def num_question_tokens(self) -> np.ndarray:
        """(R,) tokens of each question."""
        return np.diff(self.question_offsets)


def encode_passages(
    tokenizer: Tokenizer, passages: Sequence[Passage], form: WindowForm
) -> Passages:
    """Encodes questions and contexts; a context that repeats the one before is encoded once."""
    contexts: list[str] = []
    numbers: list[int] = []
    for passage in passages:
        if not contexts or contexts[-1] != passage.context:
            contexts.append(passage.context)
        numbers.append(len(contexts) - 1)
    encoded = tokenizer.encode_batch(contexts, add_special_tokens=False)
    places = [
        cover_text(np.array(one.offsets, dtype=np.int32).reshape(-1, 2), text)
        for one, text in zip(encoded, contexts, strict=True)
    ]
    asked = tokenizer.encode_batch_fast([p.question for p in passages], add_special_tokens=False)
    questions = [one.ids[: form.max_question] for one in asked]
    spans = [
        (token_span(places[number], *passage.answer) if passage.answer else None) or (-1, -1)
        for passage, number in zip(passages, numbers, strict=True)
    ]
    dtype = np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.uint32
    return Passages(
        context_ids=np.concatenate(
            [np.empty(0, dtype), *(np.array(e.ids, dtype) for e in encoded)]
        ),
        places=np.concatenate([np.empty((0, 2), np.int32), *places]),
        context_offsets=_offsets(map(len, places)),
        contexts=np.array(numbers, dtype=np.int64),
        question_ids=_joined_ids(tokenizer, questions),
        question_offsets=_offsets(map(len, questions)),
        answers=np.array(spans, dtype=np.int32).reshape(-1, 2),
        is_cut=np.array([len(one.ids) > form.max_question for one in asked], dtype=bool),
    )


def open_passages(corpus: Corpus, tokenizer: Tokenizer, form: WindowForm) -> Passages:
    """Returns the rows (context, question, answers as JSON) of a corpus as tokens.

    They come from the cache where they were encoded before. The answer that is learned is the
    first one that is in its context.
    """
    key = content_key(
        format=_FORMAT,
        rows=corpus.key,
        tokenizer=hashlib.sha256(tokenizer.to_str().encode()).hexdigest(),
        form=asdict(form),
    )
    folder = cached("passages", key, lambda target: _build(corpus, tokenizer, form, target))
    return Passages(**{name: _load(folder / f"{name}.npy") for name in _ARRAYS})


@dataclass(frozen=True)
class Windows:
    """W windows of some questions.

    Attributes:
        passages: what they are windows of.
        form: how they were cut.
        questions: (W,) which of the questions asked for each belongs to.
        rows: (W,) row of that question in ``passages``.
        firsts: (W,) first token of the context in each, counted within the context.
        special: tokens before the question, between it and the context, and after that.
    """

    passages: Passages
    form: WindowForm
    questions: np.ndarray
    rows: np.ndarray
    firsts: np.ndarray
    special: Template

    @classmethod
    def over(
        cls, passages: Passages, rows: np.ndarray, form: WindowForm, tokenizer: Tokenizer
    ) -> Windows:
        """Places windows over the contexts of some questions, question by question.

        Raises:
            UsageError: the tokenizer lacks the class token or the separator.
        """
        sizes = zip(
            passages.num_context_tokens[rows].tolist(),
            passages.num_question_tokens[rows].tolist(),
            strict=True,
        )
        starts = [np.array(form.starts(*size), dtype=np.int64) for size in sizes]
        counts = np.array([len(some) for some in starts], dtype=np.int64)
        questions = np.repeat(np.arange(len(rows)), counts)
        return cls(
            passages,
            form,
            questions,
            rows[questions],
            np.concatenate([np.empty(0, np.int64), *starts]),
            form.template_for(tokenizer),
        )

    def __len__(self) -> int:
        """Number of windows W."""
        return len(self.rows)

    @cached_property
    def context_starts(self) -> np.ndarray:
        """(W,) place in its sequence at which each window's context begins."""
        return self.passages.num_question_tokens[self.rows] + self._num_before

    @property
    def _num_before(self) -> int:
        """Special tokens before the context."""
        return len(self.special.first) + len(self.special.between)

    @cached_property
    def context_ends(self) -> np.ndarray:
        """(W,) place in its sequence after each window's context."""
        room = self.form.max_length - len(self.special.last) - self.context_starts
        held = self.passages.num_context_tokens[self.rows]
        return self.context_starts + np.minimum(held, room)

    @cached_property
    def lengths(self) -> np.ndarray:
        """(W,) int64 tokens of each sequence."""
        return self.context_ends + len(self.special.last)

    @cached_property
    def targets(self) -> np.ndarray:
        """(W, 2) int64 first and last token of the answer in each sequence, both inclusive.

        They are 0, which is the class token, unless the window holds the whole answer.
        """
        spans = self.passages.answers[self.rows].astype(np.int64)
        spans += (self.context_starts - self.firsts)[:, None]
        is_held = (spans[:, 0] >= self.context_starts) & (spans[:, 1] < self.context_ends)
        return np.where(is_held[:, None], spans, 0)

    def pack(self, windows: np.ndarray, weight: float = 1.0) -> PackedBatch:
        """Lays windows end to end; their numbers are the batch's example ids.

        Token types are 0 before the context and 1 from there on; with ``form.marks_matches`` 2
        where a token of the context is in the question too, 3 where it is there beside the same
        neighbour. Targets are (S, 4): first and last token of the answer, see ``targets``; first
        token of the context, and the place after its last.

        Args:
            windows: (S,) their numbers, in the order in which they are laid down.
            weight: units that the step's summed loss is divided by.
        """
        passages, rows, special = self.passages, self.rows[windows], self.special
        heads, ends = self.context_starts[windows], self.context_ends[windows]
        lengths = self.lengths[windows]
        begins = np.cumsum(lengths) - lengths
        num_first, held, asked = len(special.first), ends - heads, heads - self._num_before
        in_question = places_of(begins + num_first, asked)
        in_context = places_of(begins + heads, held)
        ids, types = np.empty(lengths.sum(), np.int64), np.zeros(lengths.sum(), np.int64)
        for tokens, places in (
            (special.first, begins),
            (special.between, begins + num_first + asked),
            (special.last, begins + ends),
        ):
            ids[places[:, None] + np.arange(len(tokens))] = tokens
        ids[in_question] = passages.question_ids[places_of(passages.question_offsets[rows], asked)]
        starts = passages.context_offsets[passages.contexts[rows]] + self.firsts[windows]
        ids[in_context] = passages.context_ids[places_of(starts, held)]
        types[places_of(begins + heads, lengths - heads)] = 1
        if self.form.marks_matches:
            contexts = np.split(ids[in_context], np.cumsum(held)[:-1])
            questions = np.split(ids[in_question], np.cumsum(asked)[:-1])
            types[in_context] += np.concatenate(list(map(_matches, contexts, questions)))
        targets = np.column_stack([self.targets[windows], heads, ends])
        return PackedBatch(
            token_ids=torch.from_numpy(ids),
            positions=torch.from_numpy(positions_from_lengths(lengths.tolist())),
            layout=SequenceLayout.from_lengths(lengths.tolist()),
            example_ids=torch.from_numpy(windows.astype(np.int64)),
            token_types=torch.from_numpy(types) if self.form.num_token_types else None,
            targets=torch.from_numpy(targets),
            weight=weight,
        )

    def characters(self, window: int, first: int, last: int) -> tuple[int, int]:
        """Returns the code points [start, end) of some of a window's tokens in their context.

        Args:
            window: its number.
            first: place of the first token in the sequence; in the context.
            last: place of the last one.
        """
        context = self.passages.contexts[self.rows[window]]
        before = int(self.firsts[window] - self.context_starts[window])
        before += int(self.passages.context_offsets[context])
        places = self.passages.places
        return int(places[before + first, 0]), int(places[before + last, 1])


_ARRAYS = tuple(Passages.__annotations__)


def _matches(context: np.ndarray, question: np.ndarray) -> np.ndarray:
    """Returns 0, 1 or 2 for each token: not in the question; in it; in it with a neighbour."""
    found = np.isin(context, question).astype(np.int64)
    # One number for each pair of neighbours.
    pairs, asked = ((ids[:-1] << 32) + ids[1:] for ids in (context, question))
    is_pair = np.isin(pairs, asked)
    found[:-1][is_pair] = found[1:][is_pair] = 2
    return found


def _joined_ids(tokenizer: Tokenizer, texts: Sequence[Sequence[int]]) -> np.ndarray:
    dtype = np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.uint32
    return np.concatenate([np.empty(0, dtype), *(np.array(ids, dtype) for ids in texts)])


def _offsets(lengths: Iterable[int]) -> np.ndarray:
    return np.cumsum([0, *lengths], dtype=np.int64)


def _build(corpus: Corpus, tokenizer: Tokenizer, form: WindowForm, folder: Path) -> None:
    parts = [encode_passages(tokenizer, some, form) for some in _chunks(corpus)]
    before = np.cumsum([0, *(len(part.context_offsets) - 1 for part in parts)])
    columns = {name: [getattr(part, name) for part in parts] for name in _ARRAYS}
    columns["contexts"] = [
        part.contexts + shift for part, shift in zip(parts, before[:-1], strict=True)
    ]
    for name, arrays in columns.items():
        if name.endswith("_offsets"):
            joined = _offsets(itertools.chain.from_iterable(np.diff(a).tolist() for a in arrays))
        else:
            joined = np.concatenate(arrays)
        np.save(folder / f"{name}.npy", joined)


def _chunks(corpus: Corpus) -> Iterator[list[Passage]]:
    rows = corpus.texts()
    while chunk := list(itertools.islice(rows, _CHUNK)):
        yield [Passage(context, question, _learned(text)) for context, question, text in chunk]


def _learned(answers: str) -> tuple[int, int] | None:
    placed = (answer for answer in answers_from_json(answers) if answer.start >= 0)
    return next(((answer.start, answer.end) for answer in placed), None)


def _load(file: Path) -> np.ndarray:
    array = np.load(file, mmap_mode=None if file.stat().st_size < 1 << 16 else "r")
    assert isinstance(array, np.ndarray)
    return array
