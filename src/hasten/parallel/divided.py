"""Processes that share the rows of each micro-batch, and the parts of each matrix."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from hasten.core.batch import PackedBatch
from hasten.core.shards import whole
from hasten.data.packing import IGNORED
from hasten.model.heads import TokenOutputs
from hasten.model.transformer import Transformer
from hasten.parallel.data_parallel import DataParallel, LossSum
from hasten.parallel.tensor import settle_gradients
from hasten.parallel.world import World


class DividedRows(DataParallel):
    """A model of which processes have some rows of each activation.

    Args:
        model: already spread.
        ranks: the processes.
        inner: how those with examples of their own share weights.
    """

    def __init__(self, model: Transformer, ranks: World, inner: DataParallel) -> None:
        super().__init__(model, ranks)
        self._inner, self._config = inner, model.config
        self.layout = ranks.layout
        self._context_rank = ranks.rows_mesh["context"].get_local_rank()
        self.row_multiple = model.row_multiple
        self.in_step = inner.in_step
        self.has_loss = ranks.rows_mesh["tensor"].get_local_rank() == 0

    def __call__(self, batch: Any) -> Any:
        """Runs the model for training."""
        return self._inner(batch)

    @contextmanager
    def accumulating(self, is_last: bool) -> Iterator[None]:
        """See ``DataParallel.accumulating``."""
        with self.sharing_loss(), self._inner.accumulating(is_last):
            yield
        if is_last:
            settle_gradients(self.model)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """See ``DataParallel.measuring``."""
        # In inference mode sharded tensors meet operations that torch has not taken apart.
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            self.sharing_loss(),
            self._inner.measuring(),
        ):
            yield

    @contextmanager
    def gathered(self) -> Iterator[nn.Module]:
        """Yields a copy of the model in one piece."""
        with torch.inference_mode(False), torch.no_grad():
            copy = Transformer.from_config(self._config)
            copy.load_state_dict(self.whole_tensors())
            copy.to(next(self.model.parameters()).device).eval()
        yield copy

    def whole_tensors(self) -> dict[str, Tensor]:
        """Returns the model's tensors in one piece, on all processes."""
        return {name: whole(tensor) for name, tensor in self.model.state_dict().items()}

    def own_loss(self, loss_sum: LossSum, outputs: Any, batch: PackedBatch) -> Tensor:
        """Returns this process's summand of the loss; their sum over context is the loss.

        What every process computes alike counts once; scores of tokens are computed once.
        """
        count, rank = self.layout.context, self._context_rank
        if count == 1:
            return loss_sum(outputs, batch)
        if not isinstance(outputs, TokenOutputs):
            return loss_sum(outputs, batch) / count
        assert batch.targets is not None
        others = torch.ones_like(batch.targets, dtype=torch.bool)
        others.tensor_split(count)[rank].fill_(False)
        targets_N = batch.targets.masked_fill(others, IGNORED)
        return loss_sum(outputs, dataclasses.replace(batch, targets=targets_N))

    def sharing_loss(self) -> AbstractContextManager[Any]:
        """Surrounds losses, and their backward, of which each process has some of the vocabulary.

        Returns:
            A context that torch needs for it.
        """
        if self.layout.tensor == 1:
            return nullcontext()
        from torch.distributed.tensor.parallel import loss_parallel

        return loss_parallel()
