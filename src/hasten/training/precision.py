"""Mixed precision: matrix work in 16 bits, everything that adds up in 32.

    float32    nothing changes
    bf16       autocast around forward and loss
    fp16       the same; the loss is scaled so that small gradients do not vanish
    fp8        as bf16, and the matrices of the blocks multiply in 8 bits, each tensor scaled by its
               largest element (Micikevicius et al. 2022, "FP8 Formats for Deep Learning")

Weights, optimizer state, norms, softmax, losses and reductions stay in float32 (Micikevicius et al.
2018, "Mixed Precision Training").
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from hasten.core.errors import MachineError
from hasten.model.transformer import Transformer
from hasten.plan.probe import PRECISIONS

_FIRST_SCALE = 2.0**16
_GROWS_AFTER = 2000
_SMALLEST_SCALE = 1.0
_MULTIPLE = 16  # of rows and columns, in the units that multiply 8 bits


def computing_in(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Returns the context in which forward and loss compute."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=PRECISIONS[precision])


def convert_matrices(model: Transformer, precision: str, *, emulates: bool = False) -> None:
    """Makes the matrices of the blocks multiply in 8 bits, in place, where that is the precision.

    Embeddings and heads keep theirs: scores of few classes are no multiple of 16, and scores of
    tokens lose most by it.

    Args:
        model: plain, before processes share it; its weights keep their names and stay float32.
        precision: of the run.
        emulates: round as 8 bits do, and multiply in float32: for devices without such units.

    Raises:
        MachineError: torchao is missing.
    """
    if precision != "fp8":
        return
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError:
        raise MachineError("train.precision fp8 needs torchao: pip install 'hasten[gpu]'") from None

    def fits(module: nn.Module, name: str) -> bool:
        return (
            isinstance(module, nn.Linear)
            and not module.in_features % _MULTIPLE
            and not module.out_features % _MULTIPLE
        )

    for block in model.blocks:
        convert_to_float8_training(
            block, config=Float8LinearConfig(emulate=emulates), module_filter_fn=fits
        )
    model.row_multiple = math.lcm(model.row_multiple, _MULTIPLE)


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
