"""What a pipeline is to do, before anything runs: its schedule, and where the model is cut.

    blocks and their costs --cut_blocks--> the blocks of each stage
    name --find_schedule--> PipelineSchedule --num_fitting--> micro-batches that a step runs
    tokens of the largest micro-batch --filled_tokens--> N that each is filled up to

Nothing heavy is imported here: the command line reads schedules before it starts anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from hasten.core.errors import UsageError, nearest


@dataclass(frozen=True)
class PipelineSchedule:
    """In which order the stages work on the micro-batches of a step.

    Attributes:
        engine: what torch calls it.
        stages_per_rank: stages of each process unless asked for otherwise.
        takes_several: whether a process may have several stages.
        num_fitting: smallest number of micro-batches that it takes, from (number of those that
            there are, number of processes).
        splits_backward: whether gradients of inputs and of weights are taken apart, which does
            not go with compiled blocks.
    """

    engine: str
    stages_per_rank: int
    takes_several: bool
    num_fitting: Callable[[int, int], int]
    splits_backward: bool = False


def _at_least_one(count: int, size: int) -> int:
    del size
    return max(count, 1)


def _one_for_each(count: int, size: int) -> int:
    return max(count, size)


def _whole_rounds(count: int, size: int) -> int:
    """Rounds of about as many micro-batches as there are processes, all rounds alike."""
    count = max(count, 1)
    while count % max(1, count // size):
        count += 1
    return count


SCHEDULES: dict[str, PipelineSchedule] = {
    # Huang et al. 2019, "GPipe": all forward, then all backward.
    "gpipe": PipelineSchedule("GPipe", 1, False, _at_least_one),
    # Narayanan et al. 2019, "PipeDream": backward as soon as possible, so that less is kept.
    "1f1b": PipelineSchedule("1F1B", 1, False, _one_for_each),
    # Narayanan et al. 2021: several stages a process, so that each waits less.
    "interleaved": PipelineSchedule("Interleaved1F1B", 2, True, _whole_rounds),
    # Qi et al. 2023: gradients of weights are taken while a process would wait.
    "zero-bubble": PipelineSchedule("InterleavedZeroBubble", 1, True, _whole_rounds, True),
}


def find_schedule(name: str) -> PipelineSchedule:
    """Returns the schedule of a name.

    Raises:
        UsageError: there is none, naming the nearest.
    """
    if name not in SCHEDULES:
        known = ", ".join(SCHEDULES)
        raise UsageError(
            f"there is no pipeline schedule '{name}': {known}.{nearest(name, SCHEDULES)}"
        )
    return SCHEDULES[name]


def num_stages(schedule: PipelineSchedule, size: int, stages_per_rank: int | None = None) -> int:
    """Returns how many stages a model is cut into.

    Args:
        schedule: that they run by.
        size: processes of the pipeline.
        stages_per_rank: of each process; None for as many as the schedule usually has.

    Raises:
        UsageError: the schedule does not take so many.
    """
    wanted = stages_per_rank or schedule.stages_per_rank
    if wanted > 1 and not schedule.takes_several:
        names = " or ".join(name for name, one in SCHEDULES.items() if one.takes_several)
        raise UsageError(f"{wanted} stages a process need the schedule {names}.")
    return wanted * size


def filled_tokens(wanted: int, sizes: Sequence[int]) -> int:
    """Returns N, which the micro-batches of a step are filled up to.

    It has few values, since for each there is memory for what is received.

    Args:
        wanted: tokens of the largest of them.
        sizes: values of N, in ascending order: the first that is enough is taken, else twice the
            last, or four times, and so on.
    """
    size = next((size for size in sizes if size >= wanted), sizes[-1])
    while size < wanted:
        size *= 2
    return size


def cut_blocks(
    costs: Sequence[float], num_stages: int, *, before: float = 0.0, after: float = 0.0
) -> tuple[range, ...]:
    """Cuts blocks into stages of which the dearest is as cheap as can be.

    Args:
        costs: of each block.
        num_stages: of which each has at least one block.
        before: what the first stage has to do besides.
        after: what the last stage has to do besides.

    Returns:
        The numbers of the blocks of each stage.

    Raises:
        UsageError: there are fewer blocks than stages.
    """
    count = len(costs)
    if count < num_stages:
        raise UsageError(
            f"{num_stages} pipeline stages need as many blocks, and the model has {count}: "
            f"--model.num_layers {num_stages} would fit."
        )
    upto = list(accumulate(costs, initial=0.0))

    def price(start: int, end: int) -> float:
        ends = before * (start == 0) + after * (end == count)
        return upto[end] - upto[start] + ends

    # best[end]: of the first ``end`` blocks in so many stages, the dearest stage, the sum of
    # squares (of two cuts alike in the first the more even one is taken), and where stages end.
    best = {0: (0.0, 0.0, (0,))}
    for stage in range(1, num_stages + 1):
        left = num_stages - stage
        best = {
            end: min(
                (max(dearest, price(start, end)), squares + price(start, end) ** 2, (*cuts, end))
                for start, (dearest, squares, cuts) in best.items()
                if start < end
            )
            for end in range(stage, count - left + 1)
            if left or end == count
        }
    _, _, cuts = best[count]
    return tuple(range(a, b) for a, b in pairwise(cuts))
