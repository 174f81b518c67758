"""Writes a model as a folder that transformers loads, where a family can say all of its options.

    TransformerConfig --Family.config--> config.json --Family.options--> the same TransformerConfig
    tensors --Family.rules--> model.safetensors

A family fits where reading back what it would write gives the same model: nothing else decides.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from hasten.core.errors import HastenError, UsageError
from hasten.model.config import TransformerConfig
from hasten.model.pretrained.family import Family
from hasten.model.pretrained.reading import WEIGHTS
from hasten.model.pretrained.registry import FAMILIES

# Fields that change how a model is trained and not what it computes afterwards.
_OF_TRAINING = frozenset(
    {
        "dropout",
        "attention_dropout",
        "token_dropout",
        "head_dropout",
        "stochastic_depth",
        "initializer_std",
        "zero_init_residual",
        "unused",
    }
)
# Fields that mean something with some values of others only.
_MEANT_WITH: dict[str, tuple[str, tuple[Any, ...]]] = {
    # Of relative ones it is a bound alone.
    "max_positions": ("positions", ("rotary", "learned", "sinusoidal", "none")),
    "sinusoids": ("positions", ("sinusoidal",)),
    "position_offset": ("positions", ("learned", "sinusoidal")),
    "relative_buckets": ("positions", ("relative",)),
    "relative_max_distance": ("positions", ("relative",)),
    "rotary_base": ("positions", ("rotary",)),
    "local_rotary_base": ("positions", ("rotary",)),
    "rotary_scaling": ("positions", ("rotary",)),
    "num_labels": ("head", ("classification",)),
    "pooling": ("head", ("classification",)),
    "head_activation": ("head", ("classification", "span")),
    "head_norm": ("head", ("classification", "span")),
    "head_bias": ("head", ("classification", "span")),
    "tie_embeddings": ("head", ("language_modelling",)),
    "logit_scale": ("head", ("language_modelling",)),
    "logit_softcap": ("head", ("language_modelling",)),
    "logit_bias": ("head", ("language_modelling",)),
}


def family_for(config: TransformerConfig) -> Family:
    """Returns the family that can say a model's options.

    Raises:
        UsageError: none can; the options that the nearest one would have otherwise are named.
    """
    nearest: tuple[str, list[str]] | None = None
    for family in FAMILIES:
        if family.architecture != config.architecture or config.head not in family.classes:
            continue
        differing = _differences(family, config)
        if not differing:
            return family
        if nearest is None or len(differing) < len(nearest[1]):
            nearest = family.name, differing
    architecture, head = config.architecture.replace("_", "-"), config.head.replace("_", " ")
    if nearest is None:
        raise UsageError(f"no transformers class that is known here: {architecture} for {head}.")
    name, differing = nearest
    raise UsageError(
        f"no transformers class that is known here has all options of this {architecture} for "
        f"{head}; the nearest, {name}, differs in {', '.join(differing)}."
    )


def config_json(
    family: Family, config: TransformerConfig, extra: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the content of config.json; ``extra`` wins, such as ``id2label``."""
    return {
        "architectures": [family.classes[config.head]],
        "model_type": family.model_types[0],
        "torch_dtype": "float32",
        **family.config(config),
        **extra,
    }


def their_tensors(
    family: Family, config: TransformerConfig, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Returns a model's tensors by the names and in the layout of its family.

    Args:
        family: of the model.
        config: of the model.
        tensors: whole, by our names.
    """
    found: dict[str, Tensor] = {}
    for one in family.rules(config):
        own = [tensors[name].detach().cpu() for name in one.own]
        name = one.other if one.is_outside else f"{family.prefix}{one.other}"
        found[name] = one.to_other(own).contiguous()
    return found


def save_pretrained(
    folder: Path,
    config: TransformerConfig,
    tensors: Mapping[str, Tensor],
    extra: Mapping[str, Any] | None = None,
) -> Family:
    """Writes config.json and model.safetensors into a folder that exists.

    Args:
        folder: to write into.
        config: of the model.
        tensors: whole, by our names.
        extra: more of config.json, such as ``id2label``; it wins.

    Returns:
        The family that the model was written as.

    Raises:
        UsageError: no family can say the model's options.
    """
    family = family_for(config)
    content = config_json(family, config, extra or {})
    text = json.dumps(content, ensure_ascii=False, indent=2) + "\n"
    save_file(their_tensors(family, config, tensors), folder / WEIGHTS, metadata={"format": "pt"})
    (folder / "config.json").write_text(text, encoding="utf-8")
    return family


def _differences(family: Family, config: TransformerConfig) -> list[str]:
    """Returns ``model.name value`` for each option that would be another when read back."""
    try:
        options = family.read(config_json(family, config, {}), config.head, family.name)
        theirs = dict(_meant(TransformerConfig(**{"num_labels": config.num_labels, **options})))
    except HastenError:
        # It would write what it cannot read: of what it says of itself most is another's.
        theirs = {}
    return [
        f"model.{name} {value!r} (there {theirs.get(name)!r})"
        for name, value in _meant(config)
        if theirs.get(name) != value
    ]


def _meant(config: TransformerConfig) -> Iterator[tuple[str, Any]]:
    """Yields the options that a model's results depend on, None replaced by what it stands for."""
    stood_for = {
        "head_dim": config.head_size,
        "num_kv_heads": config.kv_heads,
        "feed_forward_size": config.inner_size,
        "embedding_norm": config.has_embedding_norm,
        "embedding_size": config.embedding_width,
        "embedding_scale": config.embedding_factor,
        "num_decoder_layers": config.decoder_layers,
        "qkv_bias": config.bias,
        "output_bias": config.bias,
        "attention_scale": config.head_size**-0.5,
        # Without one of their own, blocks with a window stretch it too.
        "local_rotary_base": None if config.rotary_scaling else config.rotary_base,
    }
    for field in dataclasses.fields(config):
        name, value = field.name, getattr(config, field.name)
        if name in _OF_TRAINING:
            continue
        if name in _MEANT_WITH:
            other, fitting = _MEANT_WITH[name]
            if getattr(config, other) not in fitting:
                continue
        if name == "local_rotary_base" and not config.sliding_window:
            continue
        if name == "global_layers" and value and not config.sliding_window:
            continue
        yield name, stood_for.get(name) if value is None else value
