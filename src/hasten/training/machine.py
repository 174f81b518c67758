"""The machine a run computes on: device, threads, and how memory is handed back."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from typing import Any

import torch

from hasten.core.errors import MachineError, UsageError, nearest

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # mallopt(3)
_KEEP_BYTES, _RETURN_BYTES = 1 << 30, 1 << 20
_DEVICES = ("auto", "cpu", "cuda")


def choose_allocation(*, saves_memory: bool = False) -> bool:
    """Tells glibc whether to keep large freed blocks or to return them to the kernel.

    A training step frees and allocates the same large blocks; handing them back costs a page
    fault for every 4 KiB, a quarter of a step or more. Where weights are gathered and given back
    block by block, keeping them costs several times the memory that sharding has saved. Linux with
    glibc only; elsewhere this does nothing.

    Args:
        saves_memory: whether blocks are returned.

    Returns:
        Whether it took effect.
    """
    if not sys.platform.startswith("linux") or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    threshold = _RETURN_BYTES if saves_memory else _KEEP_BYTES
    return bool(
        libc.mallopt(_M_MMAP_THRESHOLD, threshold) and libc.mallopt(_M_TRIM_THRESHOLD, threshold)
    )


def choose_device(wanted: str) -> tuple[torch.device, str]:
    """Returns the device to compute on and the reason.

    Raises:
        MachineError: a CUDA device was asked for and there is none.
        UsageError: an unknown kind of device.
    """
    if wanted not in _DEVICES:
        raise UsageError(
            f"--device {wanted}: there are {', '.join(_DEVICES)}.{nearest(wanted, _DEVICES)}"
        )
    if wanted == "cuda" and not torch.cuda.is_available():
        raise MachineError(
            "--device cuda: this PyTorch sees no CUDA device; use --device cpu, or install the "
            "CUDA build (see the README)."
        )
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu"), "as asked for" if wanted == "cpu" else "there is no CUDA device"
    return torch.device("cuda", torch.cuda.current_device()), torch.cuda.get_device_name()


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Returns what a reader needs to judge a run's figures, as JSON values."""
    from_cuda = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "processor": _processor(),
        "num_cores": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "device": str(device),
        "cuda_device": from_cuda,
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
