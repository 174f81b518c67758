"""An optimizer's state as named tensors and JSON scalars, and back, exactly.

    optimizer -> {"exp_avg/blocks.0.attention.qkv.weight": Tensor, ...}, {"groups": [...], ...}
    tensors, scalars -> COPIED into tensors of the new optimizer's own

Continuing from a loaded state is bit-identical to never having stopped. torch's own
``load_state_dict`` is not used, because it casts everything but ``step`` to the type of the weight
(NAdam's ``mu_product`` would change value) and keeps the loaded tensors, whose memory may be
aligned differently.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hasten.core.errors import DamagedError
from hasten.core.shards import copy_whole_

# Numbers that torch keeps in 0-dimensional tensors, on the host unless the step is fused.
_NUMBERS = frozenset({"step", "mu_product"})
# How a step is computed, chosen for the machine in hand, and what is not a setting.
_NOT_SAVED = frozenset(
    {"params", "param_names", "foreach", "fused", "capturable", "differentiable", "maximize"}
)


def flatten_optimizer_state(
    optimizer: torch.optim.Optimizer,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns an optimizer's state as tensors by name and a JSON-able dict.

    Args:
        optimizer: one whose groups carry names, as those of ``build_optimizer`` do.

    Returns:
        Tensors named ``KEY/PARAMETER`` (``exp_avg/head.weight``), sorted: live ones, so
        write or copy them before the next step. Scalars: the class, the number of tensors, and
        for each group its parameters' names and settings (learning rate, betas ...).
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in _named(optimizer).items():
        for key, value in optimizer.state.get(parameter, {}).items():
            assert isinstance(value, Tensor), f"{key} of {name} is not a tensor"
            tensors[f"{key}/{name}"] = value.detach()
    groups = [
        {"parameters": sorted(group["param_names"]), "settings": _settings(group)}
        for group in optimizer.param_groups
    ]
    scalars = {
        "optimizer": type(optimizer).__name__,
        "num_tensors": len(tensors),
        "groups": groups,
    }
    return dict(sorted(tensors.items())), scalars


@torch.no_grad()
def load_optimizer_state(
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, Tensor],
    scalars: Mapping[str, Any],
    *,
    fill: Callable[[Mapping[str, Tensor]], None] | None = None,
) -> None:
    """Copies a flattened state into an optimizer built the same way, replacing what it held.

    Settings of the groups (learning rate, betas ...) become the saved ones; whether the step is
    fused remains this machine's choice. On an error the optimizer is as it was.

    Args:
        optimizer: newly built, over parameters of the same names and shapes.
        tensors: from ``flatten_optimizer_state``, on any device; not kept. With ``fill`` only
            their shapes and types count.
        scalars: from ``flatten_optimizer_state``, possibly through JSON.
        fill: puts the values into the optimizer's tensors, given by name, of which this process
            may have only parts; None to copy those of ``tensors``.

    Raises:
        DamagedError: the state is of another optimizer or another model, or is incomplete.
    """
    _check_scalars(optimizer, tensors, scalars)
    named = _named(optimizer)
    on_device = {
        name: bool(group.get("fused") or group.get("capturable"))
        for group in optimizer.param_groups
        for name in group["param_names"]
    }
    loaded: dict[str, dict[str, Tensor]] = {}
    targets: dict[str, Tensor] = {}
    for full_name, saved in tensors.items():
        key, _, name = full_name.partition("/")
        if name not in named:
            raise DamagedError(f"The saved optimizer state '{full_name}' fits no parameter.")
        fresh = _empty_state(key, named[name], saved, number_on_device=on_device[name])
        if fresh.shape != saved.shape:
            raise DamagedError(
                f"The saved optimizer state '{full_name}' has shape {tuple(saved.shape)}, "
                f"expected {tuple(fresh.shape)}."
            )
        loaded.setdefault(name, {})[key] = targets[full_name] = fresh
    if fill is not None:
        fill(targets)
    else:
        for full_name, fresh in targets.items():
            copy_whole_(fresh, tensors[full_name])
    for name, parameter in named.items():
        optimizer.state.pop(parameter, None)
        if name in loaded:
            optimizer.state[parameter] = loaded[name]
    for group, saved_group in zip(optimizer.param_groups, scalars["groups"], strict=True):
        for key, value in saved_group["settings"].items():
            group[key] = tuple(value) if isinstance(value, list) else value


def merge_optimizer_scalars(
    of_ranks: Sequence[tuple[Collection[str], Mapping[str, Any]]],
) -> dict[str, Any]:
    """Returns the scalars of one optimizer of whose weights processes may have some each.

    Args:
        of_ranks: names of tensors, and scalars, from each process's ``flatten_optimizer_state``.
    """
    first = of_ranks[0][1]
    names: list[set[str]] = [set() for _ in first["groups"]]
    for _, scalars in of_ranks:
        for merged, group in zip(names, scalars["groups"], strict=True):
            merged.update(group["parameters"])
    groups = [
        {**group, "parameters": sorted(merged)}
        for merged, group in zip(names, first["groups"], strict=True)
    ]
    num_tensors = len(set().union(*(tensors for tensors, _ in of_ranks)))
    return {**first, "groups": groups, "num_tensors": num_tensors}


def restrict_optimizer_state(
    tensors: Mapping[str, Tensor], scalars: Mapping[str, Any], names: Collection[str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns what of a flattened state is of some parameters."""
    kept = {full: t for full, t in tensors.items() if full.partition("/")[2] in names}
    groups = [
        {**group, "parameters": [name for name in group["parameters"] if name in names]}
        for group in scalars["groups"]
    ]
    return kept, {**scalars, "groups": groups, "num_tensors": len(kept)}


def _named(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    for group in optimizer.param_groups:
        assert "param_names" in group, "build the optimizer from named parameters"
        named.update(zip(group["param_names"], group["params"], strict=True))
    return named


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    settings = {}
    for key in sorted(group.keys() - _NOT_SAVED):
        value = group[key]
        assert value is None or isinstance(value, bool | int | float | tuple), (key, value)
        settings[key] = list(value) if isinstance(value, tuple) else value
    return settings


def _check_scalars(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]
) -> None:
    missing = {"optimizer", "num_tensors", "groups"} - set(scalars)
    if missing:
        raise DamagedError(f"The saved optimizer state lacks '{min(missing)}'.")
    name = type(optimizer).__name__
    if scalars["optimizer"] != name:
        raise DamagedError(
            f"The saved optimizer is {scalars['optimizer']}, the one to continue with is {name}."
        )
    if scalars["num_tensors"] != len(tensors):
        raise DamagedError(
            f"The saved optimizer state has {len(tensors)} tensors of {scalars['num_tensors']}."
        )
    saved_names = [sorted(group["parameters"]) for group in scalars["groups"]]
    names = [sorted(group["param_names"]) for group in optimizer.param_groups]
    if saved_names != names:
        differing = sorted({n for g in saved_names for n in g} ^ {n for g in names for n in g})
        what = f"'{differing[0]}'" if differing else "their grouping"
        raise DamagedError(f"The saved optimizer is of other parameters: {what} differs.")
    for group, saved_group in zip(optimizer.param_groups, scalars["groups"], strict=True):
        unknown = saved_group["settings"].keys() - group.keys()
        if unknown:
            raise DamagedError(f"The saved optimizer has an unknown setting '{min(unknown)}'.")


def _empty_state(key: str, parameter: Tensor, saved: Tensor, *, number_on_device: bool) -> Tensor:
    """Allocates what the optimizer itself would have for this key, in the saved type."""
    if key in _NUMBERS:
        device = parameter.device if number_on_device else torch.device("cpu")
        return torch.empty((), dtype=saved.dtype, device=device)
    if key == "row_var":  # Adafactor: second moments of rows
        return parameter.new_empty((*parameter.shape[:-1], 1), dtype=saved.dtype)
    if key == "col_var":  # and of columns
        shape = (*parameter.shape[:-2], 1, parameter.shape[-1])
        return parameter.new_empty(shape, dtype=saved.dtype)
    return torch.empty_like(parameter, dtype=saved.dtype, memory_format=torch.preserve_format)
