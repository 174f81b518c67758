"""The processes that share one run, as the rest of the code sees them.

Alone, a process is rank 0 of 1 and nothing is sent; ``hasten.parallel`` has those that are several.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import Tensor

T = TypeVar("T")


class Ranks:
    """One process on its own.

    Attributes:
        rank: number of this process, from 0.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes files and speaks."""
        return self.rank == 0

    @property
    def stage_size(self) -> int:
        """How many processes have to do with the same weights; fewer than all in a pipeline."""
        return self.size

    @property
    def of_batch(self) -> Ranks:
        """The processes by the share of a batch that they have; several may have the same."""
        return self

    @property
    def speaks_for_share(self) -> bool:
        """Whether this process counts what its share of a batch comes to; one of each share."""
        return True

    def sum(self, tensor: Tensor) -> Tensor:
        """Returns the sum of every process's tensor, on all of them."""
        return tensor

    def gather(self, value: T) -> list[T]:
        """Returns every process's value, in the order of ranks, on all of them."""
        return [value]

    def collect(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns on rank 0 the tensors of all stages of a pipeline, on others none.

        Args:
            tensors: of this process's stage, on the host; the first process of a stage sends.
        """
        return tensors

    def any(self, values: Sequence[bool]) -> list[bool]:
        """Returns for each value whether it is true on some process."""
        return list(values)

    def on_main(self, work: Callable[[], T]) -> T:
        """Returns on all processes what ``work`` returns on rank 0, the only one to do it.

        Where it fails, rank 0 raises the error and the others end with its exit code, in silence.
        """
        return work()

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Returns this process's share of a list that all of them have."""
        return items[self.rank :: self.size]


ALONE = Ranks()
