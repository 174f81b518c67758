"""What every task promises, kept by translation: of line-aligned files, and of two columns."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from other_processes import assert_resumes_exactly, predict_in_new_process

import hasten
from builders import TINY, Recorder, labelled_rows, write_rows
from hasten.config.load import build_config
from hasten.core.errors import DataError, UsageError
from hasten.data.aligned import open_aligned
from hasten.data.augment import Augmentation
from hasten.data.corpus import open_corpus
from hasten.data.packing import IGNORED
from hasten.data.tokenizer import train_tokenizer
from hasten.model.heads import TokenOutputs
from hasten.task.contract import Drawing, TaskSettings
from hasten.task.translation import PairedExamples, Translation
from hasten.training.back_translation import back_translate
from hasten.training.sources import open_sources

PAIRS = [
    ("a heron by the water", "ein Reiher am Wasser"),
    ("the old saw is sharp", "die alte Säge ist scharf"),
    ("one ripe plum", "eine reife Pflaume"),
    ("two crows and an owl", "zwei Krähen und eine Eule"),
    ("a hammer near a drill", "ein Hammer bei einem Bohrer"),
    ("figs and a melon", "Feigen und eine Melone"),
    ("an eagle", "ein Adler"),
    ("file and vice", "Feile und Schraubstock"),
]
SOURCES, TARGETS = [source for source, _ in PAIRS], [target for _, target in PAIRS]
OWN = {key: value for key, value in TINY.items() if key != "model.pooling"}
OVERFIT: dict[str, Any] = {
    **OWN,
    "data.augment": "none",
    "data.validation_fraction": 0.0,
    "model.dropout": 0.0,
    "model.zero_init_residual": False,
    "model.initializer_std": 0.1,
    "train.epochs": 50,
    "train.tokens_per_step": 110,
    "train.learning_rate": 1e-2,
    "train.label_smoothing": 0.0,
    "train.ema_decay": 0.0,
    "optim.weight_decay": 0.0,
    "eval.patience": 0,
}
FORMS = ("aligned", "columns")


def write_aligned(folder: Path, pairs: Sequence[tuple[str, str]] = PAIRS) -> tuple[Path, Path]:
    """Writes two files of lines, x.en and x.de."""
    paths = folder / "x.en", folder / "x.de"
    for path, lines in zip(paths, zip(*pairs, strict=True), strict=True):
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return paths


def data_of(folder: Path, form: str, pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Writes pairs and returns the keys that name them as the training data."""
    if form == "columns":
        return {"data.train": (str(write_rows(folder / "x.csv", pairs, ("en", "de"))),)}
    source, target = write_aligned(folder, pairs)
    return {"data.source": str(source), "data.target": str(target)}


def learn_by_heart(folder: Path, form: str, **settings: Any) -> hasten.Run:
    data = data_of(folder, form, PAIRS)
    tests = {key.replace("data.", "data.test_").replace("_train", ""): v for key, v in data.items()}
    return hasten.train(output=folder / "run", settings={**OVERFIT, **data, **tests, **settings})


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, hasten.Run]:
    """A run of each form that has learned eight examples by heart."""
    return {form: learn_by_heart(tmp_path_factory.mktemp(form), form) for form in FORMS}


# Learned


@pytest.mark.parametrize("form", FORMS)
def test_eight_examples_are_learned_by_heart(form: str, runs: dict[str, hasten.Run]):
    run = runs[form]
    test, training = run.result["test"], run.result["training"]
    assert test["loss"] < 0.02 and test["num_examples"] == test["num_decoded"] == 8
    assert test["exact_match"] == 1.0 and test["token_error_rate"] == 0.0
    assert test["bleu"] == pytest.approx(100) and test["chrf"] == pytest.approx(100)
    assert "tok:13a" in test["bleu_signature"] and "nc:6" in test["chrf_signature"]
    assert training["padding_fraction"] == 0.0 and training["epochs"] == 50
    found = run.predict(SOURCES)
    assert [prediction["translation"] for prediction in found] == TARGETS
    sample = test["samples"][0].split("\n")
    assert sample == [
        f"source: {SOURCES[0]}",
        f"output: {TARGETS[0]}",
        f"wanted: {TARGETS[0]}",
    ]


def test_both_forms_learn_the_same(runs: dict[str, hasten.Run]):
    first, second = (
        (run.folder / "model" / "model.safetensors").read_bytes() for run in runs.values()
    )
    assert first == second


@pytest.mark.parametrize(
    "settings",
    [
        {
            "tokenizer.shared": False,
            "model.tie_embeddings": False,
            "model.num_decoder_layers": 1,
            "model.positions": "learned",
        },
        {
            "model.norm_placement": "post",
            "model.norm": "layernorm",
            "model.positions": "sinusoidal",
            "model.bias": True,
            "train.learning_rate": 5e-3,
            "train.epochs": 70,
            "tokenizer.kind": "wordpiece",
        },
        {
            "model.num_kv_heads": 1,
            "model.qk_norm": True,
            "model.activation": "swiglu",
            "model.logit_softcap": 30.0,
            "tokenizer.kind": "unigram",
            "tokenizer.shared": False,
        },
    ],
)
def test_every_kind_of_model_learns_eight_examples(settings: dict[str, Any], tmp_path: Path):
    run = learn_by_heart(tmp_path, "aligned", **settings)
    assert run.result["test"]["exact_match"] == 1.0
    assert run.result["test"]["bleu"] == pytest.approx(100)
    num_tokenizers = 1 + (settings.get("tokenizer.shared") is False)
    again = hasten.load(run.folder)
    assert len(again.task.tokenizers) == num_tokenizers
    assert [found["translation"] for found in again.predict(SOURCES)] == TARGETS


def test_scores_agree_with_the_evaluation(runs: dict[str, hasten.Run]):
    """Translations are found token by token, and are what the evaluation reads in one go."""
    run = runs["aligned"]
    tokenizer = run.task.tokenizers[-1]
    num_tokens = [len(tokenizer.encode(target).ids) + 1 for target in TARGETS]
    found = run.predict(SOURCES, num_beams=1)
    total = sum(prediction["score"] for prediction in found)
    assert -total / sum(num_tokens) == pytest.approx(run.result["test"]["loss"], rel=1e-3, abs=1e-6)
    # Beams are compared by the mean over their tokens, the end among them.
    beams = run.predict(SOURCES, num_beams=4)
    for beam, greedy, count in zip(beams, found, num_tokens, strict=True):
        assert beam["score"] == pytest.approx(greedy["score"] / count, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_an_evaluation_repeats_the_test(form: str, runs: dict[str, hasten.Run]):
    run = runs[form]
    folder = run.folder.parent
    paths = folder / "x.csv" if form == "columns" else [folder / "x.en", folder / "x.de"]
    again = run.evaluate(paths)
    for name in ("loss", "bleu", "chrf", "exact_match", "num_examples", "num_decoded"):
        assert again[name] == pytest.approx(run.result["test"][name], rel=1e-5)


def test_predictions_do_not_depend_on_their_company(runs: dict[str, hasten.Run]):
    run = runs["columns"]
    texts = [*SOURCES, "owl file plum", "the the the and", "one"]
    together = run.predict(texts, num_return=3, num_beams=4)
    for text, found in zip(texts, together, strict=True):
        (alone,) = run.predict(text, num_return=3, num_beams=4)
        assert alone["translation"] == found["translation"]
        alternatives = [[one["translation"] for one in p["alternatives"]] for p in (alone, found)]
        assert alternatives[0] == alternatives[1] and len(alternatives[0]) == 2
        scores = [found["score"], *(one["score"] for one in found["alternatives"])]
        assert scores == sorted(scores, reverse=True)
    assert run.predict([]) == []


def test_odd_texts_are_translated_too(runs: dict[str, hasten.Run]):
    odd = ["", " ", "\u0000", "中文", "👍🏽", "x" * 5000, "[CLS] [PAD] [SEP]"]
    for found in runs["aligned"].predict(odd):
        assert isinstance(found["translation"], str) and math.isfinite(found["score"])
        # Ten more tokens than the longest of the training, if it does not end by itself.
        assert len(found["translation"]) < 200


@pytest.mark.parametrize("form", FORMS)
def test_a_saved_run_predicts_the_same_in_a_new_process(form: str, runs: dict[str, hasten.Run]):
    run = runs[form]
    found = predict_in_new_process(run.folder, *SOURCES, "--n-best", "2")
    assert found == run.predict(SOURCES, num_return=2)
    assert [prediction["translation"] for prediction in found] == TARGETS


# Stopped and resumed

NOISY: dict[str, Any] = {
    **OWN,
    "data.augment": "bpe_dropout=0.2,word_swap=0.1,char_noise=0.02",
    "model.dropout": 0.2,
    "model.attention_dropout": 0.1,
    "model.token_dropout": 0.1,
    "model.stochastic_depth": 0.1,
    "train.label_smoothing": 0.1,
    "train.ema_decay": 0.9,
    "train.epochs": 3,
    "train.tokens_per_step": 100,
    "train.micro_batch_tokens": 80,
    "train.learning_rate": 3e-3,
    "data.validation_fraction": 0.2,
    "eval.patience": 0,
    "eval.metric": "chrf",
    "eval.decode_examples": 3,
}


@pytest.mark.parametrize(("form", "shared"), [("aligned", True), ("columns", False)])
def test_a_stopped_run_resumes_exactly(form: str, shared: bool, tmp_path: Path):
    pairs = [(f"{source} {i}", f"{target} {i}") for i in range(3) for source, target in PAIRS]
    data = data_of(tmp_path, form, pairs)
    assert_resumes_exactly(tmp_path, {**NOISY, **data, "tokenizer.shared": shared})


# What is learned


def task_and_examples(
    folder: Path,
    pairs: Sequence[tuple[str, str]],
    *,
    max_length: int = 60,
    shared: bool = False,
    drawing: Drawing | None = None,
) -> tuple[Translation, PairedExamples]:
    """The task and the examples of two files, as a run makes them."""
    file = open_aligned(*write_aligned(folder, pairs))
    reading = Translation.reading_of("pair", file.columns, None)
    corpus = open_corpus([file], reading)
    rows = np.arange(len(corpus))
    settings = TaskSettings(max_length=max_length, shared_vocabulary=shared)
    texts = Translation.tokenizer_texts(corpus, rows, reading, settings)
    tokenizers = tuple(train_tokenizer(one, kind="char", vocab_size=300) for one in texts)
    task = Translation.from_data(corpus, rows, reading, tokenizers, settings)
    return task, task.examples(corpus, rows, drawing)


@pytest.mark.parametrize("shared", [True, False])
def test_sources_and_targets_by_hand(shared: bool, tmp_path: Path):
    task, examples = task_and_examples(tmp_path, [("ab", "xyz"), ("b", "zx")], shared=shared)
    assert len(task.tokenizers) == 2 - shared
    # What is learned of a target: its tokens and their end.
    assert examples.weights.tolist() == [4.0, 3.0]
    # In a batch: the source and its end, the beginning and the target.
    assert examples.lengths.tolist() == [3 + 4, 2 + 3]
    batch = examples.pack(np.array([1, 0]), weight=7.0)
    assert batch.weight == 7.0 and batch.source is not None and batch.targets is not None
    sides = [
        [task.tokenizers[number].id_to_token(i) for i in ids.tolist()]
        for number, ids in ((0, batch.source.token_ids), (-1, batch.token_ids), (-1, batch.targets))
    ]
    assert sides == [
        ["b", "[SEP]", "a", "b", "[SEP]"],
        ["[CLS]", "z", "x", "[CLS]", "x", "y", "z"],
        ["z", "x", "[SEP]", "x", "y", "z", "[SEP]"],
    ]
    assert batch.source.layout.lengths == (2, 3) and batch.layout.lengths == (3, 4)
    assert batch.example_ids.tolist() == batch.source.example_ids.tolist() == [1, 0]


def test_long_texts_are_cut_and_keep_their_end(tmp_path: Path):
    pairs = [("a" * 9, "xyz"), ("ab", "x" * 9), ("a" * 9, "x" * 9), ("ab", "xy")]
    task, examples = task_and_examples(tmp_path, pairs, max_length=6)
    batch = examples.pack(np.arange(4))
    assert batch.source is not None and batch.targets is not None
    assert batch.source.layout.lengths == (6, 3, 6, 3)
    assert batch.layout.lengths == (4, 6, 6, 3)
    end = task.tokenizers[-1].token_to_id("[SEP]")
    lasts = batch.layout.offsets[1:].long() - 1
    assert batch.targets[lasts].tolist() == [end] * 4
    assert IGNORED not in batch.targets.tolist()
    assert examples.num_truncated == 4  # texts: one pair has two


def test_the_source_is_no_part_of_the_loss(tmp_path: Path):
    """Under the same scores, other sources have the same loss."""
    losses = []
    for number, sources in enumerate((SOURCES, [source[::-1] for source in SOURCES])):
        (folder := tmp_path / str(number)).mkdir()
        pairs = list(zip(sources, TARGETS, strict=True))
        task, examples = task_and_examples(folder, pairs)
        batch = examples.pack(np.arange(8))
        generator = torch.Generator().manual_seed(3)
        hidden, weight = (
            torch.randn(n, 8, generator=generator) for n in (batch.num_tokens, task.num_classes)
        )
        losses.append(task.loss_sum(TokenOutputs(hidden, weight, 0.0), batch).item())
        assert examples.weights.tolist() == [len(target) + 1 for target in TARGETS]
    assert losses[0] == losses[1]


def test_only_subwords_of_targets_are_drawn_anew(tmp_path: Path):
    """What is wrong in a source the model must bear; a wrong target it would learn to write."""
    drawing = Drawing(1, Augmentation(word_swap=0.9, char_noise=0.5))
    task, examples = task_and_examples(tmp_path, PAIRS, drawing=drawing)
    tokenizer = task.tokenizers[-1]
    batches = [examples.in_epoch(epoch).pack(np.arange(8)) for epoch in (0, 1, 0)]
    sources = []
    for batch in batches:
        assert batch.source is not None
        sources.append(batch.source.token_ids.tolist())
        starts = batch.layout.offsets.tolist()
        found = [
            tokenizer.decode(batch.token_ids[a:b].tolist()) for a, b in itertools.pairwise(starts)
        ]
        assert found == TARGETS
    assert sources[0] == sources[2] != sources[1]


# How it is used


def test_what_is_generated_is_bounded_by_the_training(tmp_path: Path):
    settings = {**OWN, "train.epochs": 1, "tokenizer.kind": "char", "data.validation_fraction": 0}
    data = data_of(tmp_path, "aligned", [(f"w{i}", "ab") for i in range(20)])
    run = hasten.train(output=tmp_path / "run", settings={**settings, **data})
    assert isinstance(run.task, Translation) and run.task.longest_target == 4
    for found in run.predict(["w1", "w" * 100], num_beams=1):
        assert len(found["translation"].replace(" ", "")) <= 14
    (short,) = run.predict("w1", num_beams=1, max_new_tokens=1)
    assert len(short["translation"]) <= 1


def test_white_space_around_a_source_is_no_part_of_it(runs: dict[str, hasten.Run]):
    run = runs["aligned"]
    plain, spaced = run.predict([SOURCES[0], f"\n {SOURCES[0]}\t"])
    assert plain == spaced


def test_the_run_folder_holds_both_vocabularies(tmp_path: Path):
    data = data_of(tmp_path, "columns", PAIRS)
    settings = {**OVERFIT, **data, "train.epochs": 1, "tokenizer.shared": False}
    run = hasten.train(output=tmp_path / "run", settings=settings)
    names = {path.name for path in (run.folder / "model").iterdir()}
    assert names == {
        "hasten.json",
        "config.json",
        "model.safetensors",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "target_tokenizer.json",
    }
    described = json.loads((run.folder / "data.json").read_text(encoding="utf-8"))
    assert described["columns"] == ["en", "de"] and described["label_column"] is None
    found = run.evaluate(tmp_path / "x.csv")
    assert found["num_examples"] == 8 and 0 <= found["bleu"] <= 100


def test_the_direction_is_that_of_the_columns(tmp_path: Path):
    path, observer = write_rows(tmp_path / "x.csv", PAIRS, ("en", "de")), Recorder()
    settings = {**OVERFIT, "train.epochs": 1, "data.source": "de"}
    run = hasten.train(path, output=tmp_path / "run", settings=settings, observer=observer)
    assert run.task.reading.columns == ("de", "en") and run.task.input_columns == ("de",)
    with pytest.raises(UsageError, match="given twice"):
        hasten.train(path, output=tmp_path / "b", settings={**settings, "data.target": "de"})


# More pairs


@pytest.mark.parametrize("form", FORMS)
def test_back_translated_pairs_are_trained_on_beside_line_aligned_files(
    form: str, runs: dict[str, hasten.Run], tmp_path: Path
):
    """From English lines a run into German makes pairs for the other direction, German first."""
    lines = tmp_path / "mono.txt"
    lines.write_text("\n".join([SOURCES[6], "", f" {SOURCES[2]} "]) + "\n", encoding="utf-8")
    table, warnings = tmp_path / "more.csv", list[str]()
    counts = back_translate(runs[form], lines, table, warn=warnings.append)
    assert (counts["num_pairs"], counts["num_rejected"]) == (2, 1)
    assert warnings == [f"warning: {lines}, line 2: the text is empty; left out"]
    header = {"aligned": "source,target", "columns": "de,en"}[form]
    made = [(TARGETS[6], SOURCES[6]), (TARGETS[2], SOURCES[2])]
    assert table.read_text("utf-8").splitlines() == [header, *map(",".join, made)]

    english, german = write_aligned(tmp_path)
    data = {"data.source": str(german), "data.target": str(english), "train.epochs": 2}
    run = hasten.train(table, output=tmp_path / "run", settings={**OWN, **data})
    kept = json.loads((run.folder / "data.json").read_text())
    assert kept["rows"]["train"] == {"read": 10, "used": 10, "rejected": 0}
    assert kept["columns"] == header.split(",")
    assert [entry["path"] for entry in kept["files"]] == [str(table), str(german), str(english)]
    texts = open_sources(build_config(file=run.folder / "config.yaml"), Recorder())
    assert sorted(texts.corpora["train"].texts()) == sorted(
        [*made, *((target, source) for source, target in PAIRS)]
    )
    measured = run.result["validation"]["loss"]
    again = hasten.train(resume=run.folder)  # measured again, with the same rows held out
    assert again.result["validation"]["loss"] == measured
    english.write_text("changed\n" * 8)
    with pytest.raises(DataError, match=r"x\.en has changed since the run began"):
        hasten.train(resume=run.folder)


def test_only_translations_translate_back(runs: dict[str, hasten.Run], tmp_path: Path):
    labelled = write_rows(tmp_path / "l.csv", labelled_rows(40), ("text", "label"))
    run = hasten.train(labelled, output=tmp_path / "run", settings=TINY)
    with pytest.raises(UsageError, match="only translations turn back"):
        back_translate(run, labelled, tmp_path / "more.csv", warn=print)
    assert not (tmp_path / "more.csv").exists()
