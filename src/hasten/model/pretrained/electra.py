"""ELECTRA (Clark et al. 2020): BERT whose embeddings may be narrower than its blocks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hasten.model.config import Head, TransformerConfig
from hasten.model.pretrained.bert import body_rules, config_of_encoder, options_of_encoder
from hasten.model.pretrained.family import Family, Given, Rule, classifier_rules, head_rules, linear


def _options(given: Given, head: Head) -> dict[str, Any]:
    given.ignore("generator_hidden_size")
    given.ignore("summary_type", "summary_use_proj", "summary_activation", "summary_last_dropout")
    width = given.take("embedding_size", given.need("hidden_size"))
    return {
        **options_of_encoder(given),
        "embedding_size": None if width == given.need("hidden_size") else width,
        "max_positions": given.need("max_position_embeddings"),
        "num_token_types": given.need("type_vocab_size"),
        "head_activation": "gelu" if head == "classification" else "none",
    }


def _config(config: TransformerConfig) -> dict[str, Any]:
    return {**config_of_encoder(config), "embedding_size": config.embedding_width}


def _rules(config: TransformerConfig) -> Iterator[Rule]:
    yield from body_rules(config)
    if config.embedding_width != config.hidden_size:
        yield from linear("embeddings_project", "encoder.projection")
    if config.head == "classification":
        yield from head_rules("classifier.dense", "head.dense")
        yield from classifier_rules("classifier.out_proj", "head.classifier")
    else:
        yield from head_rules("qa_outputs", "head.scorer")


ELECTRA = Family(
    name="ELECTRA",
    model_types=("electra",),
    architecture="encoder",
    prefix="electra.",
    classes={
        "classification": "ElectraForSequenceClassification",
        "span": "ElectraForQuestionAnswering",
    },
    options=_options,
    config=_config,
    rules=_rules,
    ignored=("embeddings.position_ids",),
)
