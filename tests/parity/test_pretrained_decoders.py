"""Decoders of transformers give the same outputs, loss, gradients and texts here, and back."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from pretrained_cases import VOCABULARY, PretrainedCase, compare
from pretrained_decoders import CASES
from published_decoders import PUBLISHED, Published
from safetensors.torch import load_file, save_file

from builders import pack
from hasten.core.errors import DamagedError, HastenError, UsageError
from hasten.model.config import Head, TransformerConfig
from hasten.model.decoding import CachedDecoder
from hasten.model.pretrained.reading import INDEX, load_pretrained
from hasten.model.pretrained.registry import family_of
from hasten.model.pretrained.writing import config_json, family_for
from hasten.model.sampling import DecodingSettings
from hasten.model.search import Request, generate

TOLERANCE = 1e-4
SCORING = [case for case in CASES if case.head == "language_modelling"]
BY_NAME = {one.name: one for one in PUBLISHED}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_model_of_transformers_is_the_same_here_and_back(case: PretrainedCase, tmp_path: Path):
    found = compare(case, tmp_path)
    assert max(found.outputs, found.loss, found.gradients, found.back) <= TOLERANCE, found


@pytest.mark.parametrize("case", SCORING, ids=lambda case: case.name)
def test_greedy_texts_are_those_of_transformers(case: PretrainedCase, tmp_path: Path):
    theirs = case.build()
    theirs.save_pretrained(tmp_path)
    ours = load_pretrained(tmp_path, head="language_modelling").model.eval()
    theirs.generation_config.eos_token_id = None  # all of them, whatever comes
    new, prompts = 16, ([7, 21, 40], [33, 9, 50, 12, 60, 18, 5, 44, 23])
    settings = DecodingSettings(max_new_tokens=new)
    batch = pack([torch.tensor(prompt) for prompt in prompts])
    requests = [Request(number, prompt) for number, prompt in enumerate(prompts)]
    texts = generate(CachedDecoder(ours, batch), settings, requests, end_ids=frozenset())
    for prompt, (text,) in zip(prompts, texts, strict=True):
        there = theirs.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=new)
        assert [*text.token_ids] == there[0, len(prompt) :].tolist()
        # As the cache made it and as no cache does.
        with torch.no_grad():
            logs = theirs(there).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        score = logs.gather(1, there[0, len(prompt) :, None]).sum()
        assert abs(text.score - score) <= TOLERANCE * abs(score)


def test_shards_are_read_as_one_file(tmp_path: Path):
    theirs = SCORING[0].build()
    theirs.save_pretrained(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "many", max_shard_size="8KB")
    assert len({*json.loads((tmp_path / "many" / INDEX).read_text())["weight_map"].values()}) > 2
    one, many = (load_pretrained(tmp_path / n, head="language_modelling") for n in ("one", "many"))
    assert not many.missing and not many.unexpected
    for name, tensor in one.model.state_dict().items():
        assert torch.equal(tensor, many.model.state_dict()[name]), name


def test_a_scorer_of_tokens_has_no_place_in_a_classifier_and_is_listed(tmp_path: Path):
    SCORING[0].build().save_pretrained(tmp_path)
    loaded = load_pretrained(tmp_path, head="classification", num_labels=2)
    assert loaded.missing == ("head.classifier.weight",)
    assert loaded.unexpected == ("lm_head.weight",)


def test_a_tied_matrix_may_lie_there_twice_and_masks_mean_nothing(tmp_path: Path):
    theirs = next(case for case in SCORING if case.name == "GPT-2").build()
    theirs.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    tensors["lm_head.weight"] = tensors["wte.weight"].clone()
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 40, 40).tril()
    tensors["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, weights)
    loaded = load_pretrained(tmp_path, head="language_modelling")
    assert not loaded.missing and not loaded.unexpected
    tokens = loaded.model.state_dict()["embedding.tokens.weight"]
    assert torch.equal(tokens, theirs.transformer.wte.weight)


def read(content: dict[str, Any], head: Head = "language_modelling") -> TransformerConfig:
    options = family_of(content, "config.json").read(content, head, "config.json")
    found = TransformerConfig(**options)
    sizes = {"head_dim": found.head_size, "num_kv_heads": found.kv_heads}
    return dataclasses.replace(found, **sizes)  # which files may leave to be computed


def rewritten(content: dict[str, Any]) -> dict[str, Any]:
    """Returns config.json as transformers writes it after reading this one."""
    kind = transformers.CONFIG_MAPPING[content["model_type"]]
    return json.loads(kind.from_dict(content).to_json_string())


@pytest.mark.parametrize("head", ["language_modelling", "classification"])
@pytest.mark.parametrize("one", PUBLISHED, ids=lambda one: one.name)
def test_published_files_mean_what_transformers_makes_of_them(one: Published, head: Head):
    config = read(one.content, head)
    if head == "language_modelling":
        assert {name: getattr(config, name) for name in one.means} == one.means
    again = rewritten(one.content)
    assert one.content["model_type"] == "gpt2" or "rope_parameters" in again
    assert read(again, head) == config


@pytest.mark.parametrize("one", PUBLISHED, ids=lambda one: one.name)
def test_transformers_reads_what_is_written(one: Published):
    config = read(one.content)
    family = family_for(config)
    assert family.name == one.written_as
    written = config_json(family, config, {})
    assert read(rewritten(written)) == read(written)
    assert family_for(read(written)) is family


_GPT2, _LLAMA, _MISTRAL = "gpt2", "meta-llama/Llama-3.1-8B", "mistralai/Mistral-7B-v0.1"
_QWEN2, _QWEN3 = "Qwen/Qwen2.5-0.5B", "Qwen/Qwen3-0.6B, stretched as its card says"
_GEMMA2, _GEMMA3 = "google/gemma-2-9b", "google/gemma-3-1b-pt"
_HALF = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
_SCALED = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
_BOTH_SCALED = {"full_attention": _SCALED, "sliding_attention": _SCALED}
_REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (_GPT2, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
    (_GPT2, {"embd_pdrop": 0.3}, "embd_pdrop is 0.3"),
    (_GPT2, {"n_ctx": 512}, "n_ctx is 512"),
    (_GPT2, {"add_cross_attention": True}, "add_cross_attention"),
    (_GPT2, {"activation_function": "tanh"}, "activation_function is 'tanh'"),
    (_LLAMA, {"rope_interleaved": True}, "rope_interleaved is True"),
    (_LLAMA, {"hidden_act": "relu"}, "hidden_act is 'relu'"),
    (_LLAMA, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
    (_LLAMA, {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta": 1}}, "'beta': 1"),
    (_LLAMA, {"rope_scaling": None, "rope_parameters": _HALF}, "'partial_rotary_factor': 0.5"),
    (_LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    (_LLAMA, {"quantization_config": {"bits": 4}}, "quantization_config"),
    (_LLAMA, {"sliding_window": 4096}, "sliding_window"),
    (_MISTRAL, {"attention_bias": True}, "attention_bias"),
    (_MISTRAL, {"layer_types": ["full_attention"] * 32}, "layer_types"),
    (_QWEN2, {"use_mrope": True}, "use_mrope is True"),
    (_QWEN2, {"layer_types": ["sliding_attention"] * 24}, "there is no window"),
    (_QWEN3, {"layer_types": ["chunked_attention"] * 28}, "layer_types is"),
    (_QWEN3, {"layer_types": ["full_attention"] * 3}, "layer_types is"),
    (_QWEN3, {"num_experts": 8}, "num_experts"),
    (_GEMMA2, {"sliding_window_size": 1024}, "sliding_window_size is 1024"),
    (_GEMMA2, {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
    (_GEMMA2, {"hidden_activation": "relu"}, "hidden_activation is 'relu'"),
    (_GEMMA3, {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
    (_GEMMA3, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
    (_GEMMA3, {"rope_parameters": _BOTH_SCALED}, "'sliding_attention' are scaled"),
    (_GEMMA3, {"rope_parameters": _SCALED}, "rope_parameters has others"),
    (_GEMMA3, {"model_type": "gemma3"}, "model_type is 'gemma3'"),
]


@pytest.mark.parametrize(
    ("name", "values", "message"), _REFUSED, ids=lambda one: one if isinstance(one, str) else ""
)
def test_what_is_not_honoured_is_named(name: str, values: dict[str, Any], message: str):
    content = BY_NAME[name].content
    read(content)
    with pytest.raises(UsageError) as error:
        read({**content, **values})
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "values",
    [
        {"num_hidden_layers": 10**12},
        {"num_hidden_layers": "26"},
        {"rms_norm_eps": None},
        {"query_pre_attn_scalar": 0},
        {"layer_types": 7},
        {"rope_parameters": [1]},
        {"rope_local_base_freq": "local"},
        {"sliding_window_pattern": "6"},
        {"sliding_window": 0},
    ],
    ids=str,
)
def test_values_without_sense_are_one_line(values: dict[str, Any]):
    with pytest.raises(HastenError) as error:
        read({**BY_NAME[_GEMMA3].content, **values})
    assert isinstance(error.value, UsageError | DamagedError)
    assert "config.json" in str(error.value) and "\n" not in str(error.value)


def test_a_window_that_stretches_with_the_rest_is_not_written_as_gemma_3():
    content = BY_NAME["the text model of google/gemma-3-4b-pt"].content
    options = family_of(content, "config.json").read(content, "language_modelling", "config.json")
    fields = {**options, "rotary_base": 1e4, "vocab_size": VOCABULARY}
    assert family_for(TransformerConfig(**fields)).name == "Gemma 3"
    with pytest.raises(UsageError, match="no transformers class"):
        family_for(TransformerConfig(**{**fields, "local_rotary_base": None}))
