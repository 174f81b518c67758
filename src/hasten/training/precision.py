"""Mixed precision: matrix work in 16 bits, everything that adds up in 32.

    float32    nothing changes
    bf16       autocast around forward and loss
    fp16       the same; the loss is scaled so that small gradients do not vanish

Weights, optimizer state, norms, softmax, losses and reductions stay in float32 (Micikevicius et al.
2018, "Mixed Precision Training").
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from hasten.plan.probe import PRECISIONS

_FIRST_SCALE = 2.0**16
_GROWS_AFTER = 2000
_SMALLEST_SCALE = 1.0


def computing_in(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Returns the context in which forward and loss compute."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=PRECISIONS[precision])


def first_loss_scale(precision: str) -> float:
    """Returns the factor of the loss in the first step; 1 where none is needed."""
    return _FIRST_SCALE if precision == "fp16" else 1.0


def next_loss_scale(scale: float, good_steps: int, is_finite: bool) -> tuple[float, int]:
    """Returns the factor of the next step and the finite steps since it last changed.

    It is halved when a gradient overflows, which skips the step, and doubled after 2,000 steps
    without overflow.

    Args:
        scale: of this step.
        good_steps: finite steps since it last changed, before this one.
        is_finite: whether this step was.
    """
    if not is_finite:
        return max(_SMALLEST_SCALE, scale / 2), 0
    if good_steps + 1 == _GROWS_AFTER:
        return scale * 2, 0
    return scale, good_steps + 1
