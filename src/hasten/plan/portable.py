"""Models made of what a class of transformers has, so that they can be exported to it.

RunConfig --choose_portable--> RunConfig: model.portable decides the keys that a person left alone
TransformerConfig --check_portable--> refused where no class has its options
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from tokenizers import Tokenizer

from hasten.config.schema import ModelConfig, RunConfig
from hasten.core.errors import UsageError
from hasten.data.template import Framing
from hasten.data.tokens import EncodingFormat, template_of
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
        "logit_bias": True,
        "activation": "gelu",
        "bias": True,
        "qk_norm": False,
    },
}
# Of these a classifier and a model that finds answers have a matrix before their scores.
_OF_HEADS = ("head_activation", "head_norm")


def choose_portable(
    config: RunConfig, architecture: Architecture, uses: Collection[str]
) -> tuple[RunConfig, list[Choice]]:
    """Returns the configuration with what ``model.portable`` decides, and what that is.

    Args:
        config: as a person has set it.
        architecture: of the model.
        uses: names of the ``TaskSettings`` that the task honours.
    """
    if not config.model.portable:
        return config, []
    reason = "as model.portable says"
    wanted = [
        Choice(f"model.{name}", value, reason)
        for name, value in _OPTIONS[architecture].items()
        if name in ModelConfig.model_fields and (name != "pooling" or name in uses)
    ]
    if "segments" in uses:
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


def portable_framing(tokenizer: Tokenizer) -> Framing:
    """Returns what stands around the texts that a portable encoder reads: as in BERT, untyped."""
    form = EncodingFormat(class_token=True, separate_segments=True, end_token=True)
    template = replace(template_of(tokenizer, form), numbers_segments=False)
    return Framing(template, template)


def check_portable(config: TransformerConfig) -> None:
    """Refuses a model that no class of transformers has.

    Raises:
        UsageError: naming its options that differ.
    """
    try:
        family_for(config)
    except UsageError as error:
        raise UsageError(f"model.portable: {error}") from None
