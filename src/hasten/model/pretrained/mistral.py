"""Mistral (Jiang et al. 2023): Llama without biases, all of whose blocks may have one window."""

from __future__ import annotations

from typing import Any

from hasten.model.config import Head, TransformerConfig
from hasten.model.pretrained.family import Family, Given
from hasten.model.pretrained.rotary_decoder import (
    IGNORED,
    body_rules,
    config_of_body,
    decoder_classes,
    options_of_body,
    options_of_rotation,
)


def _options(given: Given, head: Head) -> dict[str, Any]:
    return {
        **options_of_body(given, head, kv_heads=8),
        **options_of_rotation(given),
        "sliding_window": given.take("sliding_window", 4096) or 0,
    }


def _config(config: TransformerConfig) -> dict[str, Any]:
    return {**config_of_body(config), "sliding_window": config.sliding_window or None}


MISTRAL = Family(
    name="Mistral",
    model_types=("mistral",),
    architecture="decoder",
    prefix="model.",
    classes=decoder_classes("MistralForCausalLM", "MistralForSequenceClassification"),
    options=_options,
    config=_config,
    rules=body_rules,
    ignored=IGNORED,
)
