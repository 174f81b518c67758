"""Measures what the machine in hand computes fastest, in less than a second.

    device, width --products by each library--> FLOP/s --choose_library--> default or onednn
    device, width --products in each type, then a feed-forward with all its casts--> FLOP/s
                                                       --choose_precision--> float32 or bf16

A technique is not assumed to help: a CPU without 16-bit units multiplies bfloat16 matrices about a
hundred times more slowly than float32 ones, and casting to and fro can cost what another one wins.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hasten.core.errors import UsageError
from hasten.core.products import LIBRARIES, use_library, using_library

PRECISIONS: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.bfloat16,
}
"""In which type autocast computes for each; fp8 is for the matrices of blocks alone."""
_FP8_CAPABILITY = (8, 9)
_WORTH_IT = 1.2
"""How much faster something else must be than what needs no reason."""
_FLOP = 1e8
_SECONDS = 0.03
_ROUNDS = 3
_HOPELESS = 0.5  # times as fast: one round is enough
_WIDEST = 1024  # products in a type that the machine lacks take long
_MOST_CHANGE = 0.03
"""Largest relative change of a feed-forward's outputs and gradients; bfloat16 makes 0.005."""


def matrix_rate(dtype: torch.dtype, device: torch.device, hidden_size: int) -> float:
    """Returns the FLOP/s of the products of a feed-forward of this width.

    Args:
        dtype: of both matrices.
        device: where to multiply.
        hidden_size: D of the (N, D) by (D, 4 D) products; N is chosen so that one is short.
    """
    size, rows = _size_and_rows(hidden_size)
    x = torch.ones(rows, size, dtype=dtype, device=device)
    weight = torch.ones(size, 4 * size, dtype=dtype, device=device)
    return 2 * rows * weight.numel() / _least_seconds(lambda: torch.mm(x, weight), device)


class FeedForwardTrial:
    """A feed-forward of a width, forward and backward, casts and activation included.

    Args:
        device: where to compute.
        hidden_size: of the model.
    """

    def __init__(self, device: torch.device, hidden_size: int) -> None:
        self._device = device
        size, self._rows = _size_and_rows(hidden_size)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            up, down = nn.Linear(size, 4 * size), nn.Linear(4 * size, size)
            x = torch.randn(self._rows, size)
        self._up, self._down = up.to(device), down.to(device)
        self._x = x.to(device).requires_grad_()

    def rate(self, precision: str) -> float:
        """Returns FLOP/s in a precision, a key of ``PRECISIONS``."""
        seconds = _least_seconds(lambda: self._run(precision), self._device)
        return 12 * self._rows * self._up.weight.numel() / seconds

    def change(self, precision: str) -> float:
        """Returns by how much a precision changes outputs and gradients, relative, in norm."""
        pairs = zip(self._run(precision), self._run("float32"), strict=True)
        return max(((a - b).norm() / b.norm()).item() for a, b in pairs)

    def _run(self, precision: str) -> list[Tensor]:
        parts = [self._x, *self._up.parameters(), *self._down.parameters()]
        is_low = precision != "float32"
        with torch.autocast(self._device.type, dtype=PRECISIONS[precision], enabled=is_low):
            out = self._down(F.gelu(self._up(self._x)))
        return [out.detach().float(), *torch.autograd.grad(out.float().square().sum(), parts)]


def _size_and_rows(hidden_size: int) -> tuple[int, int]:
    size = min(hidden_size, _WIDEST)
    return size, max(16, min(8192, int(_FLOP / (8 * size**2))))


def _least_seconds(run: Callable[[], object], device: torch.device) -> float:
    """Returns the shortest time: whatever else the machine does only makes one longer."""
    run()  # the first one chooses kernels
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    least, end = math.inf, time.perf_counter() + _SECONDS
    while (start := time.perf_counter()) < end or math.isinf(least):
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        least = min(least, time.perf_counter() - start)
    return least


def choose_library(wanted: str, device: torch.device, hidden_size: int) -> tuple[str, str]:
    """Returns the library that multiplies float32 matrices, which does so from now on, and why.

    Args:
        wanted: auto, or one of ``LIBRARIES``.
        device: where to train.
        hidden_size: of the model.

    Raises:
        UsageError: oneDNN was asked for and cannot multiply float32 exactly here.
    """
    if wanted != "auto":
        if not use_library(wanted):
            raise UsageError(
                f"train.matrix_library {wanted} rounds float32 to 16 bits on this processor, or is "
                "not in this torch; default or auto would fit."
            )
        return wanted, "as asked for"
    if device.type != "cpu":
        return "default", "there is a choice on CPUs only"
    rates = dict.fromkeys(LIBRARIES, 0.0)
    with using_library():
        for library in LIBRARIES * _ROUNDS:  # in turn, as below
            if not use_library(library):
                return "default", "oneDNN does not multiply float32 exactly here"
            rates[library] = max(rates[library], matrix_rate(torch.float32, device, hidden_size))
    factor = rates["onednn"] / rates["default"]
    chosen = "onednn" if factor >= _WORTH_IT else "default"
    use_library(chosen)
    return chosen, f"oneDNN multiplies float32 {_times(factor)} as fast here"


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
    factor = _factor(
        name, lambda precision: matrix_rate(PRECISIONS[precision], device, hidden_size)
    )
    if wanted == "auto":
        if factor < _WORTH_IT:
            return "float32", f"{name} multiplies {_times(factor)} as fast here", None
        trial = FeedForwardTrial(device, hidden_size)
        factor, change = _factor(name, trial.rate), trial.change(name)
        measured = f"{name} computes {_times(factor)} as fast here"
        if not change <= _MOST_CHANGE:
            measured = f"{name} changes what a feed-forward computes by {change:.1%}"
        elif factor >= _WORTH_IT:
            return name, measured, None
        return "float32", measured, None
    slow = None
    if factor < 1:
        slow = (
            f"--precision {wanted}: its matrix products take {1 / factor:,.1f} times as long as "
            "float32's on this machine (measured just now)"
        )
    return wanted, "as asked for", slow


def _factor(precision: str, rate_of: Callable[[str], float]) -> float:
    """Returns how many times as fast as float32 a precision is."""
    rates = {"float32": 0.0, precision: 0.0}
    for _ in range(_ROUNDS):  # in turn, so that a busy moment is not taken for one of them
        for one in rates:
            rates[one] = max(rates[one], rate_of(one))
        if rates[precision] < _HOPELESS * rates["float32"]:
            break
    return rates[precision] / rates["float32"]


def _check_fp8(device: torch.device) -> None:
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < _FP8_CAPABILITY:
        raise UsageError(
            "train.precision fp8 needs a GPU that multiplies 8 bits (of NVIDIA's, from compute "
            "capability 8.9 on); bf16 or auto would fit."
        )


def _times(factor: float) -> str:
    return f"{factor:.1f} times" if factor >= 0.1 else f"{factor:.3f} times"
