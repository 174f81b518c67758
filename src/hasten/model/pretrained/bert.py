"""BERT (Devlin et al. 2019): an encoder with norms after the sums, learned positions and segments.

The pooler, a matrix and tanh on the first token, is the inner layer of our classification head.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hasten.model.config import Head, TransformerConfig
from hasten.model.pretrained.family import (
    Family,
    Given,
    Rule,
    classifier_rules,
    head_rules,
    linear,
    rule,
    written_activation,
)

_POOLER = (
    "pooler_fc_size",
    "pooler_num_attention_heads",
    "pooler_num_fc_layers",
    "pooler_size_per_head",
    "pooler_type",
)


def options_of_encoder(given: Given) -> dict[str, Any]:
    """Returns what BERT and its nearest kin say in the same words."""
    given.expect("position_embedding_type", "absolute")
    # A pooler that no class of transformers has; it stands in the multilingual and Chinese BERT.
    given.ignore(*_POOLER, "directionality")
    return {
        "vocab_size": given.need("vocab_size"),
        "num_layers": given.need("num_hidden_layers"),
        "hidden_size": given.need("hidden_size"),
        "num_heads": given.need("num_attention_heads"),
        "feed_forward_size": given.need("intermediate_size"),
        "activation": given.activation("hidden_act"),
        "norm_placement": "post",
        "norm_epsilon": float(given.take("layer_norm_eps", 1e-12)),
        "positions": "learned",
        "dropout": given.take("hidden_dropout_prob", 0.1),
        "attention_dropout": given.take("attention_probs_dropout_prob", 0.1),
        "head_dropout": given.take("classifier_dropout"),
        "initializer_std": given.take("initializer_range", 0.02),
        "pooling": "first",
    }


def config_of_encoder(config: TransformerConfig) -> dict[str, Any]:
    """Returns the same as config.json."""
    return {
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.inner_size,
        "hidden_act": written_activation(config.activation),
        "layer_norm_eps": config.norm_epsilon,
        "position_embedding_type": "absolute",
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
        "classifier_dropout": config.head_dropout,
        "initializer_range": config.initializer_std,
        "max_position_embeddings": config.max_positions + config.position_offset,
        "type_vocab_size": config.num_token_types or 1,  # there is always a table
    }


def body_rules(config: TransformerConfig) -> Iterator[Rule]:
    """Yields the rules of embeddings and blocks, which RoBERTa and ELECTRA share."""
    yield rule("embeddings.word_embeddings.weight", "embedding.tokens.weight")
    yield rule("embeddings.position_embeddings.weight", "encoder.positions.weight")
    yield rule("embeddings.token_type_embeddings.weight", "embedding.token_types.weight")
    yield from _norm("embeddings.LayerNorm", "encoder.embedding_norm")
    for i in range(config.num_layers):
        there, here = f"encoder.layer.{i}", f"encoder.blocks.{i}"
        for name in ("query", "key", "value"):
            yield from linear(f"{there}.attention.self.{name}", f"{here}.attention.{name}")
        yield from linear(f"{there}.attention.output.dense", f"{here}.attention.output")
        yield from _norm(f"{there}.attention.output.LayerNorm", f"{here}.attention_norm")
        yield from linear(f"{there}.intermediate.dense", f"{here}.feed_forward.up")
        yield from linear(f"{there}.output.dense", f"{here}.feed_forward.down")
        yield from _norm(f"{there}.output.LayerNorm", f"{here}.feed_forward_norm")


def _norm(other: str, own: str) -> Iterator[Rule]:
    """Yields the rules of a norm; files that come from TensorFlow have its old names."""
    yield rule(f"{other}.weight", f"{own}.weight", aliases=(f"{other}.gamma",))
    yield rule(f"{other}.bias", f"{own}.bias", aliases=(f"{other}.beta",))


def _options(given: Given, head: Head) -> dict[str, Any]:
    return {
        **options_of_encoder(given),
        "max_positions": given.need("max_position_embeddings"),
        "num_token_types": given.need("type_vocab_size"),
        "head_activation": "tanh" if head == "classification" else "none",
    }


def _rules(config: TransformerConfig) -> Iterator[Rule]:
    yield from body_rules(config)
    if config.head == "classification":
        yield from linear("pooler.dense", "head.dense", is_optional=True)
        yield from classifier_rules("classifier", "head.classifier")
    else:
        yield from head_rules("qa_outputs", "head.scorer")


BERT = Family(
    name="BERT",
    model_types=("bert",),
    architecture="encoder",
    prefix="bert.",
    classes={
        "classification": "BertForSequenceClassification",
        "span": "BertForQuestionAnswering",
    },
    options=_options,
    config=config_of_encoder,
    rules=_rules,
    ignored=("embeddings.position_ids",),
)
