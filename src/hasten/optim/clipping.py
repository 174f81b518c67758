"""The global norm of gradients, and clipping by it (Pascanu et al. 2013).

The norm is a tensor: the training loop reads it once a step, to see whether it is finite and to
report it, and nothing here waits for an accelerator before that.
"""

# pyright: reportPrivateImportUsage=false
# torch's multi-tensor operations (_foreach_*) have no public name as of torch 2.13.

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from hasten.core.errors import UsageError
from hasten.core.ranks import ALONE, Ranks
from hasten.core.shards import is_sharded, local_part, num_shards


@torch.no_grad()
def gradient_norm(parameters: Iterable[Tensor], ranks: Ranks = ALONE) -> Tensor:
    """Returns the 2-norm of all gradients taken as one vector, 0-dimensional; 0 if there are none.

    It is not finite exactly when a gradient is not, overflow of a square aside. Where gradients
    are sharded it is that of all shards, and all processes must ask at once.

    Args:
        parameters: all those of this process, or of its stage of a pipeline.
        ranks: the processes among which some of them may be sharded.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if ranks.stage_size == ranks.size and not any(map(is_sharded, gradients)):
        return torch.nn.utils.get_total_norm(gradients)
    by_copies: dict[int, list[Tensor]] = {}
    for gradient in gradients:
        # How many processes have the same part, each of which brings its share of the square.
        copies = ranks.stage_size // num_shards(gradient)
        by_copies.setdefault(copies, []).append(local_part(gradient))
    squares = [
        torch.nn.utils.get_total_norm(some).square() / copies for copies, some in by_copies.items()
    ]
    own = torch.stack(squares).sum() if squares else torch.zeros(())
    return ranks.sum(own).sqrt()


@torch.no_grad()
def scale_gradients_(parameters: Iterable[Tensor], scale: float | Tensor) -> None:
    """Multiplies every gradient by ``scale`` in place (a number or a 0-dimensional tensor)."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            gradient = local_part(parameter.grad)
            by_device.setdefault(gradient.device, []).append(gradient)
    for device, gradients in by_device.items():
        factor = scale.to(device) if isinstance(scale, Tensor) else scale
        torch._foreach_mul_(gradients, factor)


@torch.no_grad()
def clip_gradients_(parameters: Iterable[Tensor], *, max_norm: float, norm: Tensor) -> None:
    """Scales gradients by ``max_norm / (norm + 1e-6)`` where that is below 1, in place.

    Together with ``gradient_norm`` the same as ``torch.nn.utils.clip_grad_norm_``, bit for bit.

    Args:
        parameters: those that ``norm`` was taken of.
        max_norm: the largest norm allowed, greater than 0.
        norm: from ``gradient_norm``; finite, which the caller has checked.

    Raises:
        UsageError: ``max_norm`` is not a positive number.
    """
    if not 0 < max_norm < math.inf:
        raise UsageError(f"The norm to clip gradients at must be greater than 0, got {max_norm}.")
    scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    # On the CPU reading the scale costs nothing, and multiplying by 1 a pass over all gradients.
    if scale.device.type == "cpu" and scale.item() == 1.0:
        return
    scale_gradients_(parameters, scale)
