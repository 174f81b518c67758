"""A model whose batches are shared among processes: whole copies, or weights in shards.

    replicate   DistributedDataParallel: gradients are summed while backward goes on
    shard       FSDP2 (fully_shard): weights are gathered block by block, gradients scattered
    both        groups of shards, each group with the whole model

Gradients are summed, never averaged: the loss is already divided by what all processes count.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hasten.core.ranks import Ranks
from hasten.parallel.world import World


class DataParallel:
    """How one process computes its share; this class is the way of a process that is alone.

    Args:
        model: the plain model.
        ranks: the processes that share each batch.

    Attributes:
        in_step: whether all processes have to run the model equally often.
    """

    in_step = False

    def __init__(self, model: nn.Module, ranks: Ranks) -> None:
        self.model, self.ranks = model, ranks

    def __call__(self, batch: Any) -> Any:
        """Runs the model for training."""
        return self.model(batch)

    @contextmanager
    def accumulating(self, is_last: bool) -> Iterator[None]:
        """Surrounds the forward and backward of one micro-batch of a step.

        Args:
            is_last: whether gradients are summed over all processes in it.
        """
        del is_last
        yield

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Lets each process use the whole model as it likes, without gradients."""
        yield

    def settle(self) -> None:
        """Gives back what running the model without a backward has gathered."""


class Replicated(DataParallel):
    """Every process has the whole model."""

    def __init__(self, model: nn.Module, ranks: Ranks) -> None:
        super().__init__(model, ranks)
        self._wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
        # It looks for annotations, which are texts in this file, so that it gets a lambda.
        self._wrapped.register_comm_hook(None, lambda state, bucket: _summed(bucket))

    def __call__(self, batch: Any) -> Any:
        """Runs the model for training."""
        return self._wrapped(batch)

    @contextmanager
    def accumulating(self, is_last: bool) -> Iterator[None]:
        """See ``DataParallel.accumulating``."""
        with nullcontext() if is_last else self._wrapped.no_sync():
            yield


class Sharded(DataParallel):
    """The weights of each block are spread over processes.

    Args:
        model: the plain model, on its device; its parameters become sharded ones.
        ranks: the processes.
        groups: parts of the model that are gathered together, each when it runs.
    """

    in_step = True

    def __init__(self, model: nn.Module, ranks: World, groups: Sequence[nn.Module]) -> None:
        # Loaded here: it takes a second, which a run of one process need not pay.
        from torch.distributed.fsdp import FSDPModule, fully_shard

        super().__init__(model, ranks)
        mesh = ranks.mesh if ranks.layout.replicate > 1 else ranks.mesh["shard"]
        self._parts: list[Any] = []
        for module in (*groups, model):
            fully_shard(module, mesh=mesh)
            assert isinstance(module, FSDPModule)
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            self._parts.append(module)

    @contextmanager
    def accumulating(self, is_last: bool) -> Iterator[None]:
        """See ``DataParallel.accumulating``."""
        root = self._parts[-1]
        root.set_is_last_backward(is_last)
        root.set_requires_gradient_sync(is_last)
        yield

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """See ``DataParallel.gathered``; takes the memory of the whole model."""
        for part in self._parts:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
        try:
            yield
        finally:
            for part in self._parts:
                part.set_reshard_after_forward(part is not self._parts[-1], recurse=False)
            self.settle()

    def settle(self) -> None:
        """Gives back gathered weights, which would go stale with the next optimizer step."""
        for part in self._parts:
            part.reshard()


def apply_data_parallel(
    model: nn.Module, ranks: Ranks, groups: Sequence[nn.Module]
) -> DataParallel:
    """Spreads a model over the processes as their layout says.

    Args:
        model: the plain model, the same on all processes.
        ranks: the processes.
        groups: parts of the model that are gathered together where it is sharded.
    """
    if not isinstance(ranks, World):
        return DataParallel(model, ranks)
    if ranks.layout.shard == 1:
        return Replicated(model, ranks)
    return Sharded(model, ranks, groups)


def _summed(bucket: Any) -> torch.futures.Future[Tensor]:
    """Returns the sum of a bucket of gradients over all processes, to come."""
    work = torch.distributed.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    return work.get_future().then(lambda future: future.value()[0])
