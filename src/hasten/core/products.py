"""Which library multiplies float32 matrices on a CPU: torch's own choice, or oneDNN.

    default   what torch takes by itself: MKL, where it was built with it
    onednn    what torch takes for 16 bits; it has kernels for whatever the processor can do

MKL runs its kernels of AVX2 on processors that are not Intel's, also those with AVX-512: there
oneDNN is more than twice as fast, and no less exact. torch hands float32 products to it only where
they may be rounded to bfloat16, which oneDNN makes use of on processors that multiply tiles of 16
bits (AMX), and on no other. So that a float32 product stays one, it is tried before it is used.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

LIBRARIES = ("default", "onednn")
_MAY_ROUND, _BY_ITSELF = "bf16", "none"
_SIZE = 256
_LARGEST_ERROR = 1e-5  # of a product, relative; float32 makes 1e-6 at this size, bfloat16 1e-3


def current_library() -> str:
    """Returns which of ``LIBRARIES`` multiplies float32 matrices on the CPU now."""
    settings = _settings()
    uses = settings is not None and settings.fp32_precision == _MAY_ROUND
    return LIBRARIES[uses]


def use_library(name: str) -> bool:
    """Makes a library multiply float32 matrices on the CPU, for the whole process.

    Args:
        name: one of ``LIBRARIES``.

    Returns:
        Whether it does; otherwise torch chooses. oneDNN may be missing, or round to 16 bits.
    """
    assert name in LIBRARIES, name
    settings = _settings()
    if settings is None:
        return name == "default"
    if name == "onednn" and not _onednn_is_exact():
        name, done = "default", False
    else:
        done = True
    settings.fp32_precision = _MAY_ROUND if name == "onednn" else _BY_ITSELF
    return done


@contextmanager
def using_library(name: str | None = None) -> Iterator[None]:
    """Puts the library back that multiplied before; until then ``name`` does, where it can."""
    before = current_library()
    try:
        if name is not None:
            use_library(name)
        yield
    finally:
        use_library(before)


def _settings() -> Any:
    """Returns where torch keeps what oneDNN may do; None where it has no such place."""
    if not torch.backends.mkldnn.is_available():
        return None
    settings = getattr(torch.backends.mkldnn, "matmul", None)
    return settings if hasattr(settings, "fp32_precision") else None


@functools.cache
def _onednn_is_exact() -> bool:
    """Tries one product of numbers that bfloat16 cannot hold."""
    settings = _settings()
    a = torch.randn(_SIZE, _SIZE, generator=torch.Generator().manual_seed(0))
    exact = a.double() @ a.double()
    before = settings.fp32_precision
    settings.fp32_precision = _MAY_ROUND
    try:
        error = (a @ a - exact).abs().max() / exact.abs().max()
    finally:
        settings.fp32_precision = before
    return bool(error < _LARGEST_ERROR)
