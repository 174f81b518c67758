"""The cases of encoders."""

from __future__ import annotations

from typing import Any

import transformers
from pretrained_cases import LABELS, VOCABULARY, PretrainedCase

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 40,
    "num_labels": LABELS,
}


def _case(name: str, kind: str, config: str, head: Any, **options: Any) -> PretrainedCase:
    if head == "span":
        options = {**options, "num_labels": 2}
    return PretrainedCase(
        name, kind, lambda: getattr(transformers, config)(**{**_SIZES, **options}), head
    )


def _distilbert(head: Any) -> PretrainedCase:
    kind = "SequenceClassification" if head == "classification" else "QuestionAnswering"

    def config() -> Any:
        return transformers.DistilBertConfig(
            vocab_size=VOCABULARY, dim=24, n_layers=3, n_heads=3, hidden_dim=40,
            max_position_embeddings=40, num_labels=LABELS if head == "classification" else 2,
        )  # fmt: skip

    return PretrainedCase(f"DistilBERT {head}", f"DistilBertFor{kind}", config, head)


_KINDS = (("classification", "SequenceClassification"), ("span", "QuestionAnswering"))
_ROTARY = {
    "full_attention": {"rope_type": "default", "rope_theta": 160_000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
}

CASES: list[PretrainedCase] = []
for _head, _kind in _KINDS:
    CASES += [
        _case(f"BERT {_head}", f"BertFor{_kind}", "BertConfig", _head),
        _case(f"RoBERTa {_head}", f"RobertaFor{_kind}", "RobertaConfig", _head, type_vocab_size=1),
        _case(
            f"XLM-RoBERTa {_head}", f"XLMRobertaFor{_kind}", "XLMRobertaConfig", _head,
            type_vocab_size=1, hidden_act="gelu_new",
        ),
        _distilbert(_head),
        _case(f"ELECTRA {_head}", f"ElectraFor{_kind}", "ElectraConfig", _head, embedding_size=16),
        _case(
            f"ELECTRA, one width, {_head}", f"ElectraFor{_kind}", "ElectraConfig", _head,
            embedding_size=24, hidden_act="relu",
        ),
        _case(
            f"ModernBERT {_head}", f"ModernBertFor{_kind}", "ModernBertConfig", _head,
            local_attention=6, pad_token_id=1, rope_parameters=_ROTARY,
        ),
        _case(
            f"ModernBERT, biases, mean, {_head}", f"ModernBertFor{_kind}", "ModernBertConfig",
            _head, local_attention=4, pad_token_id=1, norm_bias=True, mlp_bias=True,
            classifier_bias=True, attention_bias=True, classifier_pooling="mean",
            hidden_activation="silu",
        ),
    ]  # fmt: skip
