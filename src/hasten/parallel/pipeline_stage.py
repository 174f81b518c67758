"""One stage of a pipeline: a part of the model, and what it works on.

    index of a micro-batch --> StageWork --batch--.
    hidden states (R, D) of the stage before ----> Stage ----> hidden states, or the loss

Every process has all micro-batches of a step, so that stages send each other nothing but hidden
states and their gradients. Shapes: N tokens of a micro-batch with filler, R rows of hidden states,
D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hasten.core.batch import PackedBatch, SequenceLayout
from hasten.core.shards import is_sharded
from hasten.model.stages import StageCosts, keep_stages, own_stack, stage_costs
from hasten.model.transformer import Transformer
from hasten.parallel.pipeline_plan import PipelineSchedule, cut_blocks, num_stages


@dataclass
class StageWork:
    """What the stages of a process work on in one step.

    Attributes:
        batches: the micro-batches as they were given, then empty ones that keep the schedule.
        filled: the same, each with N tokens.
        num_given: how many are not empty.
        use: of outputs and a batch as it was given, on the last stage.
        is_loss: whether ``use`` gives a loss.
        before_each: is told the numbers of micro-batch and stage before each forward.
        computing: surrounds each forward, as ``torch.autocast`` does.
        results: of ``use``, by number, where it gives no loss.
    """

    batches: list[PackedBatch]
    filled: list[PackedBatch]
    num_given: int
    use: Callable[[Any, PackedBatch], Any]
    is_loss: bool = False
    before_each: Callable[[int, int], None] | None = None
    computing: Callable[[], AbstractContextManager[Any]] = nullcontext
    results: dict[int, Any] = field(default_factory=dict)


class Stage(nn.Module):
    """A run of blocks, with what comes before the first and after the last of the model.

    Its parameters are those of ``model``, where they have their names.

    Args:
        model: that holds the parts, here or elsewhere.
        blocks: numbers of the blocks of this stage.
        number: of the stage.
        num_stages: in all.

    Attributes:
        work: of the step that is running.
    """

    def __init__(
        self, model: Transformer, blocks: Sequence[int], number: int, num_stages: int
    ) -> None:
        super().__init__()
        # Not as a part: the model has other stages' parts too, and lists this one's as its own.
        self._model = (model,)
        stack = own_stack(model)
        self.number, self.num_stages = number, num_stages
        self.is_first, self.is_last = number == 0, number == num_stages - 1
        self.blocks = nn.ModuleList(stack.blocks.get_submodule(str(i)) for i in blocks)
        if self.is_first:
            self.embedding, self.positions = model.embedding, stack.positions
            self.embedding_norm, self.projection = stack.embedding_norm, stack.projection
        if self.is_last:
            self.final_norm, self.head = stack.final_norm, model.head
            if not self.is_first:
                self.embedding = model.embedding  # of which a tied head has the tokens
        self.work: StageWork | None = None

    def forward(self, x_RD: Tensor | None = None, *, index: Tensor) -> Tensor:
        """Runs one micro-batch.

        Args:
            x_RD: hidden states of the stage before; None for the first.
            index: (1,) int64 on the host, number of the micro-batch.

        Returns:
            Hidden states (R, D); of the last stage the loss, where one is asked for.
        """
        assert self.work is not None
        number = int(index)
        if self.work.before_each is not None and number < self.work.num_given:
            self.work.before_each(number, self.number)
        with self.work.computing():
            return self._run(x_RD, number, self.work)

    def _run(self, x_RD: Tensor | None, number: int, work: StageWork) -> Tensor:
        (model,) = self._model
        stack, batch = own_stack(model), work.filled[number]
        if self.is_first:
            x_RD = stack.divide(stack.enter(model.embed(batch), batch.positions))
        assert x_RD is not None
        x_RD = stack.advance(x_RD, batch, blocks=self.blocks)
        if not self.is_last:
            return x_RD
        x_ND = stack.unite(stack.leave(x_RD))
        num_real = batch.num_tokens - batch.num_filler
        if num_real == 0:
            return self._nothing(x_ND)
        outputs = model.score(x_ND[:num_real], batch.unfilled_layout)
        result = work.use(outputs, work.batches[number])
        if work.is_loss:
            return result
        work.results[number] = result
        return x_ND

    def _nothing(self, x_ND: Tensor) -> Tensor:
        """Returns a loss of 0, with gradients of 0 whatever the filler came to.

        The head has no part in it, and gets gradients all the same: processes among which it is
        sharded sum those that there are.
        """
        parts = [self.head] if self.is_first else [self.head, self.embedding]
        weights = [weight for part in parts for weight in part.parameters()]
        own = [weight.to_local() if is_sharded(weight) else weight for weight in weights]  # pyright: ignore
        return sum((one[:0].sum() for one in own), x_ND[:0].sum())


def cut_model(
    model: Transformer,
    schedule: PipelineSchedule,
    rank: int,
    size: int,
    stages_per_rank: int | None = None,
    costs: StageCosts | None = None,
) -> list[Stage]:
    """Keeps of a whole model, in place, what one process of a pipeline runs.

    Stages go round: process r of P has the stages r, r + P and so on.

    Args:
        model: the whole one; it keeps the parts of this process, under their names.
        schedule: that the stages run by.
        rank: of this process in its pipeline.
        size: processes of the pipeline.
        stages_per_rank: stages of each process; None for as many as the schedule usually has.
        costs: of the model's parts; None for those of ``stage_costs``.

    Returns:
        The stages of this process, in their order.

    Raises:
        UsageError: the model cannot be cut so.
    """
    stack = own_stack(model)
    total = num_stages(schedule, size, stages_per_rank)
    costs = costs or stage_costs(model.config)
    spans = cut_blocks(
        [costs.block] * len(stack.blocks), total, before=costs.embedding, after=costs.head
    )
    own = range(rank, total, size)
    keep_stages(
        model,
        [block for number in own for block in spans[number]],
        has_first=0 in own,
        has_last=total - 1 in own,
    )
    return [Stage(model, spans[number], number, total) for number in own]


def empty_batch(device: torch.device) -> PackedBatch:
    """Returns a batch without tokens, which counts for nothing."""
    none = torch.zeros(0, dtype=torch.int64, device=device)
    layout = SequenceLayout.from_lengths([], device)
    return PackedBatch(none, none.int(), layout, example_ids=none)
