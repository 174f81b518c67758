"""Encoder-decoders of transformers give the same outputs, loss and gradients here, and back."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pretrained_cases import SOURCE_LENGTHS, PretrainedCase, compare, padded, relative
from pretrained_encoder_decoders import CASES, END, PAD, START
from safetensors.torch import load_file, save_file

from builders import pack
from hasten.core.batch import pack_padded
from hasten.core.errors import DamagedError, UsageError
from hasten.model.decoding import CachedDecoder
from hasten.model.pretrained.generation import GenerationStart, generation_start
from hasten.model.pretrained.reading import config_of, load_pretrained
from hasten.model.pretrained.writing import family_for
from hasten.model.sampling import DecodingSettings
from hasten.model.search import Request, generate
from hasten.model.transformer import Transformer
from hasten.task.generating import token_loss_sum

TOLERANCE = 1e-4
NAMED = {case.name: case for case in CASES}
ONE_EACH = [NAMED[n] for n in ("T5 1.0", "T5 1.1", "mT5", "BART", "mBART", "Marian", "M2M100")]
NEW_TOKENS = 8


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """What transformers saves of a case, given by its name."""
    NAMED[request.param].build().save_pretrained(tmp_path)
    return tmp_path


def change(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def read(folder: Path) -> Transformer:
    return load_pretrained(folder, head="language_modelling").model.eval()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_model_of_transformers_is_the_same_here_and_back(case: PretrainedCase, tmp_path: Path):
    found = compare(case, tmp_path)
    assert max(found.outputs, found.loss, found.gradients, found.back) <= TOLERANCE, found


@pytest.mark.parametrize("case", ONE_EACH, ids=lambda case: case.name)
def test_the_loss_of_labels_is_that_of_transformers(case: PretrainedCase, tmp_path: Path):
    # mBART has no first token: it takes the last one of the labels, a language's code.
    lengths = case.lengths
    labels, mask = padded(lengths, 5)
    labels[torch.arange(len(lengths)), torch.tensor(lengths) - 1] = START
    source, source_mask = padded(SOURCE_LENGTHS, 6)
    theirs = case.build()
    theirs.save_pretrained(tmp_path)
    wanted = theirs(
        input_ids=source,
        attention_mask=source_mask,
        labels=labels.masked_fill(~mask.bool(), -100),
    ).loss
    start = generation_start(json.loads((tmp_path / "config.json").read_text())).start
    assert start == START
    seen = torch.cat([torch.full((len(lengths), 1), start), labels[:, :-1]], dim=1)
    batch = dataclasses.replace(
        pack_padded(seen, mask),
        source=pack_padded(source, source_mask),
        targets=labels[mask.bool()],
    )
    with torch.no_grad():
        ours = token_loss_sum(read(tmp_path)(batch), batch) / sum(lengths)
    assert relative(ours, wanted.detach()) <= TOLERANCE


@pytest.mark.parametrize("case", ONE_EACH, ids=lambda case: case.name)
@pytest.mark.parametrize(("num_beams", "power"), [(1, 1.0), (3, 0.5), (3, 2.0)])
def test_generation_finds_what_transformers_finds(
    case: PretrainedCase, num_beams: int, power: float, tmp_path: Path
):
    """Beams as transformers has them with early_stopping="never"; with True it ends earlier."""
    theirs = case.build()
    with torch.no_grad():  # so that a token does not call for itself
        for name, parameter in theirs.named_parameters():
            if parameter.ndim > 1 and parameter.requires_grad:
                is_token = any(part in name for part in ("shared", "embed_tokens", "lm_head"))
                parameter.normal_(std=0.02 if is_token else 0.6)
    theirs.save_pretrained(tmp_path)
    source, source_mask = padded(SOURCE_LENGTHS, 7)
    given = {"input_ids": source, "attention_mask": source_mask, "max_new_tokens": NEW_TOKENS}
    end = int(theirs.generate(**given, do_sample=False)[0, 3])  # so that outputs end early
    found = theirs.generate(
        **given, do_sample=False, num_beams=num_beams, length_penalty=power, eos_token_id=end,
        early_stopping="never" if num_beams > 1 else False,
    )  # fmt: skip
    wanted = [_until(row.tolist()[1:], end) for row in found]
    # A power above 1 may well prefer the longest.
    assert power > 1 or any(len(row) < NEW_TOKENS for row in wanted)
    sources = [ids[real.bool()] for ids, real in zip(source, source_mask, strict=True)]
    prompts = pack([torch.tensor([START])] * len(source), sources=sources)
    results = generate(
        CachedDecoder(read(tmp_path), prompts),
        DecodingSettings(max_new_tokens=NEW_TOKENS, num_beams=num_beams, length_penalty=power),
        [Request(i) for i in range(len(source))],
        end_ids=frozenset({end}),
    )
    assert [list(found[0].token_ids) for found in results] == wanted


def _until(tokens: list[int], end: int) -> list[int]:
    return tokens[: tokens.index(end)] if end in tokens else tokens


@pytest.mark.parametrize("folder", ["T5 1.0", "BART", "Marian", "M2M100"], indirect=True)
def test_tied_tensors_may_be_there_many_times(folder: Path):
    wanted = read(folder).state_dict()
    path = folder / "model.safetensors"
    tensors = load_file(path)
    lead = "" if "shared.weight" in tensors else "model."
    shared = tensors[f"{lead}shared.weight"]
    sides = [f"{lead}{side}.embed_tokens.weight" for side in ("encoder", "decoder")]
    save_file(tensors | {name: shared.clone() for name in (*sides, "lm_head.weight")}, path)
    loaded = load_pretrained(folder, head="language_modelling")
    assert not loaded.missing and not loaded.unexpected
    assert all(torch.equal(wanted[n], found) for n, found in loaded.model.state_dict().items())

    save_file({**{k: v for k, v in tensors.items() if v is not shared}, sides[0]: shared}, path)
    assert all(torch.equal(wanted[n], found) for n, found in read(folder).state_dict().items())

    save_file(tensors | {sides[1]: shared + 1}, path)
    with pytest.raises(DamagedError, match=rf"{sides[1]}' differ"):
        read(folder)


@pytest.mark.parametrize("folder", ["T5 1.0", "mT5"], indirect=True)
def test_a_matrix_of_its_own_scores_tokens_whatever_config_json_says(folder: Path):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    own = torch.randn_like(tensors["shared.weight"])
    save_file(tensors | {"lm_head.weight": own}, path)
    model = read(folder)
    assert not model.config.tie_embeddings
    assert torch.equal(model.state_dict()["head.scorer.weight"], own)


@pytest.mark.parametrize("folder", ["T5 1.0"], indirect=True)
def test_a_bound_on_lengths_of_ours_is_no_option_of_relative_positions(folder: Path):
    config = config_of(folder, head="language_modelling")
    assert family_for(dataclasses.replace(config, max_positions=100)).name == "T5"


@pytest.mark.parametrize("folder", ["BART"], indirect=True)
def test_weights_in_several_files_are_those_of_one(folder: Path, tmp_path: Path):
    wanted = read(folder).state_dict()
    parts = tmp_path / "parts"
    NAMED["BART"].build().save_pretrained(parts, max_shard_size="20KB")
    assert len(list(parts.glob("*.safetensors"))) > 3
    assert all(torch.equal(wanted[n], found) for n, found in read(parts).state_dict().items())


REFUSED = [
    ("BART", "decoder_attention_heads", 4),
    ("BART", "decoder_ffn_dim", 48),
    ("BART", "activation_function", "tanh"),
    ("BART", "tie_word_embeddings", False),
    ("BART", "normalize_before", True),
    ("BART", "add_final_layer_norm", True),
    ("BART", "add_bias_logits", True),
    ("BART", "normalize_embedding", False),
    ("BART", "do_blenderbot_90_layernorm", True),
    ("mBART", "normalize_before", False),
    ("mBART", "tie_word_embeddings", False),
    ("Marian", "decoder_vocab_size", 70),
    ("Marian", "tie_word_embeddings", False),
    ("Marian", "normalize_embedding", True),
    ("M2M100", "normalize_embedding", True),
    ("M2M100", "tie_word_embeddings", False),
    ("M2M100", "num_experts", 8),
    ("T5 1.0", "feed_forward_proj", "gated-relu"),
    ("T5 1.0", "feed_forward_proj", "tanh"),
    ("mT5", "feed_forward_proj", "tanh"),
    ("mT5", "is_decoder", True),
]


@pytest.mark.parametrize(
    ("folder", "key", "value"), REFUSED, indirect=["folder"], ids=lambda value: str(value)
)
def test_what_is_not_honoured_is_named(folder: Path, key: str, value: Any):
    config_of(folder, head="language_modelling")
    change(folder, **{key: value})
    with pytest.raises(UsageError, match=key):
        config_of(folder, head="language_modelling")


@pytest.mark.parametrize("head", ["classification", "span"])
@pytest.mark.parametrize("folder", ["T5 1.0", "BART"], indirect=True)
def test_heads_that_they_have_not_are_refused(folder: Path, head: Any):
    with pytest.raises(UsageError, match=f"not {head}"):
        config_of(folder, head=head)


PUBLISHED = {
    "t5": {
        "d_ff": 2048, "d_kv": 64, "d_model": 512, "decoder_start_token_id": 0, "dropout_rate": 0.1,
        "eos_token_id": 1, "initializer_factor": 1.0, "is_encoder_decoder": True,
        "layer_norm_epsilon": 1e-06, "model_type": "t5", "n_positions": 512, "num_heads": 8,
        "num_layers": 6, "output_past": True, "pad_token_id": 0,
        "relative_attention_num_buckets": 32, "task_specific_params": {}, "vocab_size": 32128,
    },
    "marian": {
        "activation_dropout": 0.0, "activation_function": "swish", "add_bias_logits": False,
        "add_final_layer_norm": False, "attention_dropout": 0.0, "bad_words_ids": [[58100]],
        "classif_dropout": 0.0, "classifier_dropout": 0.0, "d_model": 512,
        "decoder_attention_heads": 8, "decoder_ffn_dim": 2048, "decoder_layerdrop": 0.0,
        "decoder_layers": 6, "decoder_start_token_id": 58100, "dropout": 0.1,
        "encoder_attention_heads": 8, "encoder_ffn_dim": 2048, "encoder_layerdrop": 0.0,
        "encoder_layers": 6, "eos_token_id": 0, "extra_pos_embeddings": 58101, "init_std": 0.02,
        "is_encoder_decoder": True, "max_length": 512, "max_position_embeddings": 512,
        "model_type": "marian", "normalize_before": False, "normalize_embedding": False,
        "num_beams": 6, "num_hidden_layers": 6, "pad_token_id": 58100, "scale_embedding": True,
        "static_position_embeddings": True, "use_cache": True, "vocab_size": 58101,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_config_json_of_old_checkpoints_is_read(name: str, tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]))
    config = config_of(tmp_path, head="language_modelling")
    assert (config.num_layers, config.decoder_layers, config.hidden_size) == (6, 6, 512)
    assert config.embedding_factor == (1.0 if name == "t5" else 512**0.5)
    assert config.logit_scale == (512**-0.5 if name == "t5" else 1.0)


def test_outputs_begin_as_generation_config_says_else_config():
    content = {"decoder_start_token_id": 2, "eos_token_id": END, "pad_token_id": PAD}
    assert generation_start(content) == GenerationStart(2, None, frozenset({END}))
    both = generation_start(content, {"forced_bos_token_id": 9, "eos_token_id": [5, 6]})
    assert both == GenerationStart(2, 9, frozenset({5, 6}))
    assert both.prompt == [2, 9]
    assert generation_start({}) == GenerationStart(None, None, frozenset())
