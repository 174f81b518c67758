"""Measures what the machine in hand computes fastest, in a fraction of a second.

    device, width --matrix products in each type--> FLOP/s --choose_precision--> float32 or bf16

A technique is not assumed to help: a CPU without 16-bit units multiplies bfloat16 matrices about a
hundred times more slowly than float32 ones.
"""

from __future__ import annotations

import math
import time

import torch

from hasten.core.errors import UsageError

PRECISIONS: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.bfloat16,
}
"""In which type autocast computes for each; fp8 is for the matrices of blocks alone."""
_FP8_CAPABILITY = (8, 9)
_WORTH_IT = 1.2
"""How much faster 16 bits must be: casting to and fro costs some of it."""
_FLOP = 1e8
_SECONDS = 0.03
_ROUNDS = 3


def matrix_rate(dtype: torch.dtype, device: torch.device, hidden_size: int) -> float:
    """Returns the FLOP/s of the products of a feed-forward of this width.

    Args:
        dtype: of both matrices.
        device: where to multiply.
        hidden_size: D of the (N, D) by (D, 4 D) products; N is chosen so that one is short.
    """
    inner = 4 * hidden_size
    rows = max(16, min(8192, int(_FLOP / (2 * hidden_size * inner))))
    x = torch.ones(rows, hidden_size, dtype=dtype, device=device)
    weight = torch.ones(hidden_size, inner, dtype=dtype, device=device)
    torch.mm(x, weight)  # the first one chooses a kernel
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    least, end = math.inf, time.perf_counter() + _SECONDS
    while (start := time.perf_counter()) < end or math.isinf(least):
        torch.mm(x, weight)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        # The shortest: whatever else the machine does only makes a product longer.
        least = min(least, time.perf_counter() - start)
    return 2 * rows * hidden_size * inner / least


def choose_precision(
    wanted: str, device: torch.device, hidden_size: int
) -> tuple[str, str, str | None]:
    """Returns the precision to train in, the reason, and a warning where it is a slow one.

    Args:
        wanted: auto, or a key of ``PRECISIONS``.
        device: where to train.
        hidden_size: of the model.

    Raises:
        UsageError: fp8 where no unit multiplies 8 bits.
    """
    if wanted == "fp8":
        _check_fp8(device)
    if wanted in ("float32", "fp8"):
        return wanted, "as asked for", None
    name = "bf16" if wanted == "auto" else wanted
    rates = {"float32": 0.0, name: 0.0}
    for precision in [*rates] * _ROUNDS:  # in turn, so that a busy moment is not taken for one
        rate = matrix_rate(PRECISIONS[precision], device, hidden_size)
        rates[precision] = max(rates[precision], rate)
    factor = rates[name] / rates["float32"]
    measured = f"{name} multiplies {_times(factor)} as fast here"
    if wanted == "auto":
        return ("bf16" if factor >= _WORTH_IT else "float32"), measured, None
    slow = None
    if factor < 1:
        slow = (
            f"--precision {wanted}: its matrix products take {1 / factor:,.1f} times as long as "
            "float32's on this machine (measured just now)"
        )
    return wanted, "as asked for", slow


def _check_fp8(device: torch.device) -> None:
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < _FP8_CAPABILITY:
        raise UsageError(
            "train.precision fp8 needs a GPU that multiplies 8 bits (of NVIDIA's, from compute "
            "capability 8.9 on); bf16 or auto would fit."
        )


def _times(factor: float) -> str:
    return f"{factor:.1f} times" if factor >= 0.1 else f"{factor:.3f} times"
