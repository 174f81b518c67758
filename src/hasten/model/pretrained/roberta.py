"""RoBERTa (Liu et al. 2019) and XLM-RoBERTa (Conneau et al. 2020): BERT whose positions begin late.

The table of positions has as many rows before the first as the padding token's number and one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hasten.model.config import Head, TransformerConfig
from hasten.model.pretrained.bert import body_rules, config_of_encoder, options_of_encoder
from hasten.model.pretrained.family import Family, Given, Rule, classifier_rules, head_rules


def _options(given: Given, head: Head) -> dict[str, Any]:
    offset = given.take("pad_token_id", 1) + 1
    return {
        **options_of_encoder(given),
        "max_positions": given.need("max_position_embeddings") - offset,
        "position_offset": offset,
        "num_token_types": given.need("type_vocab_size"),
        "head_activation": "tanh" if head == "classification" else "none",
    }


def _config(config: TransformerConfig) -> dict[str, Any]:
    return {**config_of_encoder(config), "pad_token_id": config.position_offset - 1}


def _rules(config: TransformerConfig) -> Iterator[Rule]:
    yield from body_rules(config)
    if config.head == "classification":
        yield from head_rules("classifier.dense", "head.dense")
        yield from classifier_rules("classifier.out_proj", "head.classifier")
    else:
        yield from head_rules("qa_outputs", "head.scorer")


ROBERTA = Family(
    name="RoBERTa",
    model_types=("roberta", "xlm-roberta", "camembert"),
    architecture="encoder",
    prefix="roberta.",
    classes={
        "classification": "RobertaForSequenceClassification",
        "span": "RobertaForQuestionAnswering",
    },
    options=_options,
    config=_config,
    rules=_rules,
    ignored=("embeddings.position_ids", "pooler.dense.*"),
)
