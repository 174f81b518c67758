"""L1 and L2 penalties on weights, entering the gradient once per optimizer step.

    penalty = l1 * sum |w| + l2 * sum w^2          (no factor 1/2)
    gradient = l1 * sign(w) + 2 * l2 * w           (sign(0) = 0)

The penalty belongs to the objective: it is added to gradients after all micro-batches of a step
have been accumulated, so accumulation does not multiply it, and before clipping. It differs from
decoupled weight decay (see ``optimizers``), which no optimizer statistic ever sees: for plain
gradient descent ``l2`` equals a weight decay of ``2 * l2``, for Adam it does not equal any.

Biases and gains of norms are exempt: pass the first list of ``optimizers.split_parameters``.
"""

# pyright: reportPrivateImportUsage=false
# torch's multi-tensor operations (_foreach_*) have no public name as of torch 2.13.

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from hasten.core.errors import UsageError
from hasten.core.shards import local_part, local_parts


@torch.no_grad()
def add_penalty_gradients_(
    parameters: Iterable[Tensor], *, l1: float = 0.0, l2: float = 0.0
) -> Tensor:
    """Adds the gradient of the penalty to ``.grad`` in place and returns the penalty's value.

    Of sharded weights it does both for this process's parts.

    A parameter without a gradient gets one, as the penalty alone gives it one.

    Args:
        parameters: the penalised weights.
        l1: coefficient of the sum of absolute values.
        l2: coefficient of the sum of squares.

    Returns:
        The penalty, 0-dimensional, float32 (float64 for float64 weights), on the device of the
        first weight. Reading it is the caller's choice: nothing here waits for the device.

    Raises:
        UsageError: a coefficient is negative or not finite.
    """
    for name, value in (("l1", l1), ("l2", l2)):
        if not 0 <= value < math.inf:
            raise UsageError(f"The {name} penalty must be 0 or more, got {value}.")
    penalised = list(parameters)
    if not penalised:
        return torch.zeros(())
    weights = local_parts(penalised)
    value = torch.zeros((), device=weights[0].device, dtype=_value_dtype(weights[0]))
    if not (l1 or l2):
        return value
    for weight in penalised:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
    gradients = [local_part(weight.grad) for weight in penalised if weight.grad is not None]
    if l1:
        torch._foreach_add_(gradients, torch._foreach_sign(weights), alpha=l1)
        value += l1 * _norms(weights, order=1, like=value).sum()
    if l2:
        torch._foreach_add_(gradients, weights, alpha=2 * l2)
        value += l2 * _norms(weights, order=2, like=value).square().sum()
    return value


def _value_dtype(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


def _norms(weights: list[Tensor], *, order: int, like: Tensor) -> Tensor:
    norms = torch._foreach_norm(weights, order, dtype=like.dtype)
    return torch.stack([norm.to(like.device) for norm in norms])
