"""A model whose batches are shared among processes: whole copies, or weights in shards.

    replicate   DistributedDataParallel: gradients are summed while backward goes on
    shard       FSDP2 (fully_shard): weights are gathered block by block, gradients scattered
    both        groups of shards, each group with the whole model

Gradients are summed, never averaged: the loss is already divided by what all processes count.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hasten.core.batch import PackedBatch
from hasten.core.ranks import Ranks

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Computing = Callable[[], AbstractContextManager[Any]]
LossSum = Callable[[Any, PackedBatch], Tensor]


class DataParallel:
    """How one process computes its share; this class is the way of a process that is alone.

    Args:
        model: the plain model.
        ranks: the processes that share each batch.

    Attributes:
        in_step: whether all processes have to run the model equally often.
        has_loss: whether this process's loss is a summand of the batch's.
        row_multiple: of which the rows of a micro-batch are made a multiple.
        computing: surrounds the forward of each micro-batch and its loss.
    """

    in_step = False
    has_loss = True
    row_multiple = 1
    computing: Computing = nullcontext

    def __init__(self, model: nn.Module, ranks: Ranks) -> None:
        self.model, self.ranks = model, ranks

    def __call__(self, batch: Any) -> Any:
        """Runs the model for training."""
        return self.model(batch)

    def train_on(
        self,
        batches: Sequence[PackedBatch],
        loss: Callable[[int, Any], Tensor],
        before_each: Callable[[int, int], None],
    ) -> Tensor:
        """Runs forward and backward of all micro-batches of a step.

        Args:
            batches: the micro-batches of this process.
            loss: maps the number of a micro-batch and its outputs to a scalar.
            before_each: is told the numbers of micro-batch and stage before each forward.

        Returns:
            The sum of losses, without a gradient.
        """
        total = torch.zeros((), device=batches[0].token_ids.device)
        for number, batch in enumerate(batches):
            before_each(number, 0)
            with self.accumulating(is_last=number == len(batches) - 1):
                with self.computing():
                    one = loss(number, self(batch))
                one.backward()
            total = total + one.detach()
        return total

    def measure_on(
        self,
        batches: Iterable[PackedBatch],
        use: Callable[[Any, PackedBatch], Any],
        spare: Callable[[], PackedBatch] | None = None,
    ) -> None:
        """Runs the model on batches without gradients.

        Args:
            batches: of this process.
            use: takes outputs and the batch they are of.
            spare: makes a batch that counts for nothing, where other processes run one more.
        """
        with self.measuring():
            for batch in batches:
                use(self.model(batch), batch)
            if self.in_step and spare is not None:
                self.model(spare())  # the others cannot do without

    def filled(self, batches: Sequence[PackedBatch]) -> list[PackedBatch]:
        """Returns the micro-batches of a step as they pass through the model, with filler."""
        return [batch.filled(self.row_multiple) for batch in batches]

    def counted_parameters(self) -> list[nn.Parameter]:
        """Returns the parameters that this process, or its stage, counts among all."""
        return list(self.model.parameters())

    @contextmanager
    def accumulating(self, is_last: bool) -> Iterator[None]:
        """Surrounds the forward and backward of one micro-batch of a step.

        Args:
            is_last: whether gradients are summed over all processes in it.
        """
        del is_last
        yield

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Surrounds forwards without a backward."""
        yield

    @contextmanager
    def gathered(self) -> Iterator[nn.Module]:
        """Yields the whole model for each process to use as it likes, without gradients."""
        yield self.model

    def own_loss(self, loss_sum: LossSum, outputs: Any, batch: PackedBatch) -> Tensor:
        """Returns this process's summand of the loss of a micro-batch."""
        return loss_sum(outputs, batch)


class Replicated(DataParallel):
    """Every process has the whole model.

    Args:
        model: the plain model, on its device.
        ranks: the processes.
    """

    def __init__(self, model: nn.Module, ranks: Ranks) -> None:
        super().__init__(model, ranks)
        with warnings.catch_warnings():
            # torch 2.13 has a new name for it, which 2.11 does not know.
            warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)
            self._wrapped = DistributedDataParallel(
                model, gradient_as_bucket_view=True, broadcast_buffers=False
            )
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
        mesh: those of them that share weights, one dimension; with a first one before it, groups
            of those, each with all weights.
        groups: parts of the model that are gathered together, each when it runs.
    """

    in_step = True

    def __init__(
        self, model: nn.Module, ranks: Ranks, mesh: DeviceMesh, groups: Sequence[nn.Module]
    ) -> None:
        super().__init__(model, ranks)
        self._parts: list[Any] = shard(mesh, [*groups, model])

    @contextmanager
    def accumulating(self, is_last: bool) -> Iterator[None]:
        """See ``DataParallel.accumulating``."""
        root = self._parts[-1]
        root.set_is_last_backward(is_last)
        root.set_requires_gradient_sync(is_last)
        yield

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """See ``DataParallel.measuring``; gathered weights would go stale with the next step."""
        try:
            yield
        finally:
            for part in self._parts:
                part.reshard()

    @contextmanager
    def gathered(self) -> Iterator[nn.Module]:
        """See ``DataParallel.gathered``; takes the memory of the whole model."""
        for part in self._parts:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
        try:
            with self.measuring():
                yield self.model
        finally:
            for part in self._parts:
                part.set_reshard_after_forward(part is not self._parts[-1], recurse=False)


def shard(mesh: DeviceMesh, modules: Sequence[nn.Module], *, reshard: bool | None = None) -> Any:
    """Shards the weights of modules in place; returns them.

    Args:
        mesh: as for ``Sharded``.
        modules: each is gathered as one; what one has of an earlier one is that one's.
        reshard: whether weights are given back after forward; None for all modules but the last.
    """
    # Loaded here: it takes a second, which a run of one process need not pay.
    from torch.distributed.fsdp import FSDPModule, fully_shard

    for module in modules:
        fully_shard(module, mesh=mesh, reshard_after_forward=reshard)
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    return list(modules)


def _summed(bucket: Any) -> torch.futures.Future[Tensor]:
    """Returns the sum of a bucket of gradients over all processes, to come."""
    work = torch.distributed.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    return work.get_future().then(lambda future: future.value()[0])
