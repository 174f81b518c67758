"""What every task promises, kept by text classification: learns, resumes, is saved, is used."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import hasten
from builders import TINY, labelled_rows, write_labelled, write_rows
from hasten.config.load import build_config
from hasten.core.errors import DamagedError, DataError, UsageError
from hasten.task.text_classification import TextClassification
from hasten.training.observe import Silent
from hasten.training.session import start_run

EIGHT = [
    ("a heron by the water", "bird"),
    ("the old saw is sharp", "tool"),
    ("one ripe plum", "fruit"),
    ("two crows and an owl", "bird"),
    ("a hammer near a drill", "tool"),
    ("figs and a melon", "fruit"),
    ("an eagle", "bird"),
    ("file and vice", "tool"),
]
OVERFIT: dict[str, Any] = {
    **TINY,
    "data.augment": "none",
    "data.validation_fraction": 0.0,
    "model.dropout": 0.0,
    "model.token_dropout": 0.0,
    "model.head_dropout": 0.0,
    "train.epochs": 60,
    "train.tokens_per_step": 100,
    "train.learning_rate": 1e-2,
    "optim.weight_decay": 0.0,
    "optim.schedule": "constant",
    "eval.patience": 0,
}


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> hasten.Run:
    folder = tmp_path_factory.mktemp("eight")
    path = write_rows(folder / "train.csv", EIGHT, ("text", "label"))
    settings = {**OVERFIT, "eval.baseline": True}
    return hasten.train(path, test=path, output=folder / "run", settings=settings)


def labels_of(run: hasten.Run) -> tuple[str, ...]:
    assert isinstance(run.task, TextClassification)
    return run.task.labels


def test_eight_examples_are_learned_by_heart(eight: hasten.Run):
    test = eight.result["test"]
    assert test["accuracy"] == test["macro_f1"] == 1.0
    assert test["loss"] < 0.05 and test["num_examples"] == 8
    assert all(row["f1"] == 1.0 for row in test["per_class"])
    low, high = test["accuracy_interval"]
    assert 0.6 < low < 0.7 and high == 1.0
    assert eight.result["baselines"]["majority"]["accuracy"] == 3 / 8
    assert eight.result["training"]["padding_fraction"] == 0.0
    assert eight.result["training"]["epochs"] == 60


@pytest.mark.parametrize(
    "settings",
    [
        {"train.loss": "focal", "train.class_weights": "balanced"},
        {
            "model.pooling": "first",
            "model.norm_placement": "post",
            "model.bias": True,
            "train.learning_rate": 3e-3,
        },
        {"model.pooling": "attention", "model.activation": "swiglu", "tokenizer.kind": "char"},
        {"train.label_smoothing": 0.1, "train.ema_decay": 0.9, "tokenizer.kind": "byte"},
        {"model.positions": "learned", "model.norm": "layernorm", "tokenizer.kind": "wordpiece"},
    ],
)
def test_every_kind_of_model_learns_eight_examples(settings: dict[str, Any], tmp_path: Path):
    path = write_rows(tmp_path / "train.csv", EIGHT, ("text", "label"))
    run = hasten.train(path, test=path, output=tmp_path / "run", settings={**OVERFIT, **settings})
    assert run.result["test"]["accuracy"] == 1.0


def test_predictions_agree_with_the_evaluation(eight: hasten.Run):
    predictions = eight.predict([text for text, _ in EIGHT])
    assert [p["label"] for p in predictions] == [label for _, label in EIGHT]
    losses = []
    for prediction, (_, label) in zip(predictions, EIGHT, strict=True):
        assert (
            set(prediction["probabilities"]) == {"bird", "fruit", "tool"} == set(labels_of(eight))
        )
        assert sum(prediction["probabilities"].values()) == pytest.approx(1)
        assert prediction["probability"] == max(prediction["probabilities"].values())
        losses.append(-math.log(prediction["probabilities"][label]))
    assert sum(losses) / 8 == pytest.approx(eight.result["test"]["loss"], rel=1e-4, abs=1e-6)
    again = eight.evaluate(eight.folder.parent / "train.csv")
    for name in ("loss", "accuracy", "macro_f1", "num_examples"):
        assert again[name] == pytest.approx(eight.result["test"][name], rel=1e-5)
    # One text, several, none; in whatever company a text is, its probabilities stay.
    assert eight.predict([]) == []
    (alone,) = eight.predict(EIGHT[0][0])
    assert alone["probability"] == pytest.approx(predictions[0]["probability"], rel=1e-5)
    many = eight.predict(["a heron by the water"] * 2500)
    assert len(many) == 2500 and many[-1]["label"] == "bird"


def test_odd_texts_are_predicted_too(eight: hasten.Run):
    for text in ("", " ", "\u0000", "中文", "👍🏽", "x" * 20000, "[CLS] [PAD] [SEP]"):
        (found,) = eight.predict([text])
        assert found["label"] in labels_of(eight) and 0 < found["probability"] <= 1


def test_a_saved_run_predicts_the_same_in_a_new_process(eight: hasten.Run, tmp_path: Path):
    code = (
        "import json, sys, hasten; run = hasten.load(sys.argv[1]); "
        "print(json.dumps([run.predict(json.loads(sys.argv[2])), list(run.task.labels)]))"
    )
    texts = [text for text, _ in EIGHT]
    out = subprocess.run(
        [sys.executable, "-c", code, str(eight.folder.absolute()), json.dumps(texts)],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    predictions, labels = json.loads(out.stdout)
    assert predictions == eight.predict(texts) and labels == list(labels_of(eight))
    assert out.stderr == ""


def test_a_copied_model_folder_is_all_that_is_needed(eight: hasten.Run, tmp_path: Path):
    import shutil

    shutil.copytree(eight.folder / "model", tmp_path / "moved" / "model")
    moved = hasten.load(tmp_path / "moved")
    texts = [text for text, _ in EIGHT]
    assert moved.predict(texts) == eight.predict(texts)


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        (("yes", "no"), ("no", "yes")),
        (("10", "9"), ("9", "10")),
        (("True", "False"), ("False", "True")),
        (("NA", "null"), ("NA", "null")),
        (("ja, bitte", "né \u4e2d"), ("ja, bitte", "né \u4e2d")),
    ],
)
def test_names_of_labels_survive_to_the_end(
    values: tuple[str, str], wanted: tuple[str, str], tmp_path: Path
):
    rows = [(text, values[label == "bird"]) for text, label in labelled_rows(60)]
    path = write_rows(tmp_path / "t.csv", rows, ("text", "label"))
    settings = {
        **TINY,
        "train.epochs": 1,
        "data.text_columns": "text",
        "data.label_column": "label",
    }
    run = hasten.train(path, output=tmp_path / "run", settings=settings)
    assert labels_of(run) == labels_of(hasten.load(tmp_path / "run")) == wanted
    assert set(run.predict(rows[0][0])[0]["probabilities"]) == set(wanted)
    assert [row["label"] for row in run.result["validation"]["per_class"]] == list(wanted)
    assert run.evaluate(path)["num_examples"] == 60


@pytest.mark.parametrize(
    ("values", "wanted"),
    [((True, False), ("false", "true")), ((3, -1), ("-1", "3")), ((1, "one"), ("1", "one"))],
)
def test_json_labels_survive_to_the_end(values, wanted, tmp_path: Path):
    rows = [(text, values[label == "bird"]) for text, label in labelled_rows(60)]
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps({"text": t, "label": v}) + "\n" for t, v in rows))
    settings = {**TINY, "train.epochs": 1}
    run = hasten.train(path, output=tmp_path / "run", settings=settings)
    assert labels_of(run) == wanted


def test_rejected_rows_are_all_listed(tmp_path: Path):
    rows = [*labelled_rows(60), ("", "bird"), ("no label", "")]
    path = write_rows(tmp_path / "t.csv", rows, ("text", "label"))
    run = hasten.train(path, output=tmp_path / "run", settings={**TINY, "train.epochs": 1})
    lines = (run.folder / "rejected.jsonl").read_text().splitlines()
    assert [json.loads(line)["line"] for line in lines] == [62, 63]
    assert run.result["training"]["num_rejected"] == 2
    data = json.loads((run.folder / "data.json").read_text())
    assert data["rows"] == {"train": {"read": 62, "used": 60, "rejected": 2}}
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert data["files"] == [{"split": "train", "path": str(path), "sha256": digest}]
    assert data["num_examples"]["train"] + data["num_examples"]["validation"] == 60


def test_several_training_files_are_one_run(tmp_path: Path):
    first = write_labelled(tmp_path / "a.csv", 40)
    other = tmp_path / "b.jsonl"
    lines = [json.dumps({"label": v, "text": t}) for t, v in labelled_rows(35, seed=1)]
    other.write_text("\n".join([*lines, '{"label": "bird"}']) + "\n")
    test = [write_labelled(tmp_path / f"{name}.csv", 10, seed=2) for name in "xy"]
    settings = {**TINY, "train.epochs": 1}
    run = hasten.train([first, other], test=test, output=tmp_path / "run", settings=settings)
    data = json.loads((run.folder / "data.json").read_text())
    assert [(entry["split"], entry["path"]) for entry in data["files"]] == [
        ("train", str(first)),
        ("train", str(other)),
        *(("test", str(path)) for path in test),
    ]
    assert data["rows"]["train"] == {"read": 76, "used": 75, "rejected": 1}
    (rejected,) = (run.folder / "rejected.jsonl").read_text().splitlines()
    assert json.loads(rejected)["file"] == str(other) and json.loads(rejected)["line"] == 36
    assert run.result["test"]["num_examples"] == 20
    # A pattern that fits the same files in the same order is the same run.
    pattern = build_config(overrides={"data.train": str(tmp_path / "[ab].*"), **settings})
    start_run(pattern, tmp_path / "again", Silent())
    found = [
        (folder / "model" / "model.safetensors").read_bytes()
        for folder in (run.folder, tmp_path / "again")
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize("segments", ["join", "separate"])
def test_two_text_columns(segments: str, tmp_path: Path):
    rows = [
        (text, f"about {label}s", str(i % 2)) for i, (text, label) in enumerate(labelled_rows(60))
    ]
    path = write_rows(tmp_path / "t.csv", rows, ("one", "two", "label"))
    settings = {
        **TINY,
        "train.epochs": 1,
        "data.text_columns": "one,two",
        "data.label_column": "label",
        "data.segments": segments,
    }
    run = hasten.train(path, output=tmp_path / "run", settings=settings)
    assert run.task.input_columns == ("one", "two")
    assert run.saved.model.config.num_token_types == (2 if segments == "separate" else 0)
    first, swapped = run.predict([("a b", "c d"), ("c d", "a b")])
    assert first["probabilities"] != swapped["probabilities"]
    assert run.evaluate(path)["num_examples"] == 60
    with pytest.raises(UsageError, match=r"2 texts .*\(one, two\).* 1 "):
        run.predict(["only one"])


def test_a_label_that_training_never_saw_is_an_error_not_a_crash(tmp_path: Path):
    train = write_labelled(tmp_path / "t.csv", 60)
    rows = [*labelled_rows(9), ("something else", "planet")]
    test = write_rows(tmp_path / "v.csv", rows, ("text", "label"))
    settings = {**TINY, "train.epochs": 1}
    run = hasten.train(train, test=test, output=tmp_path / "run", settings=settings)
    found = run.result["test"]
    assert found["num_examples"] == 10 and found["accuracy"] <= 0.9
    assert math.isfinite(found["loss"]) and run.evaluate(test)["accuracy"] == found["accuracy"]
    only = write_rows(tmp_path / "only.csv", [("x", "planet"), ("y", "moon")], ("text", "label"))
    with pytest.raises(DataError, match=r"only\.csv.*moon, planet"):
        run.evaluate(only)


def test_the_run_folder_is_complete(eight: hasten.Run):
    names = {path.name for path in eight.folder.iterdir()} - {".lock"}
    assert names == {
        "config.yaml",
        "architecture.json",
        "plan.json",
        "data.json",
        "environment.json",
        "rejected.jsonl",
        "tokenizer.json",
        "metrics.jsonl",
        "checkpoints",
        "model",
        "result.json",
    }
    for name in ("plan.json", "data.json", "environment.json", "result.json"):
        json.loads((eight.folder / name).read_text(encoding="utf-8"))
    assert {p.name for p in (eight.folder / "model").iterdir()} == {
        "hasten.json",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert not [
        p for p in eight.folder.rglob("*") if p.suffix in (".pt", ".pkl", ".bin", ".pickle")
    ]


def test_the_saved_configuration_repeats_the_run(tmp_path: Path):
    path = write_labelled(tmp_path / "t.csv", 80)
    settings = {**TINY, "train.epochs": 2}
    run = hasten.train(path, output=tmp_path / "run", settings=settings)
    config = build_config(file=run.folder / "config.yaml")
    assert '"auto"' not in json.dumps(config.model_dump())
    start_run(config, tmp_path / "again", Silent())
    first, second = (
        (folder / "model" / "model.safetensors").read_bytes()
        for folder in (run.folder, tmp_path / "again")
    )
    assert first == second


@pytest.mark.parametrize(
    "name", ["hasten.json", "config.json", "model.safetensors", "tokenizer.json"]
)
def test_a_damaged_model_is_refused(name: str, eight: hasten.Run, tmp_path: Path):
    import shutil

    target = tmp_path / "run" / "model"
    for damage in ("gone", "cut", "empty"):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(eight.folder / "model", target)
        content = (target / name).read_bytes()
        if damage == "gone":
            (target / name).unlink()
        else:
            (target / name).write_bytes(content[: len(content) // 2 if damage == "cut" else 0])
        with pytest.raises(DamagedError) as caught:
            hasten.load(tmp_path / "run")
        assert str(target) in str(caught.value) and caught.value.exit_code == 4
        assert len(str(caught.value).splitlines()) <= 2


def test_an_altered_model_is_refused(eight: hasten.Run, tmp_path: Path):
    import shutil

    shutil.copytree(eight.folder / "model", tmp_path / "run" / "model")
    weights = tmp_path / "run" / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-100] ^= 64
    weights.write_bytes(content)
    with pytest.raises(DamagedError, match=r"model\.safetensors"):
        hasten.load(tmp_path / "run")


def test_standard_input_is_kept_with_the_run_and_two_do_not_mix(tmp_path: Path):
    code = (
        "import json, sys, hasten; "
        "hasten.train('-', output=sys.argv[1], settings=json.loads(sys.argv[2]))"
    )
    settings = json.dumps({**TINY, "train.epochs": 1})
    children, contents = [], []
    for i in range(2):
        path = write_labelled(tmp_path / f"{i}.csv", 60 + 30 * i, seed=i)
        contents.append(path.read_bytes())
        command = [sys.executable, "-c", code, str(tmp_path / f"run{i}"), settings]
        with path.open("rb") as file:
            children.append(subprocess.Popen(command, stdin=file, stderr=subprocess.PIPE))
    for i, child in enumerate(children):
        _, errors = child.communicate(timeout=120)
        assert child.returncode == 0, errors.decode()
        run = tmp_path / f"run{i}"
        assert (run / "standard-input.csv").read_bytes() == contents[i]
        data = json.loads((run / "data.json").read_text())
        assert data["rows"]["train"]["read"] == 60 + 30 * i
        assert [entry["path"] for entry in data["files"]] == [str(run / "standard-input.csv")]
        before = (run / "model" / "model.safetensors").read_bytes()
        hasten.train(resume=run)  # the file is found where it now lies
        assert (run / "model" / "model.safetensors").read_bytes() == before
