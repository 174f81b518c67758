"""M2M100 (Fan et al. 2021) and NLLB (Costa-jussa et al. 2022): translation between many languages.

Norms come before the branches. Positions are the sines and cosines of tensor2tensor, with as many
rows before the first as the padding token's number and one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hasten.model.config import Head, TransformerConfig
from hasten.model.pretrained.bart import (
    config_of_pair,
    options_of_pair,
    shared_embedding,
    stack_rules,
)
from hasten.model.pretrained.family import Family, Given, Rule


def _options(given: Given, head: Head) -> dict[str, Any]:
    given.expect("normalize_embedding", False)
    given.expect("tie_word_embeddings", True)
    return {
        **options_of_pair(given, "pre"),
        "positions": "sinusoidal",
        "sinusoids": "tensor2tensor",
        "position_offset": given.take("pad_token_id", 1) + 1,
        "embedding_norm": False,
    }


def _config(config: TransformerConfig) -> dict[str, Any]:
    return {**config_of_pair(config), "pad_token_id": max(config.position_offset - 1, 0)}


def _rules(config: TransformerConfig) -> Iterator[Rule]:
    yield from shared_embedding()
    yield from stack_rules(config)


M2M100 = Family(
    name="M2M100",
    model_types=("m2m_100",),
    architecture="encoder_decoder",
    prefix="model.",
    classes={"language_modelling": "M2M100ForConditionalGeneration"},
    options=_options,
    config=_config,
    rules=_rules,
    ignored=("encoder.embed_positions.weights", "decoder.embed_positions.weights"),
)
