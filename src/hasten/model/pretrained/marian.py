"""Marian (Junczys-Dowmunt et al. 2018), as OPUS-MT's translation models: the Transformer of 2017.

Norms follow the sums, and positions are sines and cosines in two halves, which no file needs to
hold. Source and target share their embeddings, or have a vocabulary each.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hasten.model.config import Head, TransformerConfig
from hasten.model.pretrained.bart import (
    bias_rules,
    config_of_pair,
    options_of_pair,
    shared_embedding,
    stack_rules,
)
from hasten.model.pretrained.family import Family, Given, Rule, rule


def _options(given: Given, head: Head) -> dict[str, Any]:
    given.expect("normalize_embedding", False)
    options = {
        **options_of_pair(given, "post"),
        "positions": "sinusoidal",
        "sinusoids": "halves",
        "embedding_norm": False,
        "logit_bias": True,
    }
    size = options["vocab_size"]
    if given.take("share_encoder_decoder_embeddings", True):
        given.expect("decoder_vocab_size", size, None)
        given.expect("tie_word_embeddings", True)
        return options
    return {
        **options,
        "vocab_size": given.take("decoder_vocab_size") or size,
        "source_vocab_size": size,
        "tie_embeddings": given.take("tie_word_embeddings", True),
    }


def _config(config: TransformerConfig) -> dict[str, Any]:
    return {
        **config_of_pair(config),
        "vocab_size": config.source_vocab_size or config.vocab_size,
        "decoder_vocab_size": config.vocab_size,
        "share_encoder_decoder_embeddings": config.source_vocab_size is None,
        "pad_token_id": None,  # that of transformers is beyond small vocabularies
    }


def _rules(config: TransformerConfig) -> Iterator[Rule]:
    if config.source_vocab_size is None:
        yield from shared_embedding()
    else:
        copies = ("lm_head.weight",) if config.tie_embeddings else ()
        yield rule("encoder.embed_tokens.weight", "source_embedding.tokens.weight")
        yield rule("decoder.embed_tokens.weight", "embedding.tokens.weight", aliases=copies)
        if not config.tie_embeddings:
            yield rule("lm_head.weight", "head.scorer.weight", is_outside=True, is_optional=True)
    yield from stack_rules(config)
    yield from bias_rules()


MARIAN = Family(
    name="Marian",
    model_types=("marian",),
    architecture="encoder_decoder",
    prefix="model.",
    classes={"language_modelling": "MarianMTModel"},
    options=_options,
    config=_config,
    rules=_rules,
    ignored=("encoder.embed_positions.weight", "decoder.embed_positions.weight"),
)
