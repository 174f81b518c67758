"""A model whose blocks are spread over the stages of a pipeline, as the training loop sees it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hasten.core.batch import PackedBatch
from hasten.core.shards import local_parts, whole
from hasten.model.stages import own_stack
from hasten.model.transformer import Transformer
from hasten.parallel.data_parallel import DataParallel
from hasten.parallel.divided import DividedRows
from hasten.parallel.pipeline import Pipeline
from hasten.parallel.rows import Divide
from hasten.parallel.world import World

# Batches that are measured at a time: their outputs wait for nothing, their tokens are held.
_MEASURED_AT_ONCE = 16


class Pipelined(DividedRows):
    """Stages that pass micro-batches to each other.

    Args:
        model: what this process has of it.
        ranks: the processes.
        pipeline: runs the stages.
    """

    def __init__(self, model: Transformer, ranks: World, pipeline: Pipeline) -> None:
        super().__init__(model, ranks, DataParallel(model, ranks))
        self._pipeline, self._mesh = pipeline, ranks.weights_mesh
        self._divide = own_stack(model).divide
        self.has_loss = self.has_loss and pipeline.has_last

    def train_on(
        self,
        batches: Sequence[PackedBatch],
        loss: Callable[[int, Any], Tensor],
        before_each: Callable[[int, int], None],
    ) -> Tensor:
        """See ``DataParallel.train_on``; the loss is 0 but on the last stage."""
        numbers = {id(batch): number for number, batch in enumerate(batches)}

        def prepare(number: int, stage: int) -> None:
            before_each(number, stage)
            if stage and isinstance(self._divide, Divide):
                self._divide.draw_apart()

        with self.sharing_loss():
            total = self._pipeline.step(
                list(batches), lambda outputs, batch: loss(numbers[id(batch)], outputs), prepare
            )
        if self.layout.shard == 1:
            self._sum_gradients()
        return torch.zeros((), device=batches[0].token_ids.device) if total is None else total

    def measure_on(
        self,
        batches: Iterable[PackedBatch],
        use: Callable[[Any, PackedBatch], Any],
        spare: Callable[[], PackedBatch] | None = None,
    ) -> None:
        """See ``DataParallel.measure_on``; outputs are used on the last stage only."""
        rest, is_short = iter(batches), spare is not None and self.layout.shard > 1
        with self.measuring():
            while some := list(itertools.islice(rest, _MEASURED_AT_ONCE)):
                is_last = len(some) < _MEASURED_AT_ONCE
                self._pipeline.forward(some, use, at_least=len(some) + (is_last and is_short))
                if is_last:
                    return
            if is_short:
                self._pipeline.forward([], use, at_least=1)

    def filled(self, batches: Sequence[PackedBatch]) -> list[PackedBatch]:
        """See ``DataParallel.filled``."""
        num_tokens = self._pipeline.num_tokens_for(batches)
        return [batch.filled(self.row_multiple, num_tokens) for batch in batches]

    def counted_parameters(self) -> list[nn.Parameter]:
        """See ``DataParallel.counted_parameters``; a tied weight is the first stage's."""
        return [self.model.get_parameter(name) for name in self._pipeline.owned_names()]

    def whole_tensors(self) -> dict[str, Tensor]:
        """See ``DividedRows.whole_tensors``; each is told to the other stages by its own."""
        own = {name: whole(tensor) for name, tensor in self.model.state_dict().items()}
        group = self._mesh["pipeline"].get_group()
        facts: list[Any] = [None] * self.layout.pipeline
        held = {name: (tensor.shape, tensor.dtype) for name, tensor in own.items()}
        torch.distributed.all_gather_object(facts, held, group=group)
        device = next(self.model.parameters()).device
        for stage, names in enumerate(facts):
            for name, (shape, dtype) in names.items():
                if name not in own:
                    own[name] = torch.empty(shape, dtype=dtype, device=device)
                torch.distributed.broadcast(own[name], group=group, group_src=stage)
        return own

    @torch.no_grad()
    def _sum_gradients(self) -> None:
        """Sums gradients over the processes with the same weights and other examples or rows."""
        axes = [a for a in ("replicate", "shard") if self._mesh[a].size() > 1]
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        if not axes or not gradients:
            return
        parts = local_parts(gradients)
        flat = torch.cat([part.flatten() for part in parts])
        for axis in axes:
            torch.distributed.all_reduce(flat, group=self._mesh[axis].get_group())
        sizes = [part.numel() for part in parts]
        for part, summed in zip(parts, flat.split(sizes), strict=True):
            part.copy_(summed.view_as(part))
