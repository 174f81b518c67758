"""An exponential moving average of the weights (Polyak & Juditsky 1992), for evaluation and export.

    update:   average <- average + (1 - d) * (weight - average),   d = min(decay, (1 + t)/(10 + t))

with ``t`` the updates already made: the rising decay (as in TensorFlow's
``ExponentialMovingAverage`` with ``num_updates``) lets early averages forget the initialisation.
"""

# pyright: reportPrivateImportUsage=false
# torch's multi-tensor operations (_foreach_*) have no public name as of torch 2.13.

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hasten.core.errors import DamagedError, UsageError
from hasten.core.shards import copy_whole_, local_parts


class WeightAverage:
    """Keeps the average of a model's weights beside them.

    It starts as a copy of the weights, holds one tensor for each, of the same shape, type and
    device, and never replaces the model's own storage.

    Args:
        named_parameters: as from ``module.named_parameters()``; frozen ones are skipped.
        decay: the weight of the past once warmed up, in [0, 1).

    Raises:
        UsageError: ``decay`` is out of range, or a weight has under 32 bits, where small
            differences would be rounded away.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, nn.Parameter]], *, decay: float):
        if not 0 <= decay < 1:
            raise UsageError(f"The decay of the weight average must be in [0, 1), got {decay}.")
        self._weights = {name: p for name, p in named_parameters if p.requires_grad}
        for name, weight in self._weights.items():
            if weight.element_size() < 4:
                raise UsageError(
                    f"Weights are averaged in float32 or float64; '{name}' is {weight.dtype}."
                )
        self.decay = decay
        self._num_updates = 0
        self._is_swapped = False
        with torch.no_grad():
            self._averages = {name: weight.clone() for name, weight in self._weights.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Moves the averages toward the weights; call it after every optimizer step taken."""
        assert not self._is_swapped, "the weights hold the averages"
        step = self._num_updates
        decay = min(self.decay, (1 + step) / (10 + step))
        if self._averages:
            averages = local_parts(self._averages.values())
            torch._foreach_lerp_(averages, local_parts(self._weights.values()), 1 - decay)
        self._num_updates += 1

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Puts the averages into the model for a ``with`` block, then the weights back, exactly.

        Values are exchanged in place, one tensor at a time: the model keeps its storage, and no
        second copy of it is made.
        """
        assert not self._is_swapped, "already swapped"
        self._exchange()
        self._is_swapped = True
        try:
            yield
        finally:
            self._exchange()
            self._is_swapped = False

    def tensors(self) -> dict[str, Tensor]:
        """Returns the averages by parameter name: live ones, so write or copy them at once."""
        assert not self._is_swapped, "the averages are in the model"
        return dict(self._averages)

    def scalars(self) -> dict[str, Any]:
        """Returns the rest of the state, as JSON scalars."""
        return {"num_updates": self._num_updates, "decay": self.decay}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
        """Continues from ``tensors`` and ``scalars`` of an earlier average, copying the values.

        Raises:
            DamagedError: names or shapes differ from this model's, or a scalar is missing.
        """
        assert not self._is_swapped, "the averages are in the model"
        if set(tensors) != set(self._averages) or not {"num_updates", "decay"} <= set(scalars):
            differing = sorted(set(tensors) ^ set(self._averages)) or ["its scalars"]
            raise DamagedError(
                f"The saved weight average is not of this model: {differing[0]} differs."
            )
        for name, average in self._averages.items():
            if tensors[name].shape != average.shape:
                raise DamagedError(
                    f"The saved weight average of '{name}' has shape {tuple(tensors[name].shape)}, "
                    f"this model's {tuple(average.shape)}."
                )
        for name, average in self._averages.items():
            copy_whole_(average, tensors[name])
        self._num_updates, self.decay = scalars["num_updates"], scalars["decay"]

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, weight in self._weights.items():
            held = weight.clone()
            weight.copy_(self._averages[name])
            self._averages[name].copy_(held)
