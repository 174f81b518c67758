"""The cases of decoders: windows are shorter than sequences, heads wider than their share."""

from __future__ import annotations

from typing import Any

import transformers
from pretrained_cases import LABELS, VOCABULARY, PretrainedCase

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 40,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "num_labels": LABELS,
    "initializer_range": 0.2,  # so that nonlinearities and bounds matter
}
_ALSO_GPT2 = ("vocab_size", "pad_token_id", "num_labels", "initializer_range")
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 10,
}  # fmt: skip
_YARN = {
    "rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0,
    "original_max_position_embeddings": 10,
}  # fmt: skip
_LINEAR = {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0}
_TWO_BASES = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
_GEMMA = {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 12}


def _case(name: str, kind: str, config: str, head: Any, **options: Any) -> PretrainedCase:
    return PretrainedCase(
        name, kind, lambda: getattr(transformers, config)(**{**_SIZES, **options}), head
    )


def _pair(name: str, stem: str, config: str, **options: Any) -> list[PretrainedCase]:
    scores = _case(name, f"{stem}ForCausalLM", config, "language_modelling", **options)
    kind = f"{config.removesuffix('Config')}ForSequenceClassification"
    return [scores, _case(f"{name}, classes", kind, config, "classification", **options)]


def _gpt2(name: str, kind: str, head: Any, **options: Any) -> PretrainedCase:
    def config() -> Any:
        shared = {name: _SIZES[name] for name in _ALSO_GPT2}
        sizes = {"n_embd": 24, "n_layer": 3, "n_head": 3, "n_positions": 40}
        return transformers.GPT2Config(**{**shared, **sizes, **options})

    return PretrainedCase(name, kind, config, head)


CASES: list[PretrainedCase] = [
    *_pair("Llama", "Llama", "LlamaConfig"),
    *_pair(
        "Llama, tied, biases, wide heads, llama3", "Llama", "LlamaConfig", head_dim=6,
        attention_bias=True, mlp_bias=True, tie_word_embeddings=True, rope_parameters=_LLAMA3,
    ),
    *_pair("Llama, linear", "Llama", "LlamaConfig", rope_parameters=_LINEAR),
    *_pair("Mistral", "Mistral", "MistralConfig", sliding_window=4, head_dim=6),
    *_pair("Mistral, all", "Mistral", "MistralConfig", sliding_window=None),
    *_pair("Qwen2", "Qwen2", "Qwen2Config", rope_parameters=_YARN),
    *_pair(
        "Qwen2, windows", "Qwen2", "Qwen2Config", use_sliding_window=True, sliding_window=4,
        max_window_layers=1, tie_word_embeddings=True,
    ),
    *_pair("Qwen3", "Qwen3", "Qwen3Config", head_dim=8),
    *_pair("Qwen3, biases", "Qwen3", "Qwen3Config", head_dim=8, attention_bias=True),
    _gpt2("GPT-2", "GPT2LMHeadModel", "language_modelling"),
    _gpt2("GPT-2, inner 40, relu", "GPT2LMHeadModel", "language_modelling", n_inner=40,
          activation_function="relu"),
    _gpt2("GPT-2, untied, unscaled", "GPT2LMHeadModel", "language_modelling",
          tie_word_embeddings=False, scale_attn_weights=False, activation_function="gelu"),
    _gpt2("GPT-2, classes", "GPT2ForSequenceClassification", "classification"),
    *_pair("Gemma 2", "Gemma2", "Gemma2Config", **_GEMMA, attn_logit_softcapping=2.0,
           final_logit_softcapping=3.0),
    *_pair(
        "Gemma 2, untied, biases, nothing bounded", "Gemma2", "Gemma2Config", **_GEMMA,
        tie_word_embeddings=False, attention_bias=True, rope_parameters=_YARN,
        attn_logit_softcapping=None, final_logit_softcapping=None, hidden_activation="silu",
        layer_types=["full_attention", "full_attention", "sliding_attention"],
    ),
    _case("Gemma 3", "Gemma3ForCausalLM", "Gemma3TextConfig", "language_modelling", **_GEMMA,
          rope_parameters=_TWO_BASES, layer_types=["sliding_attention", "full_attention"] * 2,
          num_hidden_layers=4),
    _case("Gemma 3, untied, biases, bounded", "Gemma3ForCausalLM", "Gemma3TextConfig",
          "language_modelling", **_GEMMA, tie_word_embeddings=False, attention_bias=True,
          final_logit_softcapping=2.0, layer_types=["full_attention"] * 3),
    _case("Gemma 3, classes", "Gemma3TextForSequenceClassification", "Gemma3TextConfig",
          "classification", **_GEMMA),
]  # fmt: skip
