"""Optimizers by name, each a class of ``torch.optim`` with every default written out here.

    named parameters -> parameter_groups -> build_optimizer -> torch.optim.Optimizer
                        (decayed, exempt)   (literal registry)

Weight decay is always decoupled (Loshchilov & Hutter 2019, "Decoupled Weight Decay
Regularization"): just before a step each decayed weight is multiplied by
``1 - learning_rate * weight_decay``, and the decay never enters the gradient or its statistics.
Where torch has that form it is used; for the others (sgd, adagrad, adadelta, rmsprop) the same
multiplication is done here by a hook that runs at the start of ``step``. ``adam`` with weight decay
is therefore the same as ``adamw``. A penalty that does enter the gradient is in ``penalties``.
"""

# pyright: reportPrivateImportUsage=false
# torch's multi-tensor operations (_foreach_*) have no public name as of torch 2.13.

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from hasten.core.errors import UsageError, nearest
from hasten.core.shards import local_parts
from hasten.optim.muon import Muon

NamedParameter = tuple[str, nn.Parameter]

_OUR_DECAY = "applied_weight_decay"  # the group's key where torch's own decay would be coupled
_RATE = "rate_factor"  # the group's key where its learning rate is not that of the run
_ADAM_EPSILON = 1e-8
_ADAM_BETAS = (0.9, 0.999)
_WIDTH_RULE_STEPS = 4000  # the warm-up of Vaswani et al. 2017
_WIDTH_RULE_MAXIMUM = 2e-3


@dataclass(frozen=True)
class _Recipe:
    """One optimizer: its torch class, the settings it uses with their defaults, and constants.

    ``settings`` maps our names (betas, momentum, nesterov, epsilon) to defaults; a name that is
    absent is one that the optimizer does not use. ``learning_rate`` None means the width rule.
    """

    torch_class: type[torch.optim.Optimizer]
    settings: Mapping[str, Any]
    learning_rate: float | None = None
    constants: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    torch_decay_is_decoupled: bool = False
    may_be_fused: bool = False
    foreach: bool | None = True  # None: the class has no such choice


_RECIPES: Mapping[str, _Recipe] = MappingProxyType(
    {
        # Kingma & Ba 2015
        "adam": _Recipe(
            torch.optim.Adam,
            {"betas": _ADAM_BETAS, "epsilon": _ADAM_EPSILON},
            constants={"decoupled_weight_decay": True},
            torch_decay_is_decoupled=True,
            may_be_fused=True,
        ),
        # Loshchilov & Hutter 2019
        "adamw": _Recipe(
            torch.optim.AdamW,
            {"betas": _ADAM_BETAS, "epsilon": _ADAM_EPSILON},
            torch_decay_is_decoupled=True,
            may_be_fused=True,
        ),
        # Polyak 1964; Nesterov's form: Sutskever et al. 2013. Rate: He et al. 2016, section 3.4
        "sgd": _Recipe(torch.optim.SGD, {"momentum": 0.9, "nesterov": False}, 0.1),
        # Duchi et al. 2011. Rate and epsilon: torch
        "adagrad": _Recipe(
            torch.optim.Adagrad,
            {"epsilon": 1e-10},
            0.01,
            {"lr_decay": 0.0, "initial_accumulator_value": 0.0},
        ),
        # Zeiler 2012: no learning rate, that is a rate of 1. Epsilon: his table 2
        "adadelta": _Recipe(torch.optim.Adadelta, {"epsilon": 1e-6}, 1.0, {"rho": 0.9}),
        # Tieleman & Hinton 2012, lecture 6.5
        "rmsprop": _Recipe(
            torch.optim.RMSprop,
            {"momentum": 0.0, "epsilon": 1e-8},
            constants={"alpha": 0.99, "centered": False},
        ),
        # Dozat 2016
        "nadam": _Recipe(
            torch.optim.NAdam,
            {"betas": _ADAM_BETAS, "epsilon": _ADAM_EPSILON},
            constants={"decoupled_weight_decay": True, "momentum_decay": 0.004},
            torch_decay_is_decoupled=True,
        ),
        # Liu et al. 2020
        "radam": _Recipe(
            torch.optim.RAdam,
            {"betas": _ADAM_BETAS, "epsilon": _ADAM_EPSILON},
            constants={"decoupled_weight_decay": True},
            torch_decay_is_decoupled=True,
        ),
        # Shazeer & Stern 2018; epsilon None is the precision of the weights' type, as in torch.
        # Chosen for its small memory, so not foreach, whose intermediates double the peak.
        "adafactor": _Recipe(
            torch.optim.Adafactor,
            {"epsilon": None},
            0.01,
            {"beta2_decay": -0.8, "d": 1.0},
            torch_decay_is_decoupled=True,
            foreach=False,
        ),
        # Jordan et al. 2024, for the matrices of blocks; the others as adamw
        "muon": _Recipe(
            Muon,
            {"betas": (0.9, 0.95), "momentum": 0.95, "epsilon": _ADAM_EPSILON},
            5e-3,
            torch_decay_is_decoupled=True,
            foreach=None,
        ),
    }
)

OPTIMIZER_NAMES: tuple[str, ...] = tuple(_RECIPES)


def split_parameters(
    named_parameters: Iterable[NamedParameter], *, no_decay: Sequence[str] = ()
) -> tuple[list[NamedParameter], list[NamedParameter]]:
    """Splits trainable parameters into those that decay (or are penalised) and those exempt.

    Exempt are tensors of fewer than two dimensions (biases, gains of norms) and those whose name
    matches a pattern of ``no_decay``. Both lists keep the order given; frozen parameters
    (``requires_grad`` False) are in neither.

    Args:
        named_parameters: as from ``module.named_parameters()``.
        no_decay: shell patterns of names, such as ``"*.embedding.weight"``.

    Raises:
        UsageError: a pattern matches no parameter.
    """
    decayed: list[NamedParameter] = []
    exempt: list[NamedParameter] = []
    names: list[str] = []
    for name, parameter in named_parameters:
        names.append(name)
        if not parameter.requires_grad:
            continue
        is_exempt = parameter.ndim < 2 or any(fnmatchcase(name, glob) for glob in no_decay)
        (exempt if is_exempt else decayed).append((name, parameter))
    for glob in no_decay:
        if not any(fnmatchcase(name, glob) for name in names):
            raise UsageError(
                f"no_decay pattern '{glob}' matches no parameter.{nearest(glob, names)}"
            )
    return decayed, exempt


def parameter_groups(
    named_parameters: Iterable[NamedParameter],
    *,
    weight_decay: float,
    no_decay: Sequence[str] = (),
    rates: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Makes the parameter groups of an optimizer: decayed first, then exempt; empty ones left out.

    Args:
        named_parameters: as from ``module.named_parameters()``; frozen ones are skipped.
        weight_decay: decoupled decay of the first group, per unit of learning rate.
        no_decay: see ``split_parameters``.
        rates: factor on the learning rate of each, by name; None for 1. Those of one factor are
            groups of their own, the highest first.

    Returns:
        Dicts with ``params`` (pairs of name and parameter), ``weight_decay`` and, where there are
        ``rates``, ``rate_factor``.

    Raises:
        UsageError: nothing is trainable, or a pattern matches no parameter.
    """
    decayed, exempt = split_parameters(named_parameters, no_decay=no_decay)
    if not decayed and not exempt:
        raise UsageError("The model has no trainable parameter: every one of them is frozen.")
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": exempt, "weight_decay": 0.0},
    ]
    if rates is not None:
        groups = [part for group in groups for part in _by_rate(group, rates)]
    return [group for group in groups if group["params"]]


def _by_rate(group: dict[str, Any], rates: Mapping[str, float]) -> list[dict[str, Any]]:
    """Cuts a group into those of one rate each."""
    found = sorted({rates[name] for name, _ in group["params"]}, reverse=True)
    return [
        {**group, "params": [p for p in group["params"] if rates[p[0]] == rate], _RATE: rate}
        for rate in found
    ]


def default_settings(name: str) -> dict[str, Any]:
    """Returns the settings that an optimizer uses, with their defaults.

    Keys are among ``betas, momentum, nesterov, epsilon``; a setting that is absent is not used.

    Raises:
        UsageError: the name is unknown.
    """
    return dict(_recipe(name).settings)


def default_learning_rate(name: str, hidden_size: int) -> float:
    """Returns the peak learning rate to begin with for a Transformer of this width.

    For the Adam family and RMSprop: ``hidden_size**-0.5 * 4000**-0.5``, the peak of the schedule
    in Vaswani et al. 2017, section 5.3 (7.0e-4 at width 512; 5.7e-4 at 768, where Brown et al.
    2020, table 2.1, used 6.0e-4), at most 2e-3. For the others the authors' or torch's value,
    whatever the width; see the registry.

    Raises:
        UsageError: the name is unknown.
    """
    fixed = _recipe(name).learning_rate
    if fixed is not None:
        return fixed
    assert hidden_size > 0, hidden_size
    return min(_WIDTH_RULE_MAXIMUM, (hidden_size * _WIDTH_RULE_STEPS) ** -0.5)


def build_optimizer(
    name: str,
    groups: Iterable[Mapping[str, Any]],
    *,
    learning_rate: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] | None = None,
    momentum: float | None = None,
    nesterov: bool | None = None,
    epsilon: float | None = None,
) -> torch.optim.Optimizer:
    """Constructs an optimizer.

    Args:
        name: one of ``OPTIMIZER_NAMES``.
        groups: from ``parameter_groups``; they are not modified.
        learning_rate: the rate until ``set_learning_rate`` changes it.
        weight_decay: decoupled decay of groups that do not carry their own.
        betas: decay rates of the first and second moment (adam, adamw, nadam, radam).
        momentum: sgd (0.9 by default) and rmsprop (0).
        nesterov: sgd only.
        epsilon: added to a denominator; for adafactor its lower bound (epsilon 1). Not for sgd.

    Returns:
        The optimizer, fused where this torch build has a fused kernel for the device and type of
        every parameter (adam, adamw), else foreach; adafactor works tensor by tensor. Its groups
        carry the names of their parameters under ``param_names``.

    Raises:
        UsageError: an unknown name, a setting that the optimizer does not use, or a value out of
            range.
    """
    recipe = _recipe(name)
    given = {"betas": betas, "momentum": momentum, "nesterov": nesterov, "epsilon": epsilon}
    settings = _checked_settings(name, recipe, given)
    _check_rates(learning_rate, weight_decay)
    torch_groups = [_to_torch_group(group, recipe, weight_decay) for group in groups]
    keywords = {"lr": learning_rate, **recipe.constants, **_settings_to_torch(name, settings)}
    parameters = [parameter for group in torch_groups for _, parameter in group["params"]]
    # torch takes no tensors together that different processes share.
    is_uniform = len({getattr(p, "device_mesh", None) for p in parameters}) == 1
    if recipe.may_be_fused and is_uniform and _can_fuse(parameters):
        keywords["fused"] = True
    elif recipe.foreach is not None:
        keywords["foreach"] = recipe.foreach and is_uniform
    optimizer = recipe.torch_class(torch_groups, **keywords)
    if any(group.get(_OUR_DECAY) for group in optimizer.param_groups):
        optimizer.register_step_pre_hook(_apply_decay)
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Sets the rate of every group, for the step about to be taken; each has its own factor."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get(_RATE, 1.0)


def _recipe(name: str) -> _Recipe:
    if name not in _RECIPES:
        raise UsageError(
            f"Unknown optimizer '{name}'.{nearest(name, _RECIPES)} "
            f"Known: {', '.join(OPTIMIZER_NAMES)}."
        )
    return _RECIPES[name]


def _checked_settings(
    name: str, recipe: _Recipe, given: Mapping[str, object | None]
) -> dict[str, Any]:
    """Merges what was given into the recipe's defaults; refuses what it does not use."""
    for key, value in given.items():
        if value is not None and key not in recipe.settings:
            raise UsageError(
                f"Optimizer '{name}' does not use '{key}': leave it out. "
                f"It uses: {', '.join(recipe.settings)}."
            )
    merged = {
        **recipe.settings,
        **{key: value for key, value in given.items() if value is not None},
    }
    for beta in merged.get("betas", ()):
        _require(0.0 <= beta < 1.0, f"betas must be in [0, 1), got {merged.get('betas')}")
    momentum = merged.get("momentum", 0.0)
    _require(0.0 <= momentum < 1.0, f"momentum must be in [0, 1), got {momentum}")
    _require(not merged.get("nesterov") or momentum > 0, "nesterov needs a momentum greater than 0")
    epsilon = merged.get("epsilon")
    _require(
        epsilon is None or 0 < epsilon < math.inf, f"epsilon must be greater than 0, got {epsilon}"
    )
    return merged


def _check_rates(learning_rate: float, weight_decay: float) -> None:
    _require(0 <= learning_rate < math.inf, f"learning_rate must be 0 or more, got {learning_rate}")
    _require(0 <= weight_decay < math.inf, f"weight_decay must be 0 or more, got {weight_decay}")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UsageError(f"{message}.")


def _settings_to_torch(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    keywords = {key: value for key, value in settings.items() if key != "epsilon"}
    if name == "adafactor":
        keywords["eps"] = (settings["epsilon"], 1e-3)  # epsilon 2: the least relative step
    elif "epsilon" in settings:
        keywords["eps"] = settings["epsilon"]
    return keywords


def _to_torch_group(
    group: Mapping[str, Any], recipe: _Recipe, weight_decay: float
) -> dict[str, Any]:
    decay = group.get("weight_decay", weight_decay)
    _check_rates(0.0, decay)
    copy = {**group, "params": list(group["params"]), "weight_decay": decay}
    if not recipe.torch_decay_is_decoupled:
        copy["weight_decay"] = 0.0
        copy[_OUR_DECAY] = decay
    return copy


@torch.no_grad()
def _apply_decay(optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
    """Decays weights at the start of a step, as AdamW does: only those that have a gradient."""
    for group in optimizer.param_groups:
        parameters = [p for p in group["params"] if p.grad is not None]
        decay = group["lr"] * group[_OUR_DECAY]
        if decay and parameters:
            torch._foreach_mul_(local_parts(parameters), 1 - decay)


def _can_fuse(parameters: Iterable[Tensor]) -> bool:
    kinds = {(parameter.device.type, parameter.dtype) for parameter in parameters}
    return all(_fused_step_works(device_type, dtype) for device_type, dtype in kinds)


@functools.cache
def _fused_step_works(device_type: str, dtype: torch.dtype) -> bool:
    """Tries one fused step on one weight: which builds and devices have the kernel varies."""
    weight = nn.Parameter(torch.ones(1, device=device_type, dtype=dtype))
    weight.grad = torch.ones_like(weight)
    try:
        torch.optim.AdamW([weight], lr=0.5, fused=True).step()
    except (RuntimeError, NotImplementedError):
        return False
    return bool(weight.item() < 1.0)
