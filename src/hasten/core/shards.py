"""Tensors of which each process may hold only a part: this process's part, or the whole.

A sharded tensor is a ``torch.distributed.tensor.DTensor``. It is told by its methods, because
importing that class takes a second, which a run of one process need not pay.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Returns whether processes hold parts of the tensor."""
    return hasattr(tensor, "full_tensor")


def local_part(tensor: Tensor) -> Tensor:
    """Returns what this process holds, sharing its memory; a plain tensor is returned as it is."""
    with torch.no_grad():
        return tensor.to_local() if is_sharded(tensor) else tensor  # pyright: ignore


def local_parts(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Returns ``local_part`` of each."""
    return [local_part(tensor) for tensor in tensors]


def whole(tensor: Tensor) -> Tensor:
    """Returns the whole tensor; where it is sharded, all its processes must ask at once."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # pyright: ignore


@torch.no_grad()
def copy_whole_(target: Tensor, source: Tensor) -> None:
    """Copies a whole tensor, or one sharded as the target is, into the target; nothing is sent."""
    local_part(target).copy_(local_part(placed_like(source, target)))


@torch.no_grad()
def placed_like(source: Tensor, like: Any) -> Tensor:
    """Returns a whole tensor, which all processes have, sharded as ``like`` is; nothing is sent.

    Where ``like`` is not sharded, or ``source`` is already, it is returned as it is.
    """
    if is_sharded(source) or not is_sharded(like):
        return source
    # Loaded only here: a sharded tensor is there, so the module is too.
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh
    everywhere = DTensor.from_local(
        source.to(like.device), mesh, [Replicate()] * mesh.ndim, run_check=False
    )
    return everywhere.redistribute(placements=like.placements)
