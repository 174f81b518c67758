"""How the processes of a run share its work: a degree for each axis of the mesh.

    "replicate=2,shard=2", 4 processes --choose_layout--> Layout(replicate=2, shard=2)

Their product is the number of processes. Nothing heavy is imported here: the command line reads
layouts before it starts anything.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from hasten.core.errors import UsageError, nearest


@dataclass(frozen=True)
class Layout:
    """Degrees of the axes.

    Attributes:
        pipeline: processes that hold some blocks each, and pass micro-batches on.
        replicate: groups that hold the whole model, each with its share of a batch.
        shard: processes among which a group's weights, gradients and optimizer state are spread;
            each has its share of a batch too.
        context: processes that share the tokens of each micro-batch.
        tensor: processes that share each matrix, and the heads of attention.
    """

    pipeline: int = 1
    replicate: int = 1
    shard: int = 1
    context: int = 1
    tensor: int = 1

    @property
    def size(self) -> int:
        """Processes in all."""
        return math.prod(dataclasses.astuple(self))

    @property
    def num_batch_shares(self) -> int:
        """Shares that each batch is cut into: groups of processes with examples of their own."""
        return self.replicate * self.shard

    @property
    def has_whole_weights(self) -> bool:
        """Whether what a process holds of the weights it holds as a whole."""
        return self.shard == self.tensor == 1

    def __str__(self) -> str:
        """The layout as a person writes it."""
        degrees = dataclasses.asdict(self).items()
        return ",".join(f"{axis}={n}" for axis, n in degrees if n > 1) or "replicate=1"


AXES = tuple(field.name for field in dataclasses.fields(Layout))


def choose_layout(wanted: str, num_processes: int | None) -> Layout:
    """Returns the layout that was asked for, or one that replicates the model.

    Args:
        wanted: ``auto``, or degrees such as ``replicate=2,shard=2``; an axis left out is 1.
        num_processes: how many there are; None where the layout decides.

    Raises:
        UsageError: an unknown axis, a degree that is no whole number above 0, or a product that
            is not the number of processes.
    """
    if wanted == "auto":
        return Layout(replicate=num_processes or 1)
    degrees: dict[str, int] = {}
    for part in wanted.split(","):
        axis, _, degree = (piece.strip() for piece in part.partition("="))
        if axis not in AXES:
            raise UsageError(
                f"--parallel {wanted}: there is no axis '{axis}'; there are {', '.join(AXES)}."
                f"{nearest(axis, AXES)}"
            )
        if not degree.isdecimal() or int(degree) < 1 or axis in degrees:
            raise UsageError(
                f"--parallel {wanted}: write one whole number for each axis, as in "
                "replicate=2,shard=2."
            )
        degrees[axis] = int(degree)
    layout = Layout(**degrees)
    if num_processes is not None and layout.size != num_processes:
        fitting = dataclasses.replace(layout, replicate=1)
        fits = num_processes % fitting.size == 0
        tip = dataclasses.replace(layout, replicate=num_processes // fitting.size)
        raise UsageError(
            f"--parallel {wanted} is a layout of {layout.size} processes, and there are "
            f"{num_processes}" + (f"; --parallel {tip} would fit." if fits else ".")
        )
    return layout
