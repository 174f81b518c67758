"""Llama 2 and 3 (Touvron et al. 2023), and SmolLM and others that are built alike.

Versions 3.1 and later stretch the rotary frequencies for long texts.
"""

from __future__ import annotations

from typing import Any

from hasten.model.config import Head, TransformerConfig
from hasten.model.pretrained.family import Family, Given
from hasten.model.pretrained.rotary_decoder import (
    IGNORED,
    body_rules,
    config_of_body,
    decoder_classes,
    has_qkv_bias,
    options_of_body,
    options_of_rotation,
)


def _options(given: Given, head: Head) -> dict[str, Any]:
    attention_bias = given.take("attention_bias", False)
    # SmolLM says both.
    given.expect("rope_interleaved", False)
    given.ignore("is_llama_config")
    return {
        **options_of_body(given, head),
        **options_of_rotation(given),
        "bias": given.take("mlp_bias", False),
        "qkv_bias": attention_bias,
        "output_bias": attention_bias,
    }


def _config(config: TransformerConfig) -> dict[str, Any]:
    return {
        **config_of_body(config),
        "attention_bias": has_qkv_bias(config),
        "mlp_bias": config.bias,
    }


LLAMA = Family(
    name="Llama",
    model_types=("llama",),
    architecture="decoder",
    prefix="model.",
    classes=decoder_classes("LlamaForCausalLM", "LlamaForSequenceClassification"),
    options=_options,
    config=_config,
    rules=body_rules,
    ignored=IGNORED,
)
