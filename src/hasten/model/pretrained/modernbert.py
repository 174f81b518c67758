"""ModernBERT (Warner et al. 2024): rotary positions, gated feed-forwards, mostly local attention.

Queries, keys and values lie in one matrix, and so do the two inner matrices of a feed-forward, of
which the first goes through the nonlinearity.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hasten.model.config import Head, TransformerConfig
from hasten.model.pretrained.family import (
    GATED,
    Family,
    Given,
    Rule,
    classifier_rules,
    head_rules,
    linear,
    rule,
    written_activation,
)
from hasten.model.pretrained.rotary_decoder import GLOBAL, LOCAL, layer_types, options_of_windows

_GLOBAL_BASE, _LOCAL_BASE = 160_000.0, 10_000.0


def _options(given: Given, head: Head) -> dict[str, Any]:
    layers = given.layers("num_hidden_layers")
    every = given.take("global_attn_every_n_layers", 3)
    kinds = [LOCAL if i % every else GLOBAL for i in layers]
    windows = options_of_windows(given, given.take("local_attention", 128), kinds)
    base, scaling = given.rotary(given.take("global_rope_theta", _GLOBAL_BASE), GLOBAL)
    local_base, _ = given.rotary(given.take("local_rope_theta", _LOCAL_BASE), LOCAL)
    bias = given.take("mlp_bias", False)
    for name in ("norm_bias", "classifier_bias"):
        given.expect(name, bias, default=False)
    for name in ("embedding_dropout", "mlp_dropout", "attention_dropout"):
        given.expect(name, 0.0, 0)
    given.ignore("initializer_cutoff_factor", "decoder_bias", "deterministic_flash_attn")
    given.ignore("sparse_prediction", "sparse_pred_ignore_index", "reference_compile")
    # The last two are of the class that theirs was made from; their own keys say it.
    given.ignore("repad_logits_with_grad", "position_embedding_type", "layer_norm_eps")
    gate = given.activation("hidden_activation")
    if gate not in GATED:
        given.expect("hidden_activation", "gelu", "silu")
    return {
        "vocab_size": given.need("vocab_size"),
        "num_layers": len(layers),
        "hidden_size": given.need("hidden_size"),
        "num_heads": given.need("num_attention_heads"),
        "feed_forward_size": given.need("intermediate_size"),
        "activation": GATED[gate],
        "norm_epsilon": float(given.take("norm_eps", 1e-5)),
        "embedding_norm": True,
        "first_norm": False,
        "bias": bias,
        "qkv_bias": given.need("attention_bias", bool),
        "output_bias": given.need("attention_bias", bool),
        "positions": "rotary",
        "rotary_base": base,
        "rotary_scaling": scaling,
        "local_rotary_base": local_base if windows["sliding_window"] else None,
        **windows,
        "max_positions": given.need("max_position_embeddings"),
        "dropout": 0.0,
        "head_dropout": given.take("classifier_dropout", 0.0),
        "initializer_std": given.take("initializer_range", 0.02),
        "pooling": {"cls": "first", "mean": "mean"}[
            given.expect("classifier_pooling", "cls", "mean")
        ],
        "head_activation": given.activation("classifier_activation"),
        "head_norm": True,
    }


def _config(config: TransformerConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "pad_token_id": None,  # the default is beyond a small vocabulary
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.inner_size,
        "hidden_activation": written_activation(config.activation),
        "norm_eps": config.norm_epsilon,
        "norm_bias": config.bias,
        "mlp_bias": config.bias,
        "classifier_bias": config.bias,
        "attention_bias": config.bias if config.qkv_bias is None else config.qkv_bias,
        "layer_types": layer_types(config),
        "global_rope_theta": config.rotary_base,
        "local_rope_theta": config.local_rotary_base or config.rotary_base,
        "local_attention": config.sliding_window or 128,
        "max_position_embeddings": config.max_positions,
        "embedding_dropout": 0.0,
        "mlp_dropout": 0.0,
        "attention_dropout": 0.0,
        "classifier_dropout": config.head_dropout or 0.0,
        "initializer_range": config.initializer_std,
        "classifier_pooling": "mean" if config.pooling == "mean" else "cls",
        "classifier_activation": config.head_activation,
    }


def _rules(config: TransformerConfig) -> Iterator[Rule]:
    bias = config.bias
    attention_bias = bias if config.qkv_bias is None else config.qkv_bias
    yield rule("embeddings.tok_embeddings.weight", "embedding.tokens.weight")
    yield from linear("embeddings.norm", "encoder.embedding_norm", bias=bias)
    for i in range(config.num_layers):
        there, here = f"layers.{i}", f"encoder.blocks.{i}"
        if i:
            yield from linear(f"{there}.attn_norm", f"{here}.attention_norm", bias=bias)
        fused = [f"{here}.attention.{name}" for name in ("query", "key", "value")]
        yield from linear(f"{there}.attn.Wqkv", *fused, bias=attention_bias)
        yield from linear(f"{there}.attn.Wo", f"{here}.attention.output", bias=attention_bias)
        yield from linear(f"{there}.mlp_norm", f"{here}.feed_forward_norm", bias=bias)
        fused = [f"{here}.feed_forward.{name}" for name in ("gate", "up")]
        yield from linear(f"{there}.mlp.Wi", *fused, bias=bias)
        yield from linear(f"{there}.mlp.Wo", f"{here}.feed_forward.down", bias=bias)
    yield from linear("final_norm", "encoder.final_norm", bias=bias)
    # Pretraining has the same inner layer in its own head, so that it is loaded as well.
    yield from head_rules("head.dense", "head.dense", bias=bias)
    yield from head_rules("head.norm", "head.norm", bias=bias)
    name = "head.classifier" if config.head == "classification" else "head.scorer"
    yield from classifier_rules("classifier", name)


MODERNBERT = Family(
    name="ModernBERT",
    model_types=("modernbert",),
    architecture="encoder",
    prefix="model.",
    classes={
        "classification": "ModernBertForSequenceClassification",
        "span": "ModernBertForQuestionAnswering",
    },
    options=_options,
    config=_config,
    rules=_rules,
)
