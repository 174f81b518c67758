"""Models made of what a class of transformers has, so that they can be exported to it.

RunConfig --choose_portable--> RunConfig: model.portable decides the keys that a person left alone
TransformerConfig --check_portable--> refused where no class has its options
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hasten.config.schema import ModelConfig, RunConfig
from hasten.core.errors import UsageError
from hasten.model.config import Architecture, Head, TransformerConfig
from hasten.model.pretrained.writing import family_for
from hasten.plan.choices import Choice, apply_choices

# By architecture what differs from our own defaults; the nearest class to them is named.
_OPTIONS: Mapping[Architecture, Mapping[str, Any]] = {
    "encoder": {  # ModernBERT
        "norm": "layernorm",
        "norm_placement": "pre",
        "embedding_norm": True,
        "first_norm": False,
        "positions": "rotary",
        "activation": "geglu",
        "bias": False,
        "qk_norm": False,
        "pooling": "mean",
        "attention_dropout": 0.0,
        "head_activation": "gelu",
        "head_norm": True,
    },
    "decoder": {  # Llama
        "norm": "rmsnorm",
        "norm_placement": "pre",
        "positions": "rotary",
        "activation": "swiglu",
        "bias": False,
        "qk_norm": False,
    },
    "encoder_decoder": {  # mBART
        "norm": "layernorm",
        "norm_placement": "pre",
        "embedding_norm": True,
        "positions": "learned",
        "position_offset": 2,
        "activation": "gelu",
        "bias": True,
        "qk_norm": False,
    },
}
# Of these a classifier and a model that finds answers have a matrix before their scores.
_OF_HEADS = ("head_activation", "head_norm")


def choose_portable(
    config: RunConfig, architecture: Architecture
) -> tuple[RunConfig, list[Choice]]:
    """Returns the configuration with what ``model.portable`` decides, and what that is."""
    if not config.model.portable:
        return config, []
    reason = "as model.portable says"
    wanted = [
        Choice(f"model.{name}", value, reason)
        for name, value in _OPTIONS[architecture].items()
        if name in ModelConfig.model_fields
    ]
    if architecture == "encoder":
        # Its class has no numbers of segments.
        wanted.append(Choice("data.segments", "join", reason))
    return apply_choices(config, wanted)


def portable_options(architecture: Architecture, head: Head) -> dict[str, Any]:
    """Returns the options of a portable model that are no keys of a configuration."""
    return {
        name: value
        for name, value in _OPTIONS[architecture].items()
        if name not in ModelConfig.model_fields
        and (head != "language_modelling" or name not in _OF_HEADS)
    }


def check_portable(config: TransformerConfig) -> None:
    """Refuses a model that no class of transformers has.

    Raises:
        UsageError: naming its options that differ.
    """
    try:
        family_for(config)
    except UsageError as error:
        raise UsageError(f"model.portable: {error}") from None
