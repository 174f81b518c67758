"""Cuts long texts into windows for predicting the next token.

text    t0 t1 t2 t3 t4 t5 t6
windows t0 t1 t2 t3                each window's last token is only a target, and the next
t3 t4 t5 t6       begins with it: every token but t0 is predicted once
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Windows:
    """Ranges of tokens.

    Attributes:
        starts: (E,) first token of each.
        ends: (E,) the place after its last token.
        rows: (E,) the row that each belongs to.
    """

    starts: np.ndarray
    ends: np.ndarray
    rows: np.ndarray


def cut_windows(
    starts: np.ndarray, ends: np.ndarray, rows: np.ndarray, size: int, shift: int = 0
) -> Windows:
    """Cuts texts into windows that predict ``size`` tokens each, the first and last maybe fewer.

    Args:
        starts: (R,) first token of each text.
        ends: (R,) the place after its last token; a text of fewer than two tokens has no window.
        rows: (R,) the row of each text.
        size: tokens that a window predicts.
        shift: tokens that the first window of each text predicts; 0 for ``size``.
    """
    predicted = np.maximum(ends - starts - 1, 0)
    first = np.minimum(shift or size, predicted)
    counts = (predicted > 0) + -(-(predicted - first) // size)
    owner = np.repeat(np.arange(len(starts)), counts)
    number = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    begin = starts[owner] + np.where(number == 0, 0, first[owner] + (number - 1) * size)
    length = np.where(number == 0, first[owner], size)
    return Windows(begin, np.minimum(begin + length + 1, ends[owner]), rows[owner])
