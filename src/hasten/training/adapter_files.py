"""Trained adapters in PEFT's format, to be put on the model that they were trained on.

    tensors of a model with adapters --rules of its family--> adapter_config.json
                                                             adapter_model.safetensors

There, a matrix that several of ours lie in gets one adapter for all of them: the parts that draw
down lie on top of each other, and those that draw up on a diagonal. Its rank is the sum of theirs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from hasten.core.errors import UsageError
from hasten.core.files import committed_folder, machine_errors
from hasten.model.adapters import AdapterSettings
from hasten.model.config import TransformerConfig
from hasten.model.pretrained.family import Family, Rule

_PREFIX = "base_model.model."


@dataclass
class _Placed:
    """Tensors by PEFT's names, the rank of each matrix, and modules that were trained whole."""

    tensors: dict[str, Tensor]
    ranks: dict[str, int]
    whole: list[str]
    is_transposed: bool = False


def save_adapter(
    folder: Path,
    config: TransformerConfig,
    tensors: Mapping[str, Tensor],
    settings: AdapterSettings,
    base: str,
    family: Family,
) -> None:
    """Writes the folder in one rename.

    Args:
        folder: to be written.
        config: of the model.
        tensors: whole, by our names, those of adapters beside those that they adapt.
        settings: of the adapters.
        base: folder or hub id of the model that they are put on.
        family: of that model, by whose names its modules are called.

    Raises:
        UsageError: no adapter is on a matrix that has a name there.
        MachineError: it cannot be written.
    """
    placed = _place(family, config, tensors, settings)
    if not placed.ranks:
        raise UsageError("there is no adapter on any matrix that the family names.")
    own = {name: rank for name, rank in placed.ranks.items() if rank != settings.rank}
    content = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "use_dora": settings.kind == "dora",
        "bias": "none",
        "fan_in_fan_out": placed.is_transposed,
        "target_modules": list(placed.ranks),
        "modules_to_save": placed.whole or None,
        "rank_pattern": own,
        "alpha_pattern": {name: settings.scale * rank for name, rank in own.items()},
    }
    with machine_errors("writing the adapter"), committed_folder(folder) as partial:
        named = {f"{_PREFIX}{name}": t.contiguous() for name, t in placed.tensors.items()}
        save_file(named, partial / "adapter_model.safetensors", metadata={"format": "pt"})
        text = json.dumps(content, ensure_ascii=False, indent=2)
        (partial / "adapter_config.json").write_text(text + "\n", encoding="utf-8")


def _place(
    family: Family,
    config: TransformerConfig,
    tensors: Mapping[str, Tensor],
    settings: AdapterSettings,
) -> _Placed:
    trains_head = config.head != "language_modelling"
    placed = _Placed({}, {}, [])
    for one in family.rules(config):
        there = one.other if one.is_outside else f"{family.prefix}{one.other}"
        module, _, last = there.rpartition(".")
        if one.own[0].startswith("head."):
            if trains_head:
                placed.tensors[there] = one.to_other([tensors[name].cpu() for name in one.own])
                placed.whole += [module] * (module not in placed.whole)
            continue
        parts = _parts(one, tensors) if last == "weight" else None
        if parts is not None:
            down, up, magnitude = parts
            placed.tensors[f"{module}.lora_A.weight"] = down
            placed.tensors[f"{module}.lora_B.weight"] = up
            if settings.kind == "dora":
                placed.tensors[f"{module}.lora_magnitude_vector"] = magnitude
            placed.ranks[module] = len(down)
            placed.is_transposed |= one.transposed
    return placed


def _parts(one: Rule, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor] | None:
    """Returns D, U and m of a matrix there; None where none of those that lie in it is adapted."""
    downs: list[Tensor] = []
    ups: list[Tensor] = []
    magnitudes: list[Tensor] = []
    for name in one.own:
        owner, weight = name.rpartition(".")[0], tensors[name].cpu()
        norms = weight.flatten(1).norm(dim=1) if weight.ndim > 1 else weight.abs()
        down: Any = tensors.get(f"{owner}.adapter_down")
        if down is None:
            ups.append(weight.new_zeros(len(weight), 0))
        else:
            downs.append(down.cpu())
            ups.append(tensors[f"{owner}.adapter_up"].cpu())
        # What is not adapted keeps the norms that it has.
        magnitudes.append(tensors.get(f"{owner}.magnitude", norms).cpu())
    if not downs:
        return None
    return torch.cat(downs), torch.block_diag(*ups), torch.cat(magnitudes)
