"""Gemma 2 (Gemma Team 2024): norms around branches, bounded scores, a window in every other block.

Norms multiply by one more than their weight, and embeddings by the root of their width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hasten.model.config import Head, TransformerConfig
from hasten.model.pretrained.family import Family, Given, Rule, written_activation
from hasten.model.pretrained.rotary_decoder import (
    GLOBAL,
    IGNORED,
    LOCAL,
    body_rules,
    config_of_body,
    decoder_classes,
    has_qkv_bias,
    layer_types,
    options_of_body,
    options_of_rotation,
    options_of_windows,
)

_NORMS = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "attention_end_norm",
    "pre_feedforward_layernorm": "feed_forward_norm",
    "post_feedforward_layernorm": "feed_forward_end_norm",
}


def options_of_gemma(given: Given, head: Head) -> dict[str, Any]:
    """Returns what Gemma 2 and 3 say in the same words."""
    gate = ("hidden_activation", "gelu_pytorch_tanh")
    body = options_of_body(given, head, tied=True, kv_heads=4, head_dim=256, activation=gate)
    attention_bias = given.take("attention_bias", False)
    given.expect("use_bidirectional_attention", None, False)
    # It has a second name for the nonlinearity, at which no version of transformers looks.
    given.ignore("hidden_act", "cache_implementation")
    softcap = given.take("final_logit_softcapping", None)
    if head == "language_modelling":
        body["logit_softcap"] = softcap or 0.0
    return {
        **body,
        "norm_placement": "sandwich",
        "embedding_scale": body["hidden_size"] ** 0.5,
        "attention_scale": float(given.take("query_pre_attn_scalar", 256)) ** -0.5,
        "qkv_bias": attention_bias,
        "output_bias": attention_bias,
    }


def config_of_gemma(config: TransformerConfig) -> dict[str, Any]:
    """Returns the same as config.json."""
    scale = config.head_size**-0.5 if config.attention_scale is None else config.attention_scale
    return {
        **config_of_body(config),
        "hidden_activation": written_activation(config.activation),
        "query_pre_attn_scalar": round(scale**-2),
        "final_logit_softcapping": config.logit_softcap or None,
        "attention_bias": has_qkv_bias(config),
        "sliding_window": config.sliding_window or 4096,  # it has to be there
        "layer_types": layer_types(config),
    }


def rules_of_gemma(config: TransformerConfig) -> Iterator[Rule]:
    """Yields the rules of all tensors."""
    return body_rules(config, _NORMS, plus=1.0)


def _options(given: Given, head: Head) -> dict[str, Any]:
    window = given.take("sliding_window", 4096)
    given.expect("sliding_window_size", window, None)
    layers = given.layers("num_hidden_layers")
    return {
        **options_of_gemma(given, head),
        **options_of_rotation(given),
        **options_of_windows(given, window, [GLOBAL if i % 2 else LOCAL for i in layers]),
        "attention_softcap": given.take("attn_logit_softcapping", 50.0) or 0.0,
    }


def _config(config: TransformerConfig) -> dict[str, Any]:
    return {
        **config_of_gemma(config),
        "attn_logit_softcapping": config.attention_softcap or None,
    }


GEMMA2 = Family(
    name="Gemma 2",
    model_types=("gemma2",),
    architecture="decoder",
    prefix="model.",
    classes=decoder_classes("Gemma2ForCausalLM", "Gemma2ForSequenceClassification"),
    options=_options,
    config=_config,
    rules=rules_of_gemma,
    ignored=IGNORED,
)
