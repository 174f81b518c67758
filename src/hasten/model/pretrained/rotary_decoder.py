"""What decoders with rotary positions and gated feed-forwards share: Llama and all that followed.

    config.json --options_of_body--> fields of TransformerConfig --config_of_body--> config.json
    "layers.0.self_attn.q_proj.weight" --body_rules-- "decoder.blocks.0.attention.query.weight"

Their families differ in biases, norms, windows and what bounds their scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from hasten.core.errors import UsageError
from hasten.model.config import Head, TransformerConfig
from hasten.model.pretrained.family import (
    GATED,
    Given,
    Rule,
    classifier_rules,
    linear,
    rule,
    scaling_to_json,
    written_activation,
)

GLOBAL, LOCAL = "full_attention", "sliding_attention"
IGNORED = ("*rotary_emb.inv_freq",)
"""Tensors that old checkpoints have and anyone can compute."""
_NORMS = {"input_layernorm": "attention_norm", "post_attention_layernorm": "feed_forward_norm"}


def decoder_classes(causal: str, classifier: str) -> dict[Head, str]:
    """Returns the classes of transformers for the heads that decoders have."""
    return {"language_modelling": causal, "classification": classifier}


def options_of_heads(given: Given, head: Head, *, tied: bool) -> dict[str, Any]:
    """Returns what decoders' heads are made of.

    Args:
        given: a config.json.
        head: that is wanted; classes are scored at the last token, without a bias.
        tied: whether tokens are scored by their embeddings where config.json does not say.
    """
    if head == "language_modelling":
        return {"tie_embeddings": given.take("tie_word_embeddings", tied)}
    return {"pooling": "last", "head_bias": False, "head_dropout": 0.0}


def rules_of_heads(config: TransformerConfig, embedding: str) -> Iterator[Rule]:
    """Yields the rules of the embedding, by its name there, and of the head."""
    is_tied = config.head == "language_modelling" and config.tie_embeddings
    # Some files hold the tied matrix under its other name too.
    aliases = ("lm_head.weight",) if is_tied else ()
    yield rule(embedding, "embedding.tokens.weight", aliases=aliases)
    if config.head == "classification":
        yield from classifier_rules("score", "head.classifier", bias=False)
    elif not is_tied:
        yield rule("lm_head.weight", "head.scorer.weight", is_outside=True)


def options_of_body(
    given: Given,
    head: Head,
    *,
    tied: bool = False,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    activation: tuple[str, str] = ("hidden_act", "silu"),
) -> dict[str, Any]:
    """Returns what all of them say in the same words.

    Args:
        given: a config.json.
        head: that is wanted.
        tied: whether tokens are scored by their embeddings where config.json does not say.
        kv_heads: key and value heads where it does not say.
        head_dim: dimensions of a head where it does not say.
        activation: key of the gate's nonlinearity, and which it is where it does not say.
    """
    gate = given.activation(*activation)
    if gate not in GATED:
        given.expect(activation[0], "silu", "gelu", "gelu_pytorch_tanh")
    return {
        "vocab_size": given.need("vocab_size"),
        "num_layers": given.need("num_hidden_layers"),
        "hidden_size": given.need("hidden_size"),
        "num_heads": given.need("num_attention_heads"),
        "num_kv_heads": given.take("num_key_value_heads", kv_heads),
        "head_dim": given.take("head_dim", head_dim),
        "feed_forward_size": given.need("intermediate_size"),
        "activation": GATED[gate],
        "norm": "rmsnorm",
        "norm_epsilon": float(given.take("rms_norm_eps", 1e-6)),
        "bias": False,
        "positions": "rotary",
        "max_positions": given.need("max_position_embeddings"),
        "dropout": 0.0,
        "attention_dropout": given.take("attention_dropout") or 0.0,
        "initializer_std": given.take("initializer_range", 0.02),
        **options_of_heads(given, head, tied=tied),
    }


def options_of_rotation(given: Given) -> dict[str, Any]:
    """Returns base and scaling of rotary positions that are the same in all blocks."""
    base, scaling = given.rotary()
    return {"rotary_base": base, "rotary_scaling": scaling}


def options_of_windows(given: Given, window: int | None, kinds: list[str]) -> dict[str, Any]:
    """Returns which blocks see how much.

    Args:
        given: a config.json, whose ``layer_types`` win.
        window: tokens that a token sees; None for all.
        kinds: of the blocks, where config.json does not name them.

    Raises:
        UsageError: ``layer_types`` that do not fit the blocks, or have no window.
    """
    kinds = given.take("layer_types") or kinds
    layers = len(given.layers("num_hidden_layers"))
    if len(kinds) != layers or not {*kinds} <= {GLOBAL, LOCAL}:
        raise UsageError(
            f"{given.origin}: layer_types is {kinds!r:.200}; {layers} of '{GLOBAL}' or '{LOCAL}' "
            "are honoured here."
        )
    if LOCAL not in kinds:
        return {"sliding_window": 0}
    if not window:
        raise UsageError(f"{given.origin}: layer_types has '{LOCAL}', but there is no window.")
    seeing_all = tuple(i for i, kind in enumerate(kinds) if kind == GLOBAL)
    return {"sliding_window": window, "global_layers": seeing_all}


def layer_types(config: TransformerConfig) -> list[str]:
    """Returns the kinds of the blocks, by their names there."""
    layers = range(config.num_layers)
    has_window = bool(config.sliding_window)
    return [LOCAL if has_window and i not in config.global_layers else GLOBAL for i in layers]


def config_of_body(config: TransformerConfig) -> dict[str, Any]:
    """Returns as config.json what ``options_of_body`` and ``options_of_rotation`` read.

    The names of rotary positions are the old ones, which all versions of transformers read.
    """
    return {
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "intermediate_size": config.inner_size,
        "hidden_act": written_activation(config.activation),
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rotary_base,
        "rope_scaling": scaling_to_json(config.rotary_scaling),
        "max_position_embeddings": config.max_positions,
        "attention_dropout": config.attention_dropout,
        "initializer_range": config.initializer_std,
        "tie_word_embeddings": config.tie_embeddings,
    }


def has_qkv_bias(config: TransformerConfig) -> bool:
    """Returns whether queries, keys and values have biases."""
    return config.bias if config.qkv_bias is None else config.qkv_bias


def body_rules(
    config: TransformerConfig, norms: Mapping[str, str] = _NORMS, plus: float = 0.0
) -> Iterator[Rule]:
    """Yields the rules of all tensors, heads included.

    Args:
        config: of the model.
        norms: of a block, their names to ours.
        plus: our weights of norms are theirs and this number.
    """
    qkv_bias = has_qkv_bias(config)
    output_bias = config.bias if config.output_bias is None else config.output_bias
    yield from rules_of_heads(config, "embed_tokens.weight")
    for i in range(config.num_layers):
        there, here = f"layers.{i}", f"decoder.blocks.{i}"
        for other, own in norms.items():
            yield rule(f"{there}.{other}.weight", f"{here}.{own}.weight", plus=plus)
        attention, own_attention = f"{there}.self_attn", f"{here}.attention"
        for other, own in (("q", "query"), ("k", "key"), ("v", "value")):
            yield from linear(f"{attention}.{other}_proj", f"{own_attention}.{own}", bias=qkv_bias)
        yield from linear(f"{attention}.o_proj", f"{own_attention}.output", bias=output_bias)
        if config.qk_norm:
            for other, own in (("q_norm", "query_norm"), ("k_norm", "key_norm")):
                name = f"{own_attention}.{own}.weight"
                yield rule(f"{attention}.{other}.weight", name, plus=plus)
        for name in ("gate", "up", "down"):
            own = f"{here}.feed_forward.{name}"
            yield from linear(f"{there}.mlp.{name}_proj", own, bias=config.bias)
    yield rule("norm.weight", "decoder.final_norm.weight", plus=plus)
