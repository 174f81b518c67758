"""Adapters: small matrices beside frozen ones, which alone are trained, and merging them.

    LoRA    y = W x + b + s U D x                                        (Hu et al. 2021)
    DoRA    y = g (W + s U D) x + b,   g = m / |W + s U D| by rows       (Liu et al. 2024)

    Transformer --add_adapters--> the same, its matrices Adapted, all else but the head frozen
    tensors of it --merge_adapters--> tensors of the plain model, whose outputs are equal

Shapes: D (r, in) draws down to the rank r, U (out, r) up; s = alpha / r; m (out,) magnitudes. U
begins at zero and m at the norms of W's rows, so that the model begins as it was. Of g only m gets
gradients: the norm below it counts as a constant (section 4.3 there).

Names: beside ``query.weight`` there are ``query.adapter_down``, ``.adapter_up`` and, of DoRA,
``.magnitude``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hasten.core.errors import UsageError, nearest
from hasten.model.freezing import always_trained, freeze
from hasten.model.layers import drop_elements
from hasten.model.transformer import Transformer

ADAPTER_PARTS = ("adapter_down", "adapter_up", "magnitude")
PARTS = ("query", "key", "value", "output", "up", "gate", "down")
"""The matrices of blocks; not every model has a gate."""


@dataclass(frozen=True)
class AdapterSettings:
    """What adapters are like.

    Attributes:
        kind: lora or dora.
        rank: r.
        alpha: r times the factor s.
        dropout: rate on what goes into D.
        targets: matrices that get one: the last parts of their names, such as ``query``, or
            patterns of whole names.
    """

    kind: Literal["lora", "dora"]
    rank: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[str, ...] = PARTS

    @property
    def scale(self) -> float:
        """The factor s."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class TrainedPart:
    """Which of a model's weights are trained: all, unless it says otherwise.

    Attributes:
        frozen: patterns of names, see ``freeze``.
        adapter: what matrices get beside them; None for nothing.
    """

    frozen: tuple[str, ...] = ()
    adapter: AdapterSettings | None = None

    def apply(self, model: Transformer) -> None:
        """Adds adapters and freezes what is not trained, in place.

        Raises:
            UsageError: see ``add_adapters`` and ``freeze``.
        """
        if self.adapter is not None:
            add_adapters(model, self.adapter)
        freeze(model, self.frozen)


WHOLE = TrainedPart()


class AdaptedLinear(nn.Linear):
    """A linear layer with an adapter.

    Args:
        base: whose weights it takes over, frozen.
        settings: of the adapter.
    """

    def __init__(self, base: nn.Linear, settings: AdapterSettings) -> None:
        # Allocates nothing of its own.
        has_bias = base.bias is not None
        super().__init__(base.in_features, base.out_features, bias=has_bias, device="meta")
        self.weight, self.bias = base.weight, base.bias
        for parameter in base.parameters():
            parameter.requires_grad_(False)
        self.scale, self.dropout = settings.scale, settings.dropout
        new = base.weight.new_empty
        self.adapter_down = nn.Parameter(new(settings.rank, base.in_features))
        self.adapter_up = nn.Parameter(new(base.out_features, settings.rank))
        is_dora = settings.kind == "dora"
        self.magnitude = nn.Parameter(new(base.out_features)) if is_dora else None
        self.reset_adapter()

    @torch.no_grad()
    def reset_adapter(self) -> None:
        """Draws D as a linear layer is drawn, and begins where the frozen weights are."""
        nn.init.kaiming_uniform_(self.adapter_down, a=math.sqrt(5))
        nn.init.zeros_(self.adapter_up)
        if self.magnitude is not None:
            self.magnitude.copy_(self.weight.norm(dim=1))

    def forward(self, input: Tensor) -> Tensor:
        """Maps (..., in) to (..., out)."""
        drops = self.training and self.dropout > 0
        seen = drop_elements(input, self.dropout) if drops else input
        learned = F.linear(F.linear(seen, self.adapter_down), self.adapter_up) * self.scale
        if self.magnitude is None:
            return F.linear(input, self.weight, self.bias) + learned
        gain = self.magnitude / _row_norms(
            self.weight, self.adapter_down, self.adapter_up, self.scale
        )
        plain = F.linear(input, self.weight)
        # The direction of the weights is learned on what dropout leaves, the rest on all.
        turned = F.linear(seen, self.weight) if drops else plain
        out = plain + (gain - 1) * turned + gain * learned
        return out if self.bias is None else out + self.bias


def add_adapters(model: Transformer, settings: AdapterSettings) -> None:
    """Gives matrices of the blocks adapters, in place; freezes all else but a new head.

    Args:
        model: plain, with its pretrained weights.
        settings: of the adapters.

    Raises:
        UsageError: a target that names no matrix of the blocks, or targets of which none does.
    """
    matrices = _matrices(model)
    named = {
        target: [name for name in matrices if _is_target(name, target)]
        for target in settings.targets
    }
    for target, names in named.items():
        if not names and target not in PARTS:
            known = sorted({name.rpartition(".")[2] for name in matrices})
            raise UsageError(
                f"finetune.targets: '{target}' names no matrix of the blocks; there are "
                f"{', '.join(known)}.{nearest(target, known)}"
            )
    wanted = {name for names in named.values() for name in names}
    if not wanted:
        raise UsageError("finetune.targets names no matrix of the blocks.")
    kept = always_trained(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in kept)
    for name in (name for name in matrices if name in wanted):  # in the order of the model
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, AdaptedLinear(matrices[name], settings))


@torch.no_grad()
def merge_adapters(tensors: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Returns the tensors of the plain model that computes the same.

    Args:
        tensors: whole, of a model with adapters or without.
        scale: of the adapters.
    """
    merged = {n: t for n, t in tensors.items() if n.rpartition(".")[2] not in ADAPTER_PARTS}
    for name in merged:
        parent, _, last = name.rpartition(".")
        parts = (tensors.get(f"{parent}.{part}") for part in ADAPTER_PARTS)
        down, up, magnitude = parts
        if last != "weight" or down is None or up is None:
            continue
        weight = merged[name]
        changed = weight.double() + scale * (up.double() @ down.double())
        if magnitude is not None:
            changed *= (magnitude.double() / changed.norm(dim=1))[:, None]
        merged[name] = changed.to(weight.dtype)
    return merged


def _row_norms(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """Returns (out,) the norms of the rows of ``weight + scale * up @ down``, as constants."""
    with torch.no_grad():
        return torch.addmm(weight, up, down, alpha=scale).norm(dim=1)


def _matrices(model: Transformer) -> dict[str, nn.Linear]:
    """Returns the linear layers of the blocks by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".blocks." in name
    }


def _is_target(name: str, target: str) -> bool:
    return any(fnmatchcase(one, target) for one in (name, name.rpartition(".")[2]))
