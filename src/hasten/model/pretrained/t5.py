"""T5 (Raffel et al. 2020) and mT5 (Xue et al. 2021): an encoder-decoder with relative positions.

    T5 v1.0        ReLU, tokens scored by their embeddings, scores times 1 / sqrt(D)
    v1.1, mT5      a gate, tokens scored by a matrix of their own

Attention scores are not scaled, and nothing has a bias. No position is too far away: how long
sequences may be is a bound of ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hasten.core.errors import UsageError
from hasten.model.config import Head, TransformerConfig
from hasten.model.pretrained.family import (
    ACTIVATIONS,
    GATED,
    Family,
    Given,
    Rule,
    linear,
    rule,
    written_activation,
)

_MAX_POSITIONS = 4096
_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
_TIES = ("lm_head.weight", "shared.weight", *_COPIES)


def _options(given: Given) -> dict[str, Any]:
    dropout = given.take("dropout_rate", 0.1)
    layers = given.need("num_layers")
    # What follows from feed_forward_proj, what is drawn only, and of heads that it has not here.
    given.ignore("dense_act_fn", "is_gated_act", "initializer_factor", "classifier_dropout")
    given.ignore("n_positions")  # the length of its pretraining
    return {
        "vocab_size": given.need("vocab_size"),
        "num_layers": layers,
        "num_decoder_layers": given.take("num_decoder_layers") or layers,
        "hidden_size": given.need("d_model"),
        "num_heads": given.need("num_heads"),
        "head_dim": given.need("d_kv"),
        "feed_forward_size": given.need("d_ff"),
        "norm": "rmsnorm",
        "norm_epsilon": float(given.take("layer_norm_epsilon", 1e-6)),
        "bias": False,
        "positions": "relative",
        "relative_buckets": given.take("relative_attention_num_buckets", 32),
        "relative_max_distance": given.take("relative_attention_max_distance", 128),
        "max_positions": _MAX_POSITIONS,
        "attention_scale": 1.0,
        "dropout": dropout,
        "attention_dropout": dropout,
    }


def _activation(given: Given, default: str) -> str:
    """Returns the nonlinearity; "gated-" stands before that of a gate."""
    there = str(given.take("feed_forward_proj", default))
    name = there.removeprefix("gated-")
    plain = ACTIVATIONS.get("gelu_new" if there == "gated-gelu" else name)
    own = plain if name == there or plain is None else GATED.get(plain)
    if own is None:
        raise UsageError(f"{given.origin}: feed_forward_proj '{there}' is not honoured here.")
    return own


def _options_of_t5(given: Given, head: Head) -> dict[str, Any]:
    options = {**_options(given), "activation": _activation(given, "relu")}
    is_tied = given.take("tie_word_embeddings", True)
    # Since transformers 5 it has a key of its own.
    is_scaled = given.take("scale_decoder_outputs", is_tied)
    scale = options["hidden_size"] ** -0.5 if is_scaled else 1.0
    return {**options, "tie_embeddings": is_tied, "logit_scale": scale}


def _options_of_mt5(given: Given, head: Head) -> dict[str, Any]:
    tie = given.take("tie_word_embeddings", True)
    return {
        **_options(given),
        "activation": _activation(given, "gated-gelu"),
        "tie_embeddings": tie,
    }


def _config(config: TransformerConfig) -> dict[str, Any]:
    name = written_activation(config.activation)
    if config.is_gated:
        name = "gated-gelu" if config.activation == "geglu_tanh" else f"gated-{name}"
    return {
        "vocab_size": config.vocab_size,
        "num_layers": config.num_layers,
        "num_decoder_layers": config.decoder_layers,
        "d_model": config.hidden_size,
        "num_heads": config.num_heads,
        "d_kv": config.head_size,
        "d_ff": config.inner_size,
        "feed_forward_proj": name,
        "layer_norm_epsilon": config.norm_epsilon,
        "relative_attention_num_buckets": config.relative_buckets,
        "relative_attention_max_distance": config.relative_max_distance,
        "dropout_rate": config.dropout,
        "is_encoder_decoder": True,
        "tie_word_embeddings": config.tie_embeddings,
    }


def _config_of_t5(config: TransformerConfig) -> dict[str, Any]:
    return {**_config(config), "scale_decoder_outputs": config.logit_scale != 1}


def _rules(config: TransformerConfig) -> Iterator[Rule]:
    tied = ("lm_head.weight",) if config.tie_embeddings else ()
    yield rule("shared.weight", "embedding.tokens.weight", aliases=(*_COPIES, *tied))
    if not tied:
        yield rule("lm_head.weight", "head.scorer.weight", is_optional=True, is_outside=True)
    yield from _stack_rules(config, "encoder", config.num_layers)
    yield from _stack_rules(config, "decoder", config.decoder_layers)


def _stack_rules(config: TransformerConfig, side: str, layers: int) -> Iterator[Rule]:
    bias = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    yield rule(bias, f"{side}.relative_bias.weight")
    yield rule(f"{side}.final_layer_norm.weight", f"{side}.final_norm.weight")
    branches = [("SelfAttention", "attention")]
    if side == "decoder":
        branches.append(("EncDecAttention", "source_attention"))
    for i in range(layers):
        here = f"{side}.blocks.{i}"
        for number, (other, own) in enumerate(branches):
            there = f"{side}.block.{i}.layer.{number}"
            for name, ours in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "output")):
                yield from linear(f"{there}.{other}.{name}", f"{here}.{own}.{ours}", bias=False)
            norm = own.replace("attention", "norm") if number else "attention_norm"
            yield rule(f"{there}.layer_norm.weight", f"{here}.{norm}.weight")
        there = f"{side}.block.{i}.layer.{len(branches)}"
        names = {"wi": "up", "wo": "down"}
        if config.is_gated:
            names = {"wi_0": "gate", "wi_1": "up", "wo": "down"}
        for name, ours in names.items():
            dense = f"{there}.DenseReluDense.{name}"
            yield from linear(dense, f"{here}.feed_forward.{ours}", bias=False)
        yield rule(f"{there}.layer_norm.weight", f"{here}.feed_forward_norm.weight")


# There it is, but nothing looks at it.
_IGNORED = ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",)

T5 = Family(
    name="T5",
    model_types=("t5",),
    architecture="encoder_decoder",
    prefix="",
    classes={"language_modelling": "T5ForConditionalGeneration"},
    options=_options_of_t5,
    config=_config_of_t5,
    rules=_rules,
    ignored=_IGNORED,
    ties=_TIES,
)
MT5 = Family(
    name="mT5",
    model_types=("mt5",),
    architecture="encoder_decoder",
    prefix="",
    classes={"language_modelling": "MT5ForConditionalGeneration"},
    options=_options_of_mt5,
    config=_config,
    rules=_rules,
    ignored=_IGNORED,
    ties=_TIES,
)
