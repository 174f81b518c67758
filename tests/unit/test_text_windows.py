"""Windows of texts: every token is predicted once, from as much as the model sees."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hasten.data.text_windows import Windows, cut_windows

LENGTHS = st.lists(st.integers(0, 40), max_size=6)
SIZE, SHIFT = st.integers(1, 12), st.integers(0, 12)


def cut(lengths: list[int], size: int, shift: int, gap: int = 0) -> Windows:
    """Windows of texts that lie one after the other, with ``gap`` tokens of others between."""
    starts = np.cumsum([0, *(n + gap for n in lengths)])[:-1].astype(np.int64)
    rows = np.arange(len(lengths)) * 10
    return cut_windows(starts, starts + np.array(lengths, dtype=np.int64), rows, size, shift)


@given(LENGTHS, SIZE, SHIFT, st.integers(0, 3))
def test_every_token_but_a_texts_first_is_predicted_once(lengths, size, shift, gap):
    shift = min(shift, size)
    windows = cut(lengths, size, shift, gap)
    # A window predicts all its tokens but the first.
    predicted = [
        place
        for start, end in zip(windows.starts.tolist(), windows.ends.tolist(), strict=True)
        for place in range(start + 1, end)
    ]
    begins = itertools.accumulate((n + gap for n in lengths), initial=0)
    expected = [
        place
        for begin, length in zip(begins, lengths, strict=False)
        for place in range(begin + 1, begin + length)
    ]
    assert predicted == expected  # once each, and in the order of the texts


@given(LENGTHS, SIZE, SHIFT)
def test_windows_are_no_longer_than_the_model_sees(lengths, size, shift):
    shift = min(shift, size)
    windows = cut(lengths, size, shift)
    assert len(windows.starts) == len(windows.ends) == len(windows.rows)
    num_predicted = windows.ends - windows.starts - 1
    assert ((num_predicted >= 1) & (num_predicted <= size)).all()
    for row, length in enumerate(lengths):
        own = num_predicted[windows.rows == 10 * row].tolist()
        if length < 2:  # nothing to predict, or nothing to predict it from
            assert own == []
            continue
        assert own[0] == min(shift or size, length - 1)
        # Only the last may be shorter: no fewer windows would do.
        assert all(n == size for n in own[1:-1])
        assert len(own) == 1 + -(-(length - 1 - own[0]) // size)


def test_by_hand():
    # The picture of the module: seven tokens, three predicted at a time.
    windows = cut([7], 3, 0)
    assert windows.starts.tolist() == [0, 3] and windows.ends.tolist() == [4, 7]
    windows = cut([7, 1, 0, 3], 3, 2)
    assert windows.starts.tolist() == [0, 2, 5, 8]
    assert windows.ends.tolist() == [3, 6, 7, 11]
    assert windows.rows.tolist() == [0, 0, 0, 30]


def test_no_texts_have_no_windows():
    for lengths in ([], [0], [1], [1, 0, 1]):
        windows = cut(lengths, 4, 0)
        assert windows.starts.shape == windows.ends.shape == windows.rows.shape == (0,)
