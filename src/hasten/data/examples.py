"""The examples of one split, as the loop sees them: lengths, weights, and packing.

    Corpus, tokens --task--> Examples --order of the epoch--> numbers (S,) --pack--> PackedBatch

The loop, the order of an epoch and the evaluation know nothing else about data. An example is
called by its number in the split.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

import numpy as np

from hasten.core.batch import PackedBatch
from hasten.data.corpus import Corpus


class Examples(ABC):
    """The E examples of one split.

    Attributes:
        corpus: the rows they come from.
        rows: (E,) row of the corpus that each example comes from.
        lengths: (E,) int64 positions that each takes in a batch, of all streams.
        weights: (E,) float64, what each adds to the divisor of the loss.
        num_truncated: texts of the corpus that were cut to the longest length.
    """

    corpus: Corpus
    rows: np.ndarray
    lengths: np.ndarray
    weights: np.ndarray
    num_truncated: int = 0

    def __len__(self) -> int:
        """Number of examples E."""
        return len(self.lengths)

    @abstractmethod
    def pack(self, examples: np.ndarray, weight: float = 1.0) -> PackedBatch:
        """Packs examples with their targets.

        Args:
            examples: (S,) their numbers, in the order in which they are laid down.
            weight: units that the step's summed loss is divided by.
        """

    def in_epoch(self, epoch: int) -> Examples:
        """Returns the examples as an epoch has them: with other tokens, or in other windows."""
        return self

    def lines(self, examples: Iterable[int]) -> dict[str, list[int]]:
        """Returns where examples stand, for messages: their lines in each file."""
        rows = self.rows[np.fromiter(examples, dtype=np.int64)]
        found: dict[str, list[int]] = {}
        for row in np.unique(rows).tolist():
            name, line = self.corpus.place(row)
            found.setdefault(name, []).append(line)
        return found
