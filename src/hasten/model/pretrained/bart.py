"""BART (Lewis et al. 2020) and mBART (Liu et al. 2020): an encoder-decoder with learned positions.

    BART     norms after the sums                    mBART    norms before the branches

Both norm the sum of token and position, and have two rows before the position of the first token.
Marian and M2M100 come from the same code and share its words and names.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from hasten.model.config import Head, NormPlacement, TransformerConfig
from hasten.model.pretrained.family import Family, Given, Rule, linear, rule, written_activation

_OFFSET = 2
# What transformers drops in training besides: whole blocks, and values inside of feed-forwards.
_UNUSED = ("activation_dropout", "encoder_layerdrop", "decoder_layerdrop")
_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")


def options_of_pair(given: Given, placement: NormPlacement) -> dict[str, Any]:
    """Returns what BART and its kin say in the same words.

    Raises:
        UsageError: the two sides differ in more than their depth.
    """
    width, heads = given.need("d_model"), given.need("encoder_attention_heads")
    inner = given.need("encoder_ffn_dim")
    given.expect("decoder_attention_heads", heads)
    given.expect("decoder_ffn_dim", inner)
    # Of the first versions of these models, which had one class for all of them.
    is_pre = placement == "pre"
    given.expect("normalize_before", is_pre)
    given.expect("add_final_layer_norm", is_pre)
    given.expect("add_bias_logits", False)
    # Of heads that it has not here, of tables that are made anew, and of how texts were generated.
    given.ignore("classifier_dropout", "classif_dropout", "num_hidden_layers")
    given.ignore("static_position_embeddings", "extra_pos_embeddings", "save_step")
    given.ignore("force_bos_token_to_be_generated")
    return {
        "vocab_size": given.need("vocab_size"),
        "num_layers": given.need("encoder_layers"),
        "num_decoder_layers": given.need("decoder_layers"),
        "hidden_size": width,
        "num_heads": heads,
        "feed_forward_size": inner,
        "activation": given.activation("activation_function"),
        "norm_placement": placement,
        "embedding_scale": math.sqrt(width) if given.take("scale_embedding", False) else 1.0,
        "max_positions": given.need("max_position_embeddings"),
        "dropout": given.take("dropout", 0.1),
        "attention_dropout": given.take("attention_dropout", 0.0),
        "initializer_std": given.take("init_std", 0.02),
        "unused": given.unused(*_UNUSED),
    }


def config_of_pair(config: TransformerConfig) -> dict[str, Any]:
    """Returns the same as config.json."""
    return {
        "vocab_size": config.vocab_size,
        "encoder_layers": config.num_layers,
        "decoder_layers": config.decoder_layers,
        "d_model": config.hidden_size,
        "encoder_attention_heads": config.num_heads,
        "decoder_attention_heads": config.num_heads,
        "encoder_ffn_dim": config.inner_size,
        "decoder_ffn_dim": config.inner_size,
        "activation_function": written_activation(config.activation),
        "scale_embedding": config.embedding_factor != 1,
        "max_position_embeddings": config.max_positions,
        "dropout": config.dropout,
        "attention_dropout": config.attention_dropout,
        **dict.fromkeys(_UNUSED, 0.0),
        **dict(config.unused),
        "init_std": config.initializer_std,
        "is_encoder_decoder": True,
        "tie_word_embeddings": config.tie_embeddings,
    }


def shared_embedding() -> Iterator[Rule]:
    """Yields the rule of the embedding that both sides and the scores of tokens share."""
    yield rule("shared.weight", "embedding.tokens.weight", aliases=(*_COPIES, "lm_head.weight"))


def stack_rules(config: TransformerConfig) -> Iterator[Rule]:
    """Yields the rules of both stacks."""
    for side, layers in (("encoder", config.num_layers), ("decoder", config.decoder_layers)):
        if config.positions == "learned":
            yield rule(f"{side}.embed_positions.weight", f"{side}.positions.weight")
        if config.has_embedding_norm:
            yield from linear(f"{side}.layernorm_embedding", f"{side}.embedding_norm")
        for i in range(layers):
            yield from _block_rules(f"{side}.layers.{i}", f"{side}.blocks.{i}", side == "decoder")
        if config.norm_placement != "post":
            yield from linear(f"{side}.layer_norm", f"{side}.final_norm")


def bias_rules() -> Iterator[Rule]:
    """Yields the rule of the fixed bias of tokens' scores, a matrix of one row there."""
    yield rule("final_logits_bias", "head.bias", is_row=True, is_outside=True, is_optional=True)


def _block_rules(there: str, here: str, reads_source: bool) -> Iterator[Rule]:
    attentions = [("self_attn", "attention"), ("encoder_attn", "source_attention")]
    norms = [("self_attn", "attention_norm"), ("encoder_attn", "source_norm")]
    for other, own in attentions[: 1 + reads_source]:
        for name, ours in (("q", "query"), ("k", "key"), ("v", "value"), ("out", "output")):
            yield from linear(f"{there}.{other}.{name}_proj", f"{here}.{own}.{ours}")
    for other, own in norms[: 1 + reads_source]:
        yield from linear(f"{there}.{other}_layer_norm", f"{here}.{own}")
    yield from linear(f"{there}.fc1", f"{here}.feed_forward.up")
    yield from linear(f"{there}.fc2", f"{here}.feed_forward.down")
    yield from linear(f"{there}.final_layer_norm", f"{here}.feed_forward_norm")


def _options(given: Given, placement: NormPlacement) -> dict[str, Any]:
    given.expect("normalize_embedding", True)
    given.expect("tie_word_embeddings", True)
    return {
        **options_of_pair(given, placement),
        "positions": "learned",
        "position_offset": _OFFSET,
        "embedding_norm": True,
        "logit_bias": True,
    }


def _options_of_bart(given: Given, head: Head) -> dict[str, Any]:
    return _options(given, "post")


def _options_of_mbart(given: Given, head: Head) -> dict[str, Any]:
    return _options(given, "pre")


def _rules(config: TransformerConfig) -> Iterator[Rule]:
    yield from shared_embedding()
    yield from stack_rules(config)
    yield from bias_rules()


_IGNORED = ("encoder.version", "decoder.version")

BART = Family(
    name="BART",
    model_types=("bart",),
    architecture="encoder_decoder",
    prefix="model.",
    classes={"language_modelling": "BartForConditionalGeneration"},
    options=_options_of_bart,
    config=config_of_pair,
    rules=_rules,
    ignored=_IGNORED,
)
MBART = Family(
    name="mBART",
    model_types=("mbart",),
    architecture="encoder_decoder",
    prefix="model.",
    classes={"language_modelling": "MBartForConditionalGeneration"},
    options=_options_of_mbart,
    config=config_of_pair,
    rules=_rules,
    ignored=_IGNORED,
)
