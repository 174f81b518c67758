"""Spans of answers: where they are in a text, in its tokens, and in a model's scores."""

from __future__ import annotations

import itertools
import unicodedata

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hasten.data.columns import CellError
from hasten.data.spans import FoundSpan, best_spans, find_answer, token_span, window_starts

REPETITIVE = st.text("ab ", min_size=1, max_size=24)


@settings(max_examples=400)
@given(context=REPETITIVE, cut=st.tuples(st.integers(0, 24), st.integers(1, 5)))
def test_a_right_start_is_kept_and_the_first_is_taken_without_one(
    context: str, cut: tuple[int, int]
):
    start, length = cut
    answer = context[start : start + length]
    assume(answer.strip())
    places = [i for i in range(len(context)) if context[i:].startswith(answer.strip())]
    found = find_answer(context, answer, start)
    assert context[found.start : found.end] == answer.strip()
    assert found.start == start + len(answer) - len(answer.lstrip())
    assert (found.occurrences, found.shift) == (len(places), 0)
    first = find_answer(context, answer)
    assert (first.start, first.occurrences, first.shift) == (places[0], len(places), 0)


@settings(max_examples=400)
@given(context=REPETITIVE, answer=st.text("ab", min_size=1, max_size=3), start=st.integers(-9, 40))
def test_the_nearest_occurrence_mends_a_wrong_start(context: str, answer: str, start: int):
    places = [i for i in range(len(context)) if context[i:].startswith(answer)]
    assume(places)
    found = find_answer(context, answer, start)
    assert found.start in places and found.end == found.start + len(answer)
    assert abs(found.start - start) == min(abs(place - start) for place in places)
    assert found.shift == found.start - start


ACCENTS = ["e", "\u00e9", "e\u0301", "o\u0323\u0302", "\u1ed9"]
FORMS = [*ACCENTS, "ﬁ", "f", "i", "Ａ", "A", "\u00a0", "가", "각", "²"]
UNICODE = st.lists(st.sampled_from(FORMS), min_size=1, max_size=10).map("".join)


@settings(max_examples=400)
@given(context=UNICODE, answer=UNICODE, form=st.sampled_from(["NFC", "NFD", "NFKC", "NFKD"]))
def test_what_is_found_equals_the_answer_whatever_its_composition(
    context: str, answer: str, form: str
):
    assume(answer.strip())

    def folded(text: str) -> str:
        return unicodedata.normalize("NFKD", text)

    try:
        found = find_answer(context, answer)
    except CellError:
        assert answer.strip() not in context
    else:
        assert folded(context[found.start : found.end]) == folded(answer.strip())
    whole = find_answer(context, unicodedata.normalize(form, context)) if context.strip() else None
    if whole:
        assert folded(context[whole.start : whole.end]) == folded(context.strip())


@pytest.mark.parametrize(
    ("context", "answer", "start", "expected"),
    [
        ("Paris is in France.", "France", 12, FoundSpan(12, 18, 1, 0)),
        # Off by one or two, as after white space was stripped.
        ("Paris is in France.", "France", 14, FoundSpan(12, 18, 1, -2)),
        ("Paris is in France.", "France", None, FoundSpan(12, 18, 1, 0)),
        ("Paris is in France.", "Paris", -1, FoundSpan(0, 5, 1, 1)),
        # White space around the answer is left out; the start moves with it.
        ("It is Paris now", " Paris ", 5, FoundSpan(6, 11, 1, 0)),
        ("It is Paris now", "\nParis", 6, FoundSpan(6, 11, 1, -1)),
        # The stated occurrence, the nearest one, the first one.
        ("one two one two one", "one", 8, FoundSpan(8, 11, 3, 0)),
        ("one two one two one", "one", 10, FoundSpan(8, 11, 3, -2)),
        ("one two one two one", "one", None, FoundSpan(0, 3, 3, 0)),
        ("banana", "ana", 3, FoundSpan(3, 6, 2, 0)),
        # Offsets are code points, not UTF-16 units or bytes.
        ("😀 Zürich", "Zürich", 2, FoundSpan(2, 8, 1, 0)),
        ("😀 Zürich", "Zürich", 3, FoundSpan(2, 8, 1, -1)),
        # Other compositions of the same characters.
        ("un cafe\u0301 noir", "caf\u00e9", 3, FoundSpan(3, 8, 1, 0)),
        ("un caf\u00e9 noir", "cafe\u0301", 4, FoundSpan(3, 7, 1, -1)),
        ("c\u00f4\u0323 x", "c\u1ed9", 0, FoundSpan(0, 3, 1, 0)),
        ("co\u0302\u0323 x", "co\u0323\u0302", 0, FoundSpan(0, 4, 1, 0)),
        ("New\u00a0York", "New York", 0, FoundSpan(0, 8, 1, 0)),
        ("１９９０年", "1990", None, FoundSpan(0, 4, 1, 0)),
        ("the ﬁnal", "final", 4, FoundSpan(4, 8, 1, 0)),
        # As it is written goes before any other composition, however near.
        ("caf\u00e9 cafe\u0301", "cafe\u0301", 0, FoundSpan(5, 10, 1, 5)),
    ],
)
def test_answers_found_by_hand(context: str, answer: str, start: int | None, expected: FoundSpan):
    assert find_answer(context, answer, start) == expected


@pytest.mark.parametrize(
    ("context", "answer", "reason"),
    [
        ("Paris is in France.", "Rome", "the answer is not in its context"),
        ("", "Rome", "the answer is not in its context"),
        ("Paris", "paris", "the answer is not in its context"),
        # Part of a ligature and a letter without its accent are not the answer.
        ("re\ufb01t", "ref", "the answer is not in its context"),
        ("of\ufb01ce", "off", "the answer is not in its context"),
        ("\ufb01x", "ix", "the answer is not in its context"),
        ("caf\u00e9s", "cafe", "the answer is not in its context"),
        ("Ａe\u0301", "Ae", "the answer is not in its context"),
        ("Paris", " \n", "the answer is empty"),
        ("Paris", "", "the answer is empty"),
    ],
)
@pytest.mark.parametrize("start", [None, 0])
def test_answers_that_are_not_there_are_refused(
    context: str, answer: str, reason: str, start: int | None
):
    with pytest.raises(CellError) as caught:
        find_answer(context, answer, start)
    assert str(caught.value) == reason


@settings(max_examples=400)
@given(
    gaps=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 4)), max_size=10),
    span=st.tuples(st.integers(0, 30), st.integers(0, 12)),
)
def test_a_token_span_holds_just_the_tokens_that_share_a_character(
    gaps: list[tuple[int, int]], span: tuple[int, int]
):
    offsets, place = [], 0
    for gap, length in gaps:
        offsets.append((place + gap, place + gap + length))
        place += gap + length
    start, end = span[0], span[0] + span[1]
    shared = [i for i, token in enumerate(offsets) if set(range(*token)) & set(range(start, end))]
    expected = (shared[0], shared[-1]) if shared else None
    assert token_span(offsets, start, end) == expected


def test_token_spans_by_hand():
    #          [CLS]   Par     is      (space) in      [SEP]
    offsets = [(0, 0), (0, 3), (3, 5), (5, 6), (6, 8), (0, 0)]
    assert token_span(offsets, 0, 5) == (1, 2)
    assert token_span(offsets, 4, 7) == (2, 4)
    assert token_span(offsets, 2, 3) == (1, 1)
    assert token_span(offsets, 8, 9) is None
    assert token_span(offsets, 3, 3) is None
    assert token_span([], 0, 5) is None
    # A token of several bytes of one character, as byte-level tokenizers make them.
    assert token_span([(0, 1), (0, 1), (1, 2)], 0, 1) == (0, 1)


@settings(max_examples=400)
@given(
    num_tokens=st.integers(0, 300),
    room=st.integers(1, 80),
    share=st.floats(0, 1),
)
def test_windows_hold_every_token_and_are_all_full(num_tokens: int, room: int, share: float):
    stride = max(1, round(share * room))
    starts = window_starts(num_tokens, room, stride)
    size = min(room, num_tokens)
    held = set(itertools.chain.from_iterable(range(start, start + size) for start in starts))
    assert held == set(range(num_tokens))
    steps = [after - before for before, after in itertools.pairwise(starts)]
    assert starts[0] == 0 and all(step == stride for step in steps[:-1])
    assert all(1 <= step <= stride for step in steps)
    # Not one window more than the stride asks for.
    assert len(starts) == 1 + -(-max(num_tokens - room, 0) // stride)


@pytest.mark.parametrize(
    ("num_tokens", "room", "stride", "expected"),
    [
        (10, 10, 5, [0]),
        (11, 10, 5, [0, 1]),
        (20, 10, 5, [0, 5, 10]),
        (21, 10, 5, [0, 5, 10, 11]),
        (3, 10, 10, [0]),
        (0, 10, 5, [0]),
    ],
)
def test_windows_by_hand(num_tokens: int, room: int, stride: int, expected: list[int]):
    assert window_starts(num_tokens, room, stride) == expected


# Few values, so that many spans are equal, and some that nothing may choose.
SCORES = st.one_of(st.integers(-3, 3).map(float), st.floats(-9, 9, width=32), st.just(-np.inf))


@settings(max_examples=400)
@given(
    scores=st.lists(st.tuples(SCORES, SCORES), min_size=1, max_size=14),
    bounds=st.tuples(st.integers(0, 13), st.integers(-1, 13)),
    max_tokens=st.integers(1, 16),
    top=st.integers(1, 40),
)
def test_the_best_spans_are_those_of_trying_all(
    scores: list[tuple[float, float]], bounds: tuple[int, int], max_tokens: int, top: int
):
    start_scores, end_scores = (np.array(column) for column in zip(*scores, strict=True))
    first, last = min(bounds[0], len(scores) - 1), min(bounds[1], len(scores) - 1)
    every = [
        (i, j, float(start_scores[i] + end_scores[j]))
        for i in range(first, last + 1)
        for j in range(i, min(i + max_tokens, last + 1))
    ]
    expected = sorted(
        (span for span in every if span[2] > -np.inf), key=lambda span: (-span[2], *span[:2])
    )
    assert best_spans(start_scores, end_scores, first, last, max_tokens, top) == expected[:top]


def test_best_spans_by_hand():
    starts = np.array([9.0, 1.0, 3.0, 0.0, 9.0], dtype=np.float32)
    ends = np.array([9.0, 2.0, 0.0, 4.0, 9.0], dtype=np.float32)
    # Neither the best start and end of all, outside the context, nor an end before its start.
    assert best_spans(starts, ends, 1, 3, 2, 2) == [(2, 3, 7.0), (3, 3, 4.0)]
    assert best_spans(starts, ends, 1, 3, 1, 9) == [(3, 3, 4.0), (1, 1, 3.0), (2, 2, 3.0)]
    assert best_spans(starts, ends, 3, 2, 5, 3) == []


def test_spans_are_compared_in_double_precision():
    # In float32 both sums would be 16777216.
    starts = np.array([16777216.0, 16777216.0], dtype=np.float32)
    ends = np.array([0.0, 1.0], dtype=np.float32)
    assert best_spans(starts, ends, 0, 1, 1, 1) == [(1, 1, 16777217.0)]
