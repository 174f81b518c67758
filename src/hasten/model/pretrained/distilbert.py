"""DistilBERT (Sanh et al. 2019): BERT without segments, its head a matrix and ReLU."""

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

_NORM_EPSILON = 1e-12  # config.json does not say it


def _options(given: Given, head: Head) -> dict[str, Any]:
    is_classifier = head == "classification"
    dropouts = {name: given.take(name, 0.1) for name in ("seq_classif_dropout", "qa_dropout")}
    # Whether the table of positions began as sinusoids; it is in the file either way.
    given.ignore("sinusoidal_pos_embds", "tie_weights_")
    return {
        "vocab_size": given.need("vocab_size"),
        "num_layers": given.need("n_layers"),
        "hidden_size": given.need("dim"),
        "num_heads": given.need("n_heads"),
        "feed_forward_size": given.need("hidden_dim"),
        "activation": given.activation("activation"),
        "norm_placement": "post",
        "norm_epsilon": _NORM_EPSILON,
        "positions": "learned",
        "max_positions": given.need("max_position_embeddings"),
        "dropout": given.take("dropout", 0.1),
        "attention_dropout": given.take("attention_dropout", 0.1),
        "head_dropout": dropouts["seq_classif_dropout" if is_classifier else "qa_dropout"],
        "initializer_std": given.take("initializer_range", 0.02),
        "pooling": "first",
        "head_activation": "relu" if is_classifier else "none",
    }


def _config(config: TransformerConfig) -> dict[str, Any]:
    head_dropout = config.dropout if config.head_dropout is None else config.head_dropout
    return {
        "vocab_size": config.vocab_size,
        "n_layers": config.num_layers,
        "dim": config.hidden_size,
        "n_heads": config.num_heads,
        "hidden_dim": config.inner_size,
        "activation": written_activation(config.activation),
        "max_position_embeddings": config.max_positions,
        "dropout": config.dropout,
        "attention_dropout": config.attention_dropout,
        "seq_classif_dropout": head_dropout,
        "qa_dropout": head_dropout,
        "initializer_range": config.initializer_std,
    }


def _rules(config: TransformerConfig) -> Iterator[Rule]:
    yield rule("embeddings.word_embeddings.weight", "embedding.tokens.weight")
    yield rule("embeddings.position_embeddings.weight", "encoder.positions.weight")
    yield from linear("embeddings.LayerNorm", "encoder.embedding_norm")
    for i in range(config.num_layers):
        there, here = f"transformer.layer.{i}", f"encoder.blocks.{i}"
        for other, own in (("q", "query"), ("k", "key"), ("v", "value"), ("out", "output")):
            yield from linear(f"{there}.attention.{other}_lin", f"{here}.attention.{own}")
        yield from linear(f"{there}.sa_layer_norm", f"{here}.attention_norm")
        yield from linear(f"{there}.ffn.lin1", f"{here}.feed_forward.up")
        yield from linear(f"{there}.ffn.lin2", f"{here}.feed_forward.down")
        yield from linear(f"{there}.output_layer_norm", f"{here}.feed_forward_norm")
    if config.head == "classification":
        yield from head_rules("pre_classifier", "head.dense")
        yield from classifier_rules("classifier", "head.classifier")
    else:
        yield from head_rules("qa_outputs", "head.scorer")


DISTILBERT = Family(
    name="DistilBERT",
    model_types=("distilbert",),
    architecture="encoder",
    prefix="distilbert.",
    classes={
        "classification": "DistilBertForSequenceClassification",
        "span": "DistilBertForQuestionAnswering",
    },
    options=_options,
    config=_config,
    rules=_rules,
)
