"""Qwen3 (Yang et al. 2025): Qwen2 without biases, its queries and keys normalised per head."""

from __future__ import annotations

from typing import Any

from hasten.model.config import Head, TransformerConfig
from hasten.model.pretrained.family import Family, Given
from hasten.model.pretrained.qwen2 import config_of_qwen, windows_of_qwen
from hasten.model.pretrained.rotary_decoder import (
    IGNORED,
    body_rules,
    decoder_classes,
    has_qkv_bias,
    options_of_body,
    options_of_rotation,
)


def _options(given: Given, head: Head) -> dict[str, Any]:
    attention_bias = given.take("attention_bias", False)
    return {
        **options_of_body(given, head, kv_heads=32, head_dim=128),
        **options_of_rotation(given),
        **windows_of_qwen(given),
        "qkv_bias": attention_bias,
        "output_bias": attention_bias,
        "qk_norm": True,
    }


def _config(config: TransformerConfig) -> dict[str, Any]:
    return {**config_of_qwen(config), "attention_bias": has_qkv_bias(config)}


QWEN3 = Family(
    name="Qwen3",
    model_types=("qwen3",),
    architecture="decoder",
    prefix="model.",
    classes=decoder_classes("Qwen3ForCausalLM", "Qwen3ForSequenceClassification"),
    options=_options,
    config=_config,
    rules=body_rules,
    ignored=IGNORED,
)
