"""The cases of encoder-decoders: their sides differ in depth, heads may be wider than D / H."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from pretrained_cases import VOCABULARY, PretrainedCase

START, PAD, END = 4, 1, 2
"""Token numbers; no batch of the cases has padding in it, so that positions agree."""

_TOKENS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "pad_token_id": PAD,
    "bos_token_id": 3,
    "eos_token_id": END,
    "decoder_start_token_id": START,
}
_BART: dict[str, Any] = {
    **_TOKENS,
    "d_model": 24,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 3,
    "decoder_attention_heads": 3,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40,
    "max_position_embeddings": 40,
    "forced_eos_token_id": None,
}
_T5: dict[str, Any] = {
    **_TOKENS,
    "d_model": 24,
    "d_kv": 10,
    "d_ff": 40,
    "num_layers": 3,
    "num_decoder_layers": 2,  # transformers cannot generate with a deeper one
    "num_heads": 3,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
}
_T5_KIND, _MARIAN_KIND = "T5ForConditionalGeneration", "MarianMTModel"


@dataclass(frozen=True)
class Untied(PretrainedCase):
    """A model that scores tokens by a matrix of its own, whatever its class does by itself."""

    def build(self) -> Any:
        """Returns the model of transformers."""
        model = super().build()
        weight = torch.randn_like(model.lm_head.weight) * 0.5
        model.lm_head.weight = torch.nn.Parameter(weight)
        model.all_tied_weights_keys.pop("lm_head.weight", None)
        return model


def _case(
    name: str, kind: str, config: str, sizes: dict[str, Any], *, tied: bool = True, **options: Any
) -> PretrainedCase:
    make = PretrainedCase if tied else Untied
    return make(
        name,
        kind,
        lambda: getattr(transformers, config)(**{**sizes, **options}),
        "language_modelling",
    )


def _bart(name: str, kind: str, config: str, **options: Any) -> PretrainedCase:
    return _case(name, kind, config, _BART, **options)


def _t5(name: str, **options: Any) -> PretrainedCase:
    return _case(name, _T5_KIND, "T5Config", _T5, **options)


def _mt5(name: str, **options: Any) -> PretrainedCase:
    return _case(name, "MT5ForConditionalGeneration", "MT5Config", _T5, **options)


CASES: list[PretrainedCase] = [
    _t5("T5 1.0"),
    _t5("T5 1.1", tied=False, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    _t5("T5, one matrix, not scaled", feed_forward_proj="gated-silu", tie_word_embeddings=False),
    _mt5("mT5"),
    _mt5("mT5, a matrix of its own", tied=False, tie_word_embeddings=False),
    _bart("BART", "BartForConditionalGeneration", "BartConfig"),
    _bart(
        "BART, scaled", "BartForConditionalGeneration", "BartConfig", scale_embedding=True,
        activation_function="relu",
    ),
    _bart("mBART", "MBartForConditionalGeneration", "MBartConfig", scale_embedding=True),
    _bart(
        "Marian", _MARIAN_KIND, "MarianConfig", scale_embedding=True, activation_function="swish"
    ),
    _bart(
        "Marian, two vocabularies", _MARIAN_KIND, "MarianConfig", vocab_size=VOCABULARY + 6,
        decoder_vocab_size=VOCABULARY, share_encoder_decoder_embeddings=False,
    ),
    _bart(
        "Marian, two vocabularies and a matrix", _MARIAN_KIND, "MarianConfig",
        decoder_vocab_size=VOCABULARY, share_encoder_decoder_embeddings=False,
        tie_word_embeddings=False, tied=False,
    ),
    _bart("M2M100", "M2M100ForConditionalGeneration", "M2M100Config"),
    _bart("NLLB", "M2M100ForConditionalGeneration", "M2M100Config", scale_embedding=False),
]  # fmt: skip
