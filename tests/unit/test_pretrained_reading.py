"""Checkpoint folders that are damaged or not honoured: one clear line, and no memory taken."""

from __future__ import annotations

import json
import pickle
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from builders import small_model
from hasten.core.errors import DamagedError, UsageError
from hasten.model.pretrained.reading import config_of, load_pretrained
from hasten.model.pretrained.writing import family_for, save_pretrained

_KINDS = ("weight", "bias")
BERT: dict[str, Any] = {
    "norm_placement": "post",
    "positions": "learned",
    "num_token_types": 2,
    "pooling": "first",
    "head_activation": "tanh",
    "max_positions": 32,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A BERT of two layers with three labels."""
    model = small_model(**BERT)
    labels = {"id2label": {"0": "a", "1": "b", "2": "c"}}
    save_pretrained(tmp_path, model.config, model.state_dict(), labels)
    return tmp_path


def change(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes the header of the weights and leaves the rest of the file as it is."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def test_what_was_written_is_read(folder: Path):
    model = small_model(**BERT)
    loaded = load_pretrained(folder, head="classification")
    assert loaded.family.name == "BERT" and not loaded.missing and not loaded.unexpected
    assert loaded.model.config.num_labels == 3
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor), name


def test_another_head_is_drawn_and_what_has_no_place_is_listed(folder: Path):
    loaded = load_pretrained(folder, head="span", dropout=0.25)
    assert loaded.missing == ("head.scorer.weight", "head.scorer.bias")
    assert set(loaded.unexpected) == {
        f"{name}.{kind}" for name in ("bert.pooler.dense", "classifier") for kind in _KINDS
    }
    head = loaded.model.head.scorer
    assert 0 < head.weight.std() < 1 and not head.bias.any()
    assert loaded.model.config.dropout == 0.25


def test_another_number_of_labels_draws_the_classifier_alone(folder: Path):
    loaded = load_pretrained(folder, head="classification", num_labels=7)
    assert loaded.missing == ("head.classifier.weight", "head.classifier.bias")
    assert not loaded.unexpected
    assert loaded.model.head.classifier.weight.shape == (7, 32)


def test_a_body_without_prefix_is_read(folder: Path):
    tensors = load_file(folder / "model.safetensors")
    body = {n.removeprefix("bert."): t for n, t in tensors.items() if n.startswith("bert.")}
    save_file(body, folder / "model.safetensors")
    loaded = load_pretrained(folder, head="classification")
    assert loaded.missing == ("head.classifier.weight", "head.classifier.bias")
    assert not loaded.unexpected


def test_16_bits_become_float32(folder: Path):
    tensors = load_file(folder / "model.safetensors")
    save_file({n: t.bfloat16() for n, t in tensors.items()}, folder / "model.safetensors")
    loaded = load_pretrained(folder, head="classification")
    weight = loaded.model.embedding.tokens.weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, tensors["bert.embeddings.word_embeddings.weight"].bfloat16().float())


def test_shards_are_read_by_their_index(folder: Path):
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    places = {name: f"part-{i % 3}.safetensors" for i, name in enumerate(names)}
    for file in set(places.values()):
        save_file({n: t for n, t in tensors.items() if places[n] == file}, folder / file)
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    loaded = load_pretrained(folder, head="classification")
    assert not loaded.missing and not loaded.unexpected

    for outside in ("../part-0.safetensors", str(folder / "part-0.safetensors"), "", ".."):
        index.write_text(json.dumps({"weight_map": {**places, names[0]: outside}}))
        with pytest.raises(DamagedError, match="outside of the folder"):
            load_pretrained(folder, head="classification")
    index.write_text(json.dumps({"weight_map": {**places, "made up": "part-0.safetensors"}}))
    with pytest.raises(DamagedError, match=r"part-0.*no tensor 'made up'"):
        load_pretrained(folder, head="classification")
    (folder / "part-1.safetensors").unlink()
    index.write_text(json.dumps({"weight_map": places}))
    with pytest.raises(DamagedError, match=r"part-1\.safetensors: missing"):
        load_pretrained(folder, head="classification")
    index.write_text(json.dumps({"weight_map": ["a"]}))
    with pytest.raises(DamagedError, match="no weight_map"):
        load_pretrained(folder, head="classification")


def cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def only_a_beginning(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5])


def header_beyond_the_file(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 62) + path.read_bytes()[8:])


def mislabelled_type(folder: Path) -> None:
    rewrite(folder, lambda header: header["classifier.weight"].update(dtype="F16"))


def mislabelled_shape(folder: Path) -> None:
    rewrite(folder, lambda header: header["classifier.weight"].update(shape=[3, 3200000]))


def overlapping(folder: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        header["classifier.weight"]["data_offsets"] = [0, 3 * 32 * 4]

    rewrite(folder, change)


def no_json(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 9) + b"{nonsense" + bytes(64))


@pytest.mark.parametrize(
    "spoil",
    [
        cut_short,
        only_a_beginning,
        header_beyond_the_file,
        mislabelled_type,
        mislabelled_shape,
        overlapping,
        no_json,
    ],
)
def test_a_damaged_file_is_one_line(spoil: Callable[[Path], None], folder: Path):
    spoil(folder)
    with pytest.raises(DamagedError, match=r"model\.safetensors: not a whole safetensors") as found:
        load_pretrained(folder, head="classification")
    assert "\n" not in str(found.value)


def test_whole_numbers_are_no_weights(folder: Path):
    tensors = load_file(folder / "model.safetensors")
    tensors["bert.embeddings.word_embeddings.weight"] = torch.zeros(40, 32, dtype=torch.int32)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(DamagedError, match=r"word_embeddings.*of type I32"):
        load_pretrained(folder, head="classification")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_hidden_layers": 10**9}, r"'bert\.encoder\.layer\.2\.attention.*is missing"),
        ({"hidden_size": 4 * 10**9}, "sizes beyond any machine"),
        ({"hidden_size": 4 * 10**6}, r"\(40, 32\), but config.json makes it \(40, 4000000\)"),
        (
            {"vocab_size": 10**12},
            r"shape \(40, 32\), but config.json makes it \(1000000000000, 32\)",
        ),
        ({"intermediate_size": 10**12}, r"intermediate.*but config.json makes it"),
        ({"max_position_embeddings": 10**12}, r"1,000,000,000,000 positions"),
    ],
)
def test_what_config_claims_takes_no_memory(values: dict[str, Any], message: str, folder: Path):
    change(folder, **values)
    tracemalloc.start()
    with pytest.raises(DamagedError, match=message):
        load_pretrained(folder, head="classification")
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "bort"}, r"model_type is 'bort'.*Did you mean 'bert'"),
        ({"model_type": None}, r"model_type is None"),
        ({"position_embedding_type": "relative_key"}, r"position_embedding_type is 'relative_key'"),
        ({"hidden_act": "mish"}, r"hidden_act is 'mish'; only 'gelu'"),
        ({"is_decoder": True}, r"not honoured here: is_decoder \(True\)"),
        ({"brand_new_option": 3}, r"not honoured here: brand_new_option \(3\)"),
        ({"auto_map": {"AutoModel": "x.Y"}}, r"not honoured here: auto_map"),
        ({"hidden_size": "32"}, r"hidden_size is '32', not of kind int"),
        ({"num_hidden_layers": True}, r"num_hidden_layers is True"),
    ],
)
def test_what_is_not_honoured_is_named(values: dict[str, Any], message: str, folder: Path):
    change(folder, **values)
    with pytest.raises(UsageError, match=message):
        load_pretrained(folder, head="classification")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_attention_heads": 5}, r"config\.json: .*not a multiple"),
        ({"hidden_dropout_prob": 1.5}, r"config\.json: .*must lie in"),
        ({"hidden_dropout_prob": "a"}, r"config\.json: "),
    ],
)
def test_a_config_that_contradicts_itself_is_damaged(
    values: dict[str, Any], message: str, folder: Path
):
    change(folder, **values)
    with pytest.raises(DamagedError, match=message):
        load_pretrained(folder, head="classification")


def test_a_head_that_the_family_has_not_is_refused(folder: Path):
    with pytest.raises(UsageError, match="a BERT model does classification, span, not language"):
        config_of(folder, head="language_modelling")


def test_an_option_that_the_folder_decides_is_refused(folder: Path):
    with pytest.raises(UsageError, match=r"model\.norm is what the pretrained model says"):
        config_of(folder, head="classification", norm="rmsnorm")


def test_pickle_is_not_read(folder: Path):
    (folder / "model.safetensors").unlink()
    with pytest.raises(DamagedError, match=r"there is no model\.safetensors"):
        load_pretrained(folder, head="classification")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    with pytest.raises(UsageError, match=r"hasten convert"):
        load_pretrained(folder, head="classification")


@pytest.mark.parametrize("content", ["", "[1]", "{", "\0", "[" * 100_000])
def test_a_config_that_is_no_object_is_damaged(content: str, folder: Path):
    (folder / "config.json").write_text(content)
    with pytest.raises(DamagedError, match=r"config\.json: not "):
        load_pretrained(folder, head="classification")
    (folder / "config.json").unlink()
    with pytest.raises(UsageError, match=r"it has no config\.json"):
        load_pretrained(folder, head="classification")
    with pytest.raises(UsageError, match="no such folder"):
        load_pretrained(folder / "nowhere", head="classification")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": "rmsnorm"}, r"model\.norm 'rmsnorm' \(there 'layernorm'\)"),
        ({"pooling": "mean"}, r"model\.pooling 'mean' \(there 'first'\)"),
        ({"activation": "relu_squared"}, "relu_squared"),
        ({"num_kv_heads": 2}, r"model\.num_kv_heads 2 \(there 4\)"),
    ],
)
def test_what_no_family_can_say_is_named(changes: dict[str, Any], message: str, tmp_path: Path):
    config = small_model(**BERT | changes).config
    with pytest.raises(UsageError, match=message):
        family_for(config)
    with pytest.raises(UsageError, match=message):
        save_pretrained(tmp_path / "nothing", config, {})
    assert not (tmp_path / "nothing").exists()
