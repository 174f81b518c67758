"""Processes that share the tokens of one micro-batch: who has which rows, and heads for rows.

    embeddings (N, D) --divide--> own rows (N / (C T), D) --blocks--> --unite--> (N, D) --> head

Tensor parallelism (T processes) gathers rows where it needs all of them. Context parallelism (C
processes) never does: around attention each process trades its rows of all heads for all rows of
some heads (Jacobs et al. 2023, "DeepSpeed Ulysses"), which is exact for packed sequences of any
lengths.

Shapes: N rows of the stream, D hidden size, H heads, K key/value heads, E head size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hasten.core.seeds import derive_seed
from hasten.model.sharing import Role

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def divide_rows(
    model: nn.Module, roles: Mapping[str, Role], context: DeviceMesh, tensor: DeviceMesh
) -> None:
    """Replaces the places where rows are divided and united, and attention between them.

    Args:
        model: the plain model, the same on all processes.
        roles: of its modules, by name.
        context: processes that share rows throughout, one dimension.
        tensor: processes that share rows between matrices, one dimension.
    """
    seed = _Seed()
    for name, role in roles.items():
        parent = model.get_submodule(name.rpartition(".")[0])
        if role is Role.DIVIDE:
            parent.divide = Divide(context, tensor, seed)
        elif role in (Role.UNITE, Role.END):
            parent.unite = _Unite(context, tensor, seed, gathers=role is Role.UNITE)
        elif role is Role.CORE and context.size() > 1:
            parent.core = _HeadExchange(parent.get_submodule("core"), context)


class _Seed:
    """What all processes draw from outside the divided rows."""

    value: int = 0


class Divide(nn.Module):
    """From all rows to this process's own."""

    def __init__(self, context: DeviceMesh, tensor: DeviceMesh, seed: _Seed) -> None:
        super().__init__()
        self._context, self._tensor, self._seed = context, tensor, seed

    def forward(self, x_ND: Tensor) -> Tensor:
        """Maps (N, D) to (N / (C T), D); from here on each process draws numbers of its own."""
        if self.training:
            self.draw_apart()
        if self._context.size() > 1:
            # Gradients of other rows are 0 here: they are summed over processes with the weights'.
            x_ND = x_ND.chunk(self._context.size())[self._context.get_local_rank()]
        return _redistributed(x_ND, self._tensor, gathers=False)

    def draw_apart(self) -> None:
        """Seeds what is drawn for own rows by the seed that all processes have."""
        place = self._context.get_local_rank() * self._tensor.size() + self._tensor.get_local_rank()
        self._seed.value = torch.initial_seed()
        torch.manual_seed(derive_seed("rows", self._seed.value, place))


class _Unite(nn.Module):
    """From own rows to all of them, for what every process computes alike."""

    def __init__(
        self, context: DeviceMesh, tensor: DeviceMesh, seed: _Seed, *, gathers: bool
    ) -> None:
        super().__init__()
        self._context, self._tensor, self._seed, self._gathers = context, tensor, seed, gathers

    def forward(self, x_ND: Tensor) -> Tensor:
        """Maps (N / (C T), D) to (N, D), where rows are gathered; all draw the same numbers."""
        if self.training:
            torch.manual_seed(derive_seed("whole", self._seed.value))
        if not self._gathers:
            return x_ND
        x_ND = _redistributed(x_ND, self._tensor, gathers=True)
        return _redistributed(x_ND, self._context, gathers=True, sums_gradients=True)


def _redistributed(
    x_ND: Tensor, mesh: DeviceMesh, *, gathers: bool, sums_gradients: bool = False
) -> Tensor:
    """Gathers rows, or takes the own of rows that all processes have.

    Args:
        x_ND: rows.
        mesh: the processes.
        gathers: which of the two.
        sums_gradients: whether the gradients that processes have of gathered rows are summands;
            otherwise they are the same.
    """
    if mesh.size() == 1:
        return x_ND
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    given, wanted = (Shard(0), Replicate()) if gathers else (Replicate(), Shard(0))
    rows = DTensor.from_local(x_ND, mesh, [given], run_check=False).redistribute(
        placements=[wanted]
    )
    return rows.to_local(grad_placements=[Partial()] if sums_gradients else None)


class _HeadExchange(nn.Module):
    """Attention whose rows are spread over processes, on all rows of some heads."""

    def __init__(self, core: nn.Module, mesh: DeviceMesh) -> None:
        super().__init__()
        self.core, self._mesh = core, mesh

    def forward(self, q_NHE: Tensor, k_MKE: Tensor, v_MKE: Tensor, *rest: Any) -> Tensor:
        """Maps own rows of queries, keys and values to own rows of the outputs."""
        group, size = self._mesh.get_group(), self._mesh.size()
        # Where there are fewer key/value heads than processes, several have the same.
        times = size // math.gcd(size, k_MKE.shape[1])
        if times > 1:
            k_MKE, v_MKE = (x.repeat_interleave(times, dim=1) for x in (k_MKE, v_MKE))
        spread = [_Exchange.apply(x, group, size, True) for x in (q_NHE, k_MKE, v_MKE)]
        return _Exchange.apply(self.core(*spread, *rest), group, size, False)


class _Exchange(torch.autograd.Function):
    """Own rows of all heads (n, H, E) to all rows of own heads (n C, H / C, E), or back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any, size: int, to_heads: bool) -> Tensor:
        ctx.options = group, size, not to_heads
        if to_heads:
            rows, heads, width = x.shape
            sent = x.reshape(rows, size, heads // size, width).transpose(0, 1).contiguous()
            return _all_to_all(sent, group).view(rows * size, heads // size, width)
        rows, heads, width = x.shape
        sent = x.reshape(size, rows // size, heads, width).contiguous()
        found = _all_to_all(sent, group)
        return found.transpose(0, 1).reshape(rows // size, size * heads, width)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _Exchange.apply(grads[0].contiguous(), *ctx.options), None, None, None


def _all_to_all(x: Tensor, group: Any) -> Tensor:
    """Sends part i of the first dimension to process i; returns what each has sent here."""
    found = torch.empty_like(x)
    torch.distributed.all_to_all_single(found, x, group=group)
    return found
