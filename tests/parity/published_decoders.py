"""config.json files of well-known decoders as they were published, and what they mean here.

Written by versions of transformers from 4.30 to 4.55, before ``rope_parameters``.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from hasten.model.config import RotaryScaling


@dataclass(frozen=True)
class Published:
    """One checkpoint.

    Attributes:
        name: on the hub.
        text: of its config.json.
        means: some of the fields of ``TransformerConfig``, those that are easily got wrong.
        written_as: family that our model is written as.
    """

    name: str
    text: str
    means: dict[str, Any]
    written_as: str

    @property
    def content(self) -> dict[str, Any]:
        """The object of the file."""
        return json.loads(self.text)


def _llama3(factor: float) -> RotaryScaling:
    return RotaryScaling("llama3", factor, 8192, 1.0, 4.0)


PUBLISHED = (
    Published(
        "gpt2",
        """{"activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": 0.1, "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256,
        "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "gpt2",
        "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024,
        "resid_pdrop": 0.1, "summary_activation": null, "summary_first_dropout": 0.1,
        "summary_proj_to_labels": true, "summary_type": "cls_index", "summary_use_proj": true,
        "task_specific_params": {"text-generation": {"do_sample": true, "max_length": 50}},
        "vocab_size": 50257}""",
        {
            "activation": "gelu_tanh", "positions": "learned", "max_positions": 1024,
            "tie_embeddings": True, "dropout": 0.1, "bias": True,
        },
        "GPT-2",
    ),
    Published(
        "meta-llama/Llama-2-7b",
        """{"architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
        "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
        "intermediate_size": 11008, "max_position_embeddings": 4096, "model_type": "llama",
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": null,
        "tie_word_embeddings": false, "torch_dtype": "float16",
        "transformers_version": "4.31.0.dev0", "use_cache": true, "vocab_size": 32000}""",
        {"tie_embeddings": False, "rotary_base": 10000.0, "bias": False, "activation": "swiglu"},
        "Llama",
    ),
    Published(
        "meta-llama/Llama-3.1-8B",
        """{"architectures": ["LlamaForCausalLM"], "attention_bias": false,
        "attention_dropout": 0.0, "bos_token_id": 128000, "eos_token_id": 128001,
        "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
        "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": false,
        "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3"}, "rope_theta": 500000.0,
        "tie_word_embeddings": false, "torch_dtype": "bfloat16",
        "transformers_version": "4.43.0.dev0", "use_cache": true, "vocab_size": 128256}""",
        {"rotary_scaling": _llama3(8.0), "rotary_base": 500000.0, "num_kv_heads": 8},
        "Llama",
    ),
    Published(
        "meta-llama/Llama-3.2-1B",
        """{"architectures": ["LlamaForCausalLM"], "attention_bias": false,
        "attention_dropout": 0.0, "bos_token_id": 128000, "eos_token_id": 128001, "head_dim": 64,
        "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
        "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": false,
        "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16,
        "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3"}, "rope_theta": 500000.0,
        "tie_word_embeddings": true, "torch_dtype": "bfloat16",
        "transformers_version": "4.45.0.dev0", "use_cache": true, "vocab_size": 128256}""",
        {"rotary_scaling": _llama3(32.0), "tie_embeddings": True, "head_dim": 64},
        "Llama",
    ),
    Published(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        """{"architectures": ["LlamaForCausalLM"], "attention_bias": false,
        "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
        "hidden_size": 576, "initializer_range": 0.041666666666666664, "intermediate_size": 1536,
        "is_llama_config": true, "max_position_embeddings": 8192, "mlp_bias": false,
        "model_type": "llama", "num_attention_heads": 9, "num_hidden_layers": 30,
        "num_key_value_heads": 3, "pad_token_id": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_interleaved": false, "rope_scaling": null, "rope_theta": 100000,
        "tie_word_embeddings": true, "torch_dtype": "bfloat16",
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
        "transformers_version": "4.42.3", "use_cache": true, "vocab_size": 49152}""",
        {"tie_embeddings": True, "rotary_base": 100000.0, "num_kv_heads": 3},
        "Llama",
    ),
    Published(
        "mistralai/Mistral-7B-v0.1",
        """{"architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
        "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
        "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral",
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096,
        "tie_word_embeddings": false, "torch_dtype": "bfloat16",
        "transformers_version": "4.34.0.dev0", "use_cache": true, "vocab_size": 32000}""",
        {"sliding_window": 4096, "global_layers": (), "tie_embeddings": False},
        "Mistral",
    ),
    Published(
        "mistralai/Mistral-Nemo-Base-2407",
        """{"architectures": ["MistralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1,
        "eos_token_id": 2, "head_dim": 128, "hidden_act": "silu", "hidden_size": 5120,
        "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 128000,
        "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 40,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
        "sliding_window": null, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
        "transformers_version": "4.43.0.dev0", "use_cache": true, "vocab_size": 131072}""",
        {"sliding_window": 0, "head_dim": 128},
        "Llama",  # without a window they are the same
    ),
    Published(
        "Qwen/Qwen2.5-0.5B",
        """{"architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0,
        "bos_token_id": 151643, "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 896,
        "initializer_range": 0.02, "intermediate_size": 4864, "max_position_embeddings": 32768,
        "max_window_layers": 24, "model_type": "qwen2", "num_attention_heads": 14,
        "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": true,
        "torch_dtype": "bfloat16", "transformers_version": "4.40.1", "use_cache": true,
        "use_mrope": false, "use_sliding_window": false, "vocab_size": 151936}""",
        {"sliding_window": 0, "qkv_bias": True, "bias": False, "tie_embeddings": True},
        "Qwen2",
    ),
    Published(
        "Qwen/Qwen3-0.6B, stretched as its card says",
        """{"architectures": ["Qwen3ForCausalLM"], "attention_bias": false,
        "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128,
        "hidden_act": "silu", "hidden_size": 1024, "initializer_range": 0.02,
        "intermediate_size": 3072, "max_position_embeddings": 131072, "max_window_layers": 28,
        "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0,
        "original_max_position_embeddings": 32768}, "rope_theta": 1000000, "sliding_window": null,
        "tie_word_embeddings": true, "torch_dtype": "bfloat16", "transformers_version": "4.51.0",
        "use_cache": true, "use_sliding_window": false, "vocab_size": 151936}""",
        {"qk_norm": True, "head_dim": 128, "rotary_scaling": RotaryScaling("yarn", 4.0, 32768)},
        "Qwen3",
    ),
    Published(
        "google/gemma-2-9b",
        """{"architectures": ["Gemma2ForCausalLM"], "attention_bias": false,
        "attention_dropout": 0.0, "attn_logit_softcapping": 50.0, "bos_token_id": 2,
        "cache_implementation": "hybrid", "eos_token_id": 1, "final_logit_softcapping": 30.0,
        "head_dim": 256, "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 3584, "initializer_range": 0.02,
        "intermediate_size": 14336, "max_position_embeddings": 8192, "model_type": "gemma2",
        "num_attention_heads": 16, "num_hidden_layers": 42, "num_key_value_heads": 8,
        "pad_token_id": 0, "query_pre_attn_scalar": 224, "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0, "sliding_window": 4096, "sliding_window_size": 4096,
        "torch_dtype": "float32", "transformers_version": "4.42.0.dev0", "use_cache": true,
        "vocab_size": 256000}""",
        {
            "norm_placement": "sandwich", "attention_softcap": 50.0, "logit_softcap": 30.0,
            "attention_scale": 224**-0.5, "embedding_scale": math.sqrt(3584),
            "global_layers": tuple(range(1, 42, 2)), "sliding_window": 4096,
            "tie_embeddings": True, "activation": "geglu_tanh",
        },
        "Gemma 2",
    ),
    Published(
        "google/gemma-3-1b-pt",
        """{"architectures": ["Gemma3ForCausalLM"], "attention_bias": false,
        "attention_dropout": 0.0, "attn_logit_softcapping": null, "bos_token_id": 2,
        "cache_implementation": "hybrid", "eos_token_id": [1, 106],
        "final_logit_softcapping": null, "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "initializer_range": 0.02,
        "intermediate_size": 6912, "max_position_embeddings": 32768, "model_type": "gemma3_text",
        "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1,
        "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000, "rope_scaling": null, "rope_theta": 1000000,
        "sliding_window": 512, "sliding_window_pattern": 6, "torch_dtype": "bfloat16",
        "transformers_version": "4.50.0.dev0", "use_cache": true, "vocab_size": 262144}""",
        {
            "rotary_base": 1e6, "local_rotary_base": 1e4, "global_layers": (5, 11, 17, 23),
            "attention_softcap": 0.0, "logit_softcap": 0.0, "qk_norm": True, "num_kv_heads": 1,
        },
        "Gemma 3",
    ),
    Published(
        "the text model of google/gemma-3-4b-pt",
        """{"architectures": ["Gemma3ForCausalLM"], "_sliding_window_pattern": 6,
        "attention_bias": false, "attention_dropout": 0.0, "attn_logit_softcapping": null,
        "final_logit_softcapping": null, "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2560, "initializer_range": 0.02,
        "intermediate_size": 10240, "layer_types": ["sliding_attention", "sliding_attention",
        "sliding_attention", "sliding_attention", "sliding_attention", "full_attention",
        "sliding_attention", "sliding_attention"], "max_position_embeddings": 131072,
        "model_type": "gemma3_text", "num_attention_heads": 8, "num_hidden_layers": 8,
        "num_key_value_heads": 4, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000.0, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "rope_theta": 1000000.0, "sliding_window": 1024, "torch_dtype": "bfloat16",
        "transformers_version": "4.55.0", "use_bidirectional_attention": false,
        "use_cache": true, "vocab_size": 262208}""",
        {
            "rotary_scaling": RotaryScaling("linear", 8.0), "rotary_base": 1e6,
            "local_rotary_base": 1e4, "global_layers": (5,),
        },
        "Gemma 3",
    ),
)  # fmt: skip
