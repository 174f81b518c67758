"""What every task promises, kept by question answering: learns, resumes, is saved, is used."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from other_processes import assert_resumes_exactly, predict_in_new_process

import hasten
from builders import STILL, TINY, write_rows
from hasten.core.errors import DataError, UsageError
from hasten.data.corpus import open_corpus
from hasten.data.rows import open_rows
from hasten.task.contract import Machine
from hasten.training.evaluate import measure

# Answers beside and within words, in other scripts, of characters of several code points, and one
# that is beyond the first window.
EIGHT = [
    ("Paris is in France. Rome is in Italy.", "Where is Paris?", "France"),
    ("Paris is in France. Rome is in Italy.", "Where is Rome?", "Italy"),
    ("  The cafe\u0301 by the Zürichsee opens at 9 a.m.", "What opens?", "cafe\u0301"),
    ("北京是中华人民共和国的首都。", "北京是什么？", "人民共和国的首都"),
    ("Ada wrote notes; Grace wrote a compiler.", "Who wrote a compiler?", "Grace"),
    ("Ada wrote notes; Grace wrote a compiler.", "Who wrote notes?", "Ada"),
    ("Emoji 👍🏽 mean yes, 👎 mean no.", "What means yes?", "👍🏽"),
    (
        "so long " * 30 + "the treasure lies under the oak " + "and on " * 30,
        "Where is the treasure?",
        "under the oak",
    ),
]
COLUMNS = ("context", "question", "answer")
SMALL: dict[str, Any] = {
    **{key: value for key, value in TINY.items() if key != "model.pooling"},
    **STILL,
    "tokenizer.max_length": 64,
    "tokenizer.vocab_size": 400,
    "data.stride": 16,
    "optim.weight_decay": 0.0,
}
OVERFIT: dict[str, Any] = {
    **SMALL,
    "data.validation_fraction": 0.0,
    "train.epochs": 60,
    "train.tokens_per_step": 400,
    "train.learning_rate": 1e-2,
    "optim.schedule": "constant",
    "eval.patience": 0,
    "eval.baseline": True,
}


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> hasten.Run:
    folder = tmp_path_factory.mktemp("eight")
    path = write_rows(folder / "train.csv", EIGHT, COLUMNS)
    return hasten.train(path, test=path, output=folder / "run", settings=OVERFIT)


def asked(rows: Sequence[tuple[str, str, str]]) -> list[tuple[str, str]]:
    return [(context, question) for context, question, _ in rows]


def test_eight_examples_are_learned_by_heart(eight: hasten.Run):
    test = eight.result["test"]
    assert test["exact_match"] == test["f1"] == 1.0
    assert test["loss"] < 0.1 and test["num_examples"] == 8
    assert eight.result["task"] == "question-answering"
    assert eight.result["input_columns"] == ["context", "question"]
    assert len(test["samples"]) == 3
    assert test["samples"][0] == "question: Where is Paris?\nanswer: France\nwanted: France"
    baseline = eight.result["baselines"]["first_sentence"]
    assert 0 < baseline["f1"] < 1 and baseline["exact_match"] == 0
    assert eight.result["training"]["padding_fraction"] == 0.0
    assert eight.result["training"]["epochs"] == 60


def test_predictions_are_the_answers_with_their_places(eight: hasten.Run):
    predictions = eight.predict(asked(EIGHT))
    for prediction, (context, _, answer) in zip(predictions, EIGHT, strict=True):
        assert prediction["answer"] == answer
        assert context[prediction["start"] : prediction["end"]] == answer
        assert 0.5 < prediction["score"] <= 1
    again = eight.evaluate(eight.folder.parent / "train.csv")
    for name in ("loss", "exact_match", "f1", "num_examples"):
        assert again[name] == pytest.approx(eight.result["test"][name], rel=1e-5)


def test_a_prediction_is_the_same_in_whatever_company(eight: hasten.Run):
    together = eight.predict(asked(EIGHT) * 3)
    for row, prediction in zip(asked(EIGHT) * 3, together, strict=True):
        (alone,) = eight.predict([row])
        assert alone.pop("score") == pytest.approx(prediction.pop("score"), rel=1e-4)
        assert alone == prediction
    assert eight.predict([]) == []


def test_odd_texts_are_answered_too(eight: hasten.Run):
    odd = ("", " ", "\u0000", "中文", "👍🏽", "x" * 5000, "[CLS] [PAD] [SEP]", "\u0301")
    for text in odd:
        for row in ((text, "Where?"), ("Rome is in Italy.", text)):
            (found,) = eight.predict([row])
            assert 0 <= found["score"] <= 1
            if found["answer"]:
                assert row[0][found["start"] : found["end"]] == found["answer"]
            else:
                assert found["start"] is found["end"] is None
    with pytest.raises(UsageError, match=r"2 texts .*\(context, question\)"):
        eight.predict(["only one"])


def test_a_saved_run_predicts_the_same_in_a_new_process(eight: hasten.Run):
    rows = asked(EIGHT)
    texts = [text for row in rows for text in row]
    assert predict_in_new_process(eight.folder, *texts) == eight.predict(rows)


@pytest.mark.parametrize(
    "settings",
    [
        {"tokenizer.kind": "char", "train.label_smoothing": 0.05},
        {
            "model.positions": "learned",
            "model.norm": "layernorm",
            "model.qk_norm": True,
            "train.epochs": 150,
        },
        {"tokenizer.kind": "unigram", "model.norm_placement": "post", "train.learning_rate": 3e-3},
    ],
)
def test_every_kind_of_model_learns_eight_examples(settings: dict[str, Any], tmp_path: Path):
    path = write_rows(tmp_path / "train.csv", EIGHT, COLUMNS)
    run = hasten.train(path, test=path, output=tmp_path / "run", settings={**OVERFIT, **settings})
    assert run.result["test"]["f1"] == 1.0


# Resuming

PLACES = ["the garden", "a small shed", "Oslo", "the old mill", "room 12"]


def many(count: int, *, without: int = 0) -> list[tuple[str, str, str]]:
    """Questions that can be learned; every ``without``-th has no answer."""
    draw = np.random.default_rng(0)
    rows = []
    for i in range(count):
        cat, dog = draw.permutation(PLACES)[:2]
        animal, answer = (("cat", cat), ("dog", dog))[i % 2]
        context = f"The cat sleeps in {cat}. The dog barks in {dog} number {i}."
        is_asked_in_vain = without and i % without == 0
        name = "bird" if is_asked_in_vain else animal
        rows.append((context, f"Where is the {name}?", "" if is_asked_in_vain else str(answer)))
    return rows


def test_a_run_that_is_stopped_resumes_exactly(tmp_path: Path):
    path = write_rows(tmp_path / "train.csv", many(60, without=5), COLUMNS)
    settings = {
        **SMALL,
        "data.train": str(path),
        "data.test": str(path),
        "model.dropout": 0.2,
        "model.token_dropout": 0.1,
        "train.epochs": 3,
        "train.tokens_per_step": 500,
        "eval.patience": 0,
    }
    assert_resumes_exactly(tmp_path, settings)


# Questions without answer


def test_questions_without_answer_are_learned(tmp_path: Path):
    rows = [*EIGHT, *((context, f"Why? {question}", "") for context, question, _ in EIGHT[:6])]
    path = write_rows(tmp_path / "train.csv", rows, COLUMNS)
    settings = {**OVERFIT, "train.epochs": 100}
    run = hasten.train(path, test=path, output=tmp_path / "run", settings=settings)
    test = run.result["test"]
    assert test["exact_match"] == test["f1"] == 1.0
    assert test["with_answer"]["num_examples"] == 8 and test["without_answer"]["f1"] == 1.0
    for prediction, (_, _, answer) in zip(run.predict(asked(rows)), rows, strict=True):
        assert prediction["answer"] == answer
        assert (prediction["start"] is None) == (answer == "")
        assert prediction["score"] > 0.5


def test_the_threshold_of_the_model_is_the_best_on_what_it_is_chosen_on(tmp_path: Path):
    path = write_rows(tmp_path / "train.csv", many(120, without=3), COLUMNS)
    settings = {**SMALL, "train.epochs": 2, "train.tokens_per_step": 400}
    run = hasten.train(path, output=tmp_path / "run", settings=settings)
    task, model = run.task, run.saved.model
    corpus = open_corpus([open_rows(path)], task.reading)
    examples = task.examples(corpus, np.arange(len(corpus)))

    def measured():
        return measure(model, task, examples, Machine(run.device))

    def f1_at(threshold: float) -> float:
        values = task.to_json()
        values["answers"]["threshold"] = threshold
        other = type(task).from_json(values, task.reading, task.tokenizers)
        return measure(model, other, examples, Machine(run.device)).compute()["f1"]

    task.calibrate(measured)
    best = measured().compute()["f1"]
    assert best == f1_at(task.to_json()["answers"]["threshold"])
    assert best >= max(f1_at(threshold) for threshold in np.linspace(-20, 20, 21).tolist())


# Files


def test_squad_and_table_are_read_alike(eight: hasten.Run, tmp_path: Path):
    paragraphs = [
        {
            "context": context,
            "qas": [
                {
                    "id": question,
                    "question": question,
                    "answers": [{"text": answer, "answer_start": context.index(answer)}],
                }
            ],
        }
        for context, question, answer in EIGHT
    ]
    path = tmp_path / "train.json"
    path.write_text(json.dumps({"data": [{"title": "t", "paragraphs": paragraphs}]}))
    run = hasten.train(path, output=tmp_path / "run", settings={**OVERFIT, "train.epochs": 1})
    assert run.task.reading.columns == ("context", "question", "answers")
    found = eight.evaluate(path, label_column="answers")
    for name in ("loss", "exact_match", "f1", "num_examples"):
        assert found[name] == pytest.approx(eight.result["test"][name], rel=1e-5)
    with pytest.raises(UsageError, match="answer"):
        eight.evaluate(path)


def test_rejected_rows_are_all_listed(tmp_path: Path):
    rows = [*many(60), ("The cat sleeps.", "Who barks?", "the dog"), ("", "Where?", "here")]
    path = write_rows(tmp_path / "t.csv", rows, COLUMNS)
    run = hasten.train(path, output=tmp_path / "run", settings={**SMALL, "train.epochs": 1})
    lines = (run.folder / "rejected.jsonl").read_text().splitlines()
    assert [(json.loads(line)["line"], json.loads(line)["reason"]) for line in lines] == [
        (62, "the answer is not in its context"),
        (63, "the context is empty"),
    ]


def test_what_cannot_be_learned_from_is_refused(tmp_path: Path):
    rows = [(context, question, "") for context, question, _ in EIGHT]
    path = write_rows(tmp_path / "t.csv", rows, COLUMNS)
    settings = {**OVERFIT, "task": "question-answering"}
    with pytest.raises(DataError, match=r"no question has an answer.*'answer'"):
        hasten.train(path, output=tmp_path / "run", settings=settings)
    path = write_rows(tmp_path / "u.csv", EIGHT, COLUMNS)
    for key, value in (
        ("data.augment", "bpe_dropout=0.1"),
        ("model.pooling", "mean"),
        ("tokenizer.max_length", 7),
    ):
        with pytest.raises(UsageError, match=key.replace(".", r"\.")):
            hasten.train(path, output=tmp_path / "run", settings={**OVERFIT, key: value})
