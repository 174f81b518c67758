"""Tensors of which each process may hold only a part: this process's part, or the whole.

A sharded tensor is a ``torch.distributed.tensor.DTensor``. It is told by its methods, because
importing that class takes a second, which a run of one process need not pay.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Returns whether processes hold parts of the tensor."""
    return hasattr(tensor, "full_tensor")


def num_shards(tensor: Any) -> int:
    """Returns how many different parts of the tensor processes hold; 1 for a plain tensor."""
    if not is_sharded(tensor):
        return 1
    mesh = tensor.device_mesh
    axes = [axis for axis, p in enumerate(tensor.placements) if not p.is_replicate()]
    return math.prod(mesh.size(axis) for axis in axes)


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


def as_replicated(tensor: Tensor, mesh: Any) -> Any:
    """Returns a tensor, plain or sharded, as one that all processes of a mesh have as a whole.

    It computes with sharded ones; its gradient is the sum of theirs.
    """
    from torch.distributed.tensor import DTensor, Replicate

    if is_sharded(tensor):
        return tensor.redistribute(placements=[Replicate()] * mesh.ndim)  # pyright: ignore
    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)


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
    from torch.distributed.tensor import DTensor

    mesh, place = like.device_mesh, like.device_mesh.get_coordinate()
    own = source.to(like.device)
    # Strided shards are of what the later axes of the mesh have already split.
    axes = sorted(range(mesh.ndim), key=lambda axis: hasattr(like.placements[axis], "split_factor"))
    for axis in axes:
        if not like.placements[axis].is_replicate():
            own = _chunk(own, mesh.size(axis), place[axis], like.placements[axis].dim)
    return DTensor.from_local(
        own.contiguous(),
        mesh,
        like.placements,
        run_check=False,
        shape=source.shape,
        stride=source.stride(),
    )


def _chunk(x: Tensor, count: int, index: int, dim: int) -> Tensor:
    """Returns one of ``count`` parts as torch cuts them: the last ones may be empty."""
    parts = x.chunk(count, dim)
    return parts[index] if index < len(parts) else x.narrow(dim, 0, 0)
