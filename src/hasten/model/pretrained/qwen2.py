"""Qwen2 and Qwen2.5 (Yang et al. 2024): Llama with biases on queries, keys and values.

Blocks from ``max_window_layers`` on may have a window.
"""

from __future__ import annotations

from typing import Any

from hasten.model.config import Head, TransformerConfig
from hasten.model.pretrained.family import Family, Given
from hasten.model.pretrained.rotary_decoder import (
    GLOBAL,
    IGNORED,
    LOCAL,
    body_rules,
    config_of_body,
    decoder_classes,
    layer_types,
    options_of_body,
    options_of_rotation,
    options_of_windows,
)


def windows_of_qwen(given: Given) -> dict[str, Any]:
    """Returns which blocks see how much, as Qwen2 and Qwen3 say it."""
    window = given.take("sliding_window", 4096)
    first = given.take("max_window_layers", 28)
    if not given.take("use_sliding_window", False):
        window = None
    layers = given.layers("num_hidden_layers")
    kinds = [LOCAL if window and i >= first else GLOBAL for i in layers]
    return options_of_windows(given, window, kinds)


def config_of_qwen(config: TransformerConfig) -> dict[str, Any]:
    """Returns config.json as far as Qwen2 and Qwen3 say the same."""
    kinds = layer_types(config)
    return {
        **config_of_body(config),
        "use_sliding_window": bool(config.sliding_window),
        "sliding_window": config.sliding_window or None,
        # Versions of transformers before 4.53 know the first of them only.
        "max_window_layers": kinds.index(LOCAL) if LOCAL in kinds else len(kinds),
        "layer_types": kinds,
    }


def _options(given: Given, head: Head) -> dict[str, Any]:
    given.expect("use_mrope", False)
    return {
        **options_of_body(given, head, kv_heads=32),
        **options_of_rotation(given),
        **windows_of_qwen(given),
        "qkv_bias": True,
    }


QWEN2 = Family(
    name="Qwen2",
    model_types=("qwen2",),
    architecture="decoder",
    prefix="model.",
    classes=decoder_classes("Qwen2ForCausalLM", "Qwen2ForSequenceClassification"),
    options=_options,
    config=config_of_qwen,
    rules=body_rules,
    ignored=IGNORED,
)
