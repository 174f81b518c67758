"""Extractive question answering: from an answer's text to its tokens, and from scores to spans.

context, answer, stated start --find_answer--> characters [start, end)
text, offsets of its tokens --cover_text--> offsets without gaps within words
characters, offsets of the tokens --token_span--> first and last token
a context too long for the model --window_starts--> overlapping windows
scores (T,) of starts and ends --best_spans--> the best spans of a window
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from hasten.data.columns import CellError


@dataclass(frozen=True, slots=True)
class FoundSpan:
    """Where an answer is in its context, in code points.

    Attributes:
        start: its first character.
        end: the place after its last.
        occurrences: how often the answer is in the context, overlapping ones counted; above 1,
            a start that nobody stated is a guess.
        shift: ``start`` less the stated start (white space before the answer not counted); 0 if
            none was stated. Not 0, the stated start was mended.
    """

    start: int
    end: int
    occurrences: int
    shift: int


class Answer(NamedTuple):
    """An answer's text, and where it stands in its context.

    Attributes:
        text: as the data has it.
        start: its first code point; -1 if it is not in the context.
        end: the place after its last; -1 if it is not in the context.
    """

    text: str
    start: int = -1
    end: int = -1


def answers_to_json(answers: Sequence[Answer]) -> str:
    """Writes the answers of a question; ``answers_from_json`` reads them."""
    return json.dumps(answers, ensure_ascii=False)


def answers_from_json(text: str) -> list[Answer]:
    """Reads the answers of a question, none if it has no answer."""
    return [Answer(*entry) for entry in json.loads(text)]


def find_answer(context: str, answer: str, start: int | None = None) -> FoundSpan:
    """Finds an answer in its context.

    White space around the answer is not part of it. An answer that is nowhere as it is written
    is sought again without regard to Unicode normalisation (NFKD), so that differently composed
    accents, full-width letters and no-break spaces do not lose it.

    Args:
        context: the text that holds the answer.
        answer: the answer's text.
        start: its first character as the data state it. The nearest occurrence is taken, which
            mends starts that are off, as after white space was stripped; ``shift`` says by how
            much. None for the first occurrence.

    Raises:
        CellError: the answer is empty or not in the context.
    """
    bare = answer.strip()
    if not bare:
        raise CellError("the answer is empty")
    spans = [(i, i + len(bare)) for i in _occurrences(context, bare)]
    spans = spans or _spans_by_fold(context, bare)
    if not spans:
        raise CellError("the answer is not in its context")
    if start is None:
        return FoundSpan(*spans[0], occurrences=len(spans), shift=0)
    stated = start + len(answer) - len(answer.lstrip())
    nearest = min(spans, key=lambda span: abs(span[0] - stated))
    return FoundSpan(*nearest, occurrences=len(spans), shift=nearest[0] - stated)


def cover_text(offsets: np.ndarray, text: str) -> np.ndarray:
    """Widens tokens so that together they hold all of a text but white space.

    The `tokenizers` library places a character that normalisation composed of several (e with a
    combining accent, Korean syllables) at the first of them; the others would belong to no token.

    Args:
        offsets: (T, 2) code points [start, end) of each token, in the order of the text.
        text: what they are places in.

    Returns:
        (T, 2); what no token held belongs to the token before it.
    """
    covered = offsets.copy()
    held_to = np.maximum.accumulate(offsets[:, 1])
    following = np.append(offsets[1:, 0], len(text))[: len(offsets)]
    for i in np.flatnonzero(held_to < following).tolist():
        gap = text[held_to[i] : following[i]]
        if not gap.isspace():
            covered[i, 1] = held_to[i] + len(gap.rstrip())
    return covered


def token_span(
    offsets: np.ndarray | Sequence[tuple[int, int]], start: int, end: int
) -> tuple[int, int] | None:
    """Returns the first and the last token that overlap the characters [start, end).

    Args:
        offsets: (T, 2) each token's characters [begin, end) in the same text; empty ones (of
            special tokens) overlap nothing.
        start: first character.
        end: the place after the last character.

    Returns:
        Two token numbers, both inclusive, or None if no token overlaps.
    """
    begins, ends = np.asarray(offsets, dtype=np.int64).reshape(-1, 2).T
    found = np.flatnonzero(np.maximum(begins, start) < np.minimum(ends, end))
    return (int(found[0]), int(found[-1])) if len(found) else None


def window_starts(num_context_tokens: int, room: int, stride: int) -> list[int]:
    """Places overlapping windows of ``min(room, num_context_tokens)`` tokens over a context.

    They start ``stride`` apart, except the last, which is moved back to end with the context: a
    short last window would cost a pass and show the model less around its tokens.

    Args:
        num_context_tokens: length of the context; without a token there is one empty window.
        room: the most tokens that a window holds.
        stride: tokens from one start to the next; at most ``room``, or tokens would be left out.

    Returns:
        The windows' first tokens, ascending. Every token is in a window.
    """
    assert 1 <= stride <= room
    last = max(num_context_tokens - room, 0)
    return [*range(0, last, stride), last]


def best_spans(
    start_scores: np.ndarray,
    end_scores: np.ndarray,
    first: int,
    last: int,
    max_tokens: int,
    top: int,
) -> list[tuple[int, int, float]]:
    """Finds the spans whose start and end score highest together.

    Args:
        start_scores: (T,) score of each token as the answer's first.
        end_scores: (T,) score of each token as the answer's last.
        first: the first token that a span may hold, usually the context's first.
        last: the last token that a span may hold; before ``first`` if there is none.
        max_tokens: the longest span, at least 1.
        top: how many spans to return at most, at least 1.

    Returns:
        ``(start, end, score)``, both tokens inclusive, best first; equal scores by start, then
        end. Spans with a score of minus infinity are left out.
    """
    assert max_tokens >= 1 and top >= 1
    num_tokens = last - first + 1
    if num_tokens < 1:
        return []
    width = min(max_tokens, num_tokens)
    starts = start_scores[first : last + 1].astype(np.float64)
    ends = end_scores[first : last + 1].astype(np.float64)
    # Row i of the band holds the spans that start at token i, column j those of j + 1 tokens.
    padded = np.concatenate([ends, np.full(width - 1, -np.inf)])
    band = starts[:, None] + np.lib.stride_tricks.sliding_window_view(padded, width)
    scores = band.ravel()
    if top < len(scores):
        least = np.partition(scores, len(scores) - top)[len(scores) - top]
        candidates = np.flatnonzero((scores >= least) & (scores > -np.inf))
    else:
        candidates = np.flatnonzero(scores > -np.inf)
    best = candidates[np.argsort(-scores[candidates], kind="stable")[:top]]
    return [
        (first + row, first + row + column, float(band[row, column]))
        for row, column in zip(*(part.tolist() for part in divmod(best, width)), strict=True)
    ]


def _occurrences(text: str, wanted: str) -> list[int]:
    found = []
    place = text.find(wanted)
    while place >= 0:
        found.append(place)
        place = text.find(wanted, place + 1)
    return found


def _spans_by_fold(context: str, wanted: str) -> list[tuple[int, int]]:
    """Returns the spans of ``context`` that equal ``wanted`` in compatibility decomposition."""
    folded, places = _fold(context)
    target, _ = _fold(wanted)
    # A match that begins or ends within a character, such as the f of a ligature, is none.
    return [
        (places[i], places[i + len(target)])
        for i in _occurrences(folded, target)
        if i in places and i + len(target) in places
    ]


def _fold(text: str) -> tuple[str, dict[int, int]]:
    """Decomposes a text.

    Returns:
        Its compatibility decomposition (NFKD), and for each place in it at which a character of
        the text begins or the text ends, the place in the text. Combining marks belong to the
        character before them.
    """
    pieces: list[str] = []
    places = {0: 0}
    length = start = 0
    while start < len(text):
        end = start + 1
        while end < len(text) and unicodedata.combining(text[end]):
            end += 1
        pieces.append(unicodedata.normalize("NFKD", text[start:end]))
        length += len(pieces[-1])
        places[length] = end
        start = end
    return "".join(pieces), places
