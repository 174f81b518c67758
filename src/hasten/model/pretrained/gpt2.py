"""GPT-2 (Radford et al. 2019): a decoder with norms before the branches and learned positions.

Queries, keys and values lie in one matrix, and all matrices lie the other way around.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hasten.model.config import Head, TransformerConfig
from hasten.model.pretrained.family import Family, Given, Rule, linear, rule, written_activation
from hasten.model.pretrained.rotary_decoder import (
    decoder_classes,
    options_of_heads,
    rules_of_heads,
)


def _options(given: Given, head: Head) -> dict[str, Any]:
    dropout = given.take("resid_pdrop", 0.1)
    given.expect("embd_pdrop", dropout, default=0.1)
    given.expect("scale_attn_by_inverse_layer_idx", False)
    # Of heads that it has not here, and of how numbers of half precision are rounded.
    given.ignore("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels")
    given.ignore("summary_first_dropout", "reorder_and_upcast_attn")
    positions = given.need("n_positions")
    given.expect("n_ctx", positions, None)
    return {
        "vocab_size": given.need("vocab_size"),
        "num_layers": given.need("n_layer"),
        "hidden_size": given.need("n_embd"),
        "num_heads": given.need("n_head"),
        "feed_forward_size": given.take("n_inner"),
        "activation": given.activation("activation_function", "gelu_new"),
        "norm_epsilon": float(given.take("layer_norm_epsilon", 1e-5)),
        "positions": "learned",
        "max_positions": positions,
        "attention_scale": None if given.take("scale_attn_weights", True) else 1.0,
        "dropout": dropout,
        "attention_dropout": given.take("attn_pdrop", 0.1),
        "initializer_std": given.take("initializer_range", 0.02),
        **options_of_heads(given, head, tied=True),
    }


def _config(config: TransformerConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "n_layer": config.num_layers,
        "n_embd": config.hidden_size,
        "n_head": config.num_heads,
        "n_inner": config.inner_size,
        "activation_function": written_activation(config.activation),
        "layer_norm_epsilon": config.norm_epsilon,
        "n_positions": config.max_positions,
        "scale_attn_weights": config.attention_scale in (None, config.head_size**-0.5),
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.attention_dropout,
        "initializer_range": config.initializer_std,
        "tie_word_embeddings": config.tie_embeddings,
    }


def _rules(config: TransformerConfig) -> Iterator[Rule]:
    yield from rules_of_heads(config, "wte.weight")
    yield rule("wpe.weight", "decoder.positions.weight")
    for i in range(config.num_layers):
        there, here = f"h.{i}", f"decoder.blocks.{i}"
        yield from linear(f"{there}.ln_1", f"{here}.attention_norm")
        fused = [f"{here}.attention.{name}" for name in ("query", "key", "value")]
        yield from linear(f"{there}.attn.c_attn", *fused, transposed=True)
        yield from linear(f"{there}.attn.c_proj", f"{here}.attention.output", transposed=True)
        yield from linear(f"{there}.ln_2", f"{here}.feed_forward_norm")
        yield from linear(f"{there}.mlp.c_fc", f"{here}.feed_forward.up", transposed=True)
        yield from linear(f"{there}.mlp.c_proj", f"{here}.feed_forward.down", transposed=True)
    yield from linear("ln_f", "decoder.final_norm")


GPT2 = Family(
    name="GPT-2",
    model_types=("gpt2",),
    architecture="decoder",
    prefix="transformer.",
    classes=decoder_classes("GPT2LMHeadModel", "GPT2ForSequenceClassification"),
    options=_options,
    config=_config,
    rules=_rules,
    ignored=("h.*.attn.bias", "h.*.attn.masked_bias"),  # masks
)
