"""A checkpoint's classifier: kept where it is of the run's labels, drawn anew where it is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from builders import Recorder, small_model, write_labelled
from hasten.config.load import build_config
from hasten.core.errors import DamagedError
from hasten.model.pretrained.labels import label_names, row_order
from hasten.model.pretrained.reading import load_weights
from hasten.model.pretrained.writing import save_pretrained
from hasten.training.build import build_loop, plan_run
from hasten.training.run import Run
from hasten.training.session import start_run
from pretrained_folders import write_bert, write_text_model

KINDS = ("bird", "fruit", "tool")  # of the data, in the order of a run
OTHERS = ("NEGATIVE", "NEUTRAL", "POSITIVE")


# Which row is which


@given(st.lists(st.text(max_size=3), min_size=1, max_size=6, unique=True).flatmap(
    lambda names: st.tuples(st.just(names), st.permutations(names))
))  # fmt: skip
def test_each_label_gets_its_own_row(names: tuple[list[str], list[str]]):
    there, here = names
    order = row_order(there, here)
    assert order is not None and [there[row] for row in order] == here


@pytest.mark.parametrize(
    ("there", "here", "order"),
    [
        (OTHERS, KINDS, None),
        (OTHERS, OTHERS[:2], None),
        (OTHERS[:2], OTHERS, None),
        (("a", "a"), ("a", "b"), None),
        ((), ("a", "b"), None),
        # Names that transformers gives mean nothing, unless the data have them or its numbers.
        (("LABEL_0", "LABEL_1"), ("ham", "spam"), None),
        (("LABEL_0", "LABEL_1"), ("1", "2"), None),
        (("LABEL_0", "LABEL_1"), ("0", "1"), (0, 1)),
        (("LABEL_0", "LABEL_1"), ("LABEL_1", "LABEL_0"), (1, 0)),
        (("LABEL_1", "LABEL_0"), ("0", "1"), None),
    ],
)
def test_other_labels_have_no_rows(there: Any, here: Any, order: Any):
    assert row_order(there, here) == order


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ({}, ("LABEL_0", "LABEL_1")),
        ({"id2label": {"1": "b", "0": "a"}}, ("a", "b")),
        ({"id2label": {"0": 5, "1": 3}}, ("5", "3")),
        ({"id2label": {"0": "a"}}, ()),
        ({"id2label": {"0": "a", "1": "b", "2": "c"}}, ()),
        ({"id2label": ["a", "b"]}, ()),
    ],
)
def test_rows_are_called_as_config_json_says(content: dict[str, Any], names: tuple[str, ...]):
    assert label_names(content, 2) == names


# A run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_labelled(tmp_path_factory.mktemp("data") / "train.csv", 60)


def with_classifier(folder: Path, names: tuple[str, ...] | None, rows: int = 3) -> Path:
    """A BERT with a classifier, whose rows are called so; its bias tells them apart."""
    write_bert(folder, initializer_range=0.1)
    tensors = load_file(folder / "model.safetensors")
    tensors["classifier.weight"] = torch.arange(rows * 32.0).view(rows, 32)
    tensors["classifier.bias"] = torch.arange(float(rows))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    file = folder / "config.json"
    content = {k: v for k, v in json.loads(file.read_text()).items() if "label" not in k}
    if names is not None:
        content["id2label"] = {str(i): name for i, name in enumerate(names)}
    file.write_text(json.dumps(content))
    return folder


def begun(folder: Path, data: Path, tmp_path: Path) -> tuple[torch.nn.Linear, str]:
    """The classifier that a run begins with, and what it says of what is new."""
    keys = {"data.train": str(data), "model.pretrained": str(folder), "train.epochs": 1}
    recorder = Recorder()
    plan = plan_run(build_config(overrides=keys), recorder)
    head = build_loop(plan, tmp_path, recorder).parts.model.head
    said = [note for note in recorder.notes if note.startswith("new, drawn at random")]
    return head.classifier, "\n".join(said)


@pytest.mark.parametrize(
    ("names", "rows", "reason"),
    [
        (OTHERS, 3, "NEGATIVE, NEUTRAL, POSITIVE"),
        (("fruit", "tool", "Bird"), 3, "fruit, tool, Bird"),
        (("fruit", "tool"), 2, "fruit, tool"),
        (("a", "b", "c", "d", "e"), 5, "a, b, c, d and 1 more"),
        (("fruit", "tool"), 3, "labels without a name"),
        (None, 3, "labels without a name"),
        (("LABEL_0", "LABEL_1", "LABEL_2"), 3, "labels without a name"),
    ],
)
def test_a_classifier_of_other_labels_is_drawn_anew(
    names: tuple[str, ...] | None, rows: int, reason: str, data: Path, tmp_path: Path
):
    folder = with_classifier(tmp_path / "bert", names, rows)
    found, said = begun(folder, data, tmp_path)
    assert found.weight.shape == (3, 32) and found.weight.abs().max() < 1
    assert not found.bias.any()
    assert said == (
        "new, drawn at random: head.classifier.weight, head.classifier.bias (the classifier there "
        f"is for {reason}, not for bird, fruit, tool)"
    )


def test_a_classifier_of_the_same_labels_is_kept_in_the_order_of_the_run(
    data: Path, tmp_path: Path
):
    folder = with_classifier(tmp_path / "bert", ("tool", "bird", "fruit"))
    found, said = begun(folder, data, tmp_path)
    assert found.bias.tolist() == [1.0, 2.0, 0.0] and not said
    assert found.weight[:, 0].tolist() == [32.0, 64.0, 0.0]


def test_numbers_are_what_names_that_say_nothing_count(tmp_path: Path):
    folder = with_classifier(tmp_path / "bert", None)
    data = write_labelled(tmp_path / "train.csv", 60, labels=("2", "0", "1"))
    found, said = begun(folder, data, tmp_path)
    assert found.bias.tolist() == [0.0, 1.0, 2.0] and not said


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_run_begins_with_the_head_of_the_run_before(kind: str, data: Path, tmp_path: Path):
    write = write_bert if kind == "bert" else lambda folder: write_text_model(folder, kind)
    keys = {"data.train": str(data), "task": "text-classification", "train.epochs": 1}
    settings = {**keys, "model.pretrained": str(write(tmp_path / kind)), "eval.baseline": False}
    start_run(build_config(overrides=settings), tmp_path / "run", Recorder())
    expected = Run(tmp_path / "run").saved.model.get_parameter("head.classifier.weight")
    settings["model.pretrained"] = str(tmp_path / "run" / "model")
    recorder = Recorder()
    plan = plan_run(build_config(overrides=settings), recorder)
    model = build_loop(plan, tmp_path, recorder).parts.model
    assert torch.equal(model.head.classifier.weight, expected)
    assert not [note for note in recorder.notes if note.startswith("new, drawn")]


# Shapes that no number of labels explains


def spoilt(folder: Path, name: str, shape: tuple[int, ...]) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = torch.zeros(shape)
    save_file(tensors, folder / "model.safetensors")


def untied(kind: str, folder: Path) -> Any:
    """Writes an encoder-decoder that scores tokens by a matrix of its own, or with a bias."""
    is_t5 = kind == "t5"
    options: dict[str, Any] = {
        "norm": "rmsnorm", "norm_epsilon": 1e-6, "bias": False, "positions": "relative",
        "attention_scale": 1.0, "activation": "geglu_tanh", "tie_embeddings": False,
        "max_positions": 4096,
    } if is_t5 else {
        "norm_placement": "post", "positions": "learned", "position_offset": 2,
        "embedding_norm": True, "logit_bias": True,
    }  # fmt: skip
    model = small_model(architecture="encoder_decoder", head="language_modelling", **options)
    save_pretrained(folder, model.config, model.state_dict())
    return model.config


@pytest.mark.parametrize(
    ("kind", "name", "shape", "expected"),
    [
        ("bert", "classifier.weight", (3, 16), (3, 32)),
        ("bert", "classifier.weight", (5, 33), (5, 32)),
        ("bert", "classifier.weight", (96,), (96, 32)),
        ("bert", "classifier.bias", (4,), (3,)),
        ("bert", "classifier.bias", (3, 1), (3,)),
        ("bert", "bert.pooler.dense.weight", (16, 32), (32, 32)),
        ("t5", "lm_head.weight", (39, 32), (40, 32)),
        ("t5", "lm_head.weight", (40, 16), (40, 32)),
        ("bart", "final_logits_bias", (1, 39), (1, 40)),
        ("bart", "final_logits_bias", (40,), (1, 40)),
    ],
)
def test_another_shape_is_damaged(
    kind: str, name: str, shape: tuple[int, ...], expected: tuple[int, ...], tmp_path: Path
):
    if kind == "bert":
        model = small_model(
            norm_placement="post", positions="learned", num_token_types=2, pooling="first",
            head_activation="tanh", max_positions=32,
        )  # fmt: skip
        config = model.config
        save_pretrained(tmp_path, config, model.state_dict())
    else:
        config = untied(kind, tmp_path)
    assert not load_weights(tmp_path, config).missing
    spoilt(tmp_path, name, shape)
    with pytest.raises(DamagedError) as found:
        load_weights(tmp_path, config)
    said = f"tensor '{name}' has shape {shape}, but config.json makes it {expected}."
    assert str(found.value).endswith(said)
