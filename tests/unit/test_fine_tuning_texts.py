"""Pretrained models that answer, write and translate: texts surrounded as their families want."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from builders import WORDS, Recorder, labelled_rows, write_rows
from hasten.config.load import build_config
from hasten.core.errors import UsageError
from hasten.training.build import build_loop, plan_run
from hasten.training.run import Run
from hasten.training.session import resume_run, start_run
from pretrained_folders import BEGIN, END, LANGUAGES, PADDING, write_bert, write_text_model

transformers = pytest.importorskip("transformers")

SETTINGS: dict[str, Any] = {
    "train.epochs": 1,
    "train.tokens_per_step": 300,
    "train.label_smoothing": 0.0,
    "train.precision": "float32",
    "train.matrix_library": "default",
    "train.num_threads": 1,
    "eval.baseline": False,
}
LEARNING = {"train.epochs": 30, "train.tokens_per_step": 80, "train.learning_rate": 1e-2}
TWO = {"tokenizer.source_language": "de", "tokenizer.target_language": "en"}
PAIRS = [(text, text.upper().lower().split()[-1]) for text, _ in labelled_rows(40)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory):
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = write_text_model(tmp_path_factory.mktemp("pretrained") / kind, kind)
        return made[kind]

    return folder


def config_of(folder: Path, data: Path, **settings: Any):
    keys = {"data.train": str(data), "model.pretrained": str(folder)}
    return build_config(overrides={**keys, **SETTINGS, **settings})


def planned(folder: Path, data: Path, tmp_path: Path, **settings: Any) -> tuple[Any, Any]:
    """The plan of a run, and its model in evaluation mode."""
    plan = plan_run(config_of(folder, data, **settings), Recorder())
    return plan, build_loop(plan, tmp_path, Recorder()).parts.model.eval()


def own_loss(plan: Any, model: torch.nn.Module, count: int) -> tuple[float, list[tuple[str, ...]]]:
    """The mean loss of a unit of the first training examples, and their rows."""
    train = plan.data.splits["train"]
    numbers = np.arange(count)
    batch = train.pack(numbers)
    loss = plan.data.task.loss_sum(model(batch), batch).item()
    rows = list(train.corpus.texts(train.rows[numbers]))
    return loss / train.weights[numbers].sum(), rows


def padded(rows: list[list[int]], value: int) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])


# Translation


def surrounded(kind: str, source: list[int], target: list[int]) -> tuple[list[int], list[int]]:
    """Source and labels as the tokenizer of each family makes them for transformers."""
    if kind in LANGUAGES:
        read, write = 4, 5  # the codes of German and English
        if kind == "mbart":
            return [*source, END, read], [*target, END, write]
        return [read, *source, END], [write, *target, END]
    first = [BEGIN] if kind == "bart" else []
    return [*first, *source, END], [*first, *target, END]


@pytest.mark.parametrize("kind", ["t5", "bart", "marian", "m2m_100", "mbart"])
def test_the_loss_of_translating_is_that_of_transformers(kind: str, folders, tmp_path: Path):
    folder = folders(kind)
    data = write_rows(tmp_path / "pairs.csv", PAIRS, ("de", "en"))
    plan, model = planned(folder, data, tmp_path, **(TWO if kind in LANGUAGES else {}))
    assert plan.data.task.name == "translation"
    found, rows = own_loss(plan, model, 7)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    pairs = [
        surrounded(kind, *(tokenizer.encode(t, add_special_tokens=False).ids for t in row))
        for row in rows
    ]
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    sources = padded([source for source, _ in pairs], PADDING)
    with torch.inference_mode():
        output = theirs(
            input_ids=sources,
            attention_mask=(sources != PADDING).long(),
            labels=padded([target for _, target in pairs], -100),
        )
    assert found == pytest.approx(output.loss.item(), rel=1e-5)


def test_a_translation_ends_where_it_learned_to(folders, tmp_path: Path):
    data = write_rows(
        tmp_path / "pairs.csv",
        [(text, word) for word in (*WORDS["fruit"], *WORDS["tool"]) for text in [f"the {word}"]]
        * 6,
        ("source", "target"),
    )
    folder = shutil.copytree(folders("bart"), tmp_path / "bart")
    start_run(
        config_of(folder, data, **LEARNING, **{"data.validation": str(data)}),
        tmp_path / "run",
        Recorder(),
    )
    shutil.rmtree(folder)
    run = Run(tmp_path / "run")
    assert [run.predict(f"the {w}")[0]["translation"] for w in ("plum", "saw")] == ["plum", "saw"]


def test_a_model_of_many_languages_has_to_know_which(folders, tmp_path: Path):
    data = write_rows(tmp_path / "pairs.csv", PAIRS, ("de", "en"))
    for kind, wanted, said in (
        ("m2m_100", {}, "source_language: .* name it .__de__, __en__."),
        ("m2m_100", {**TWO, "tokenizer.target_language": "xx"}, "target_language.*there is no"),
        ("t5", TWO, "no codes of languages"),
    ):
        with pytest.raises(UsageError, match=said):
            plan_run(config_of(folders(kind), data, **wanted), Recorder())


# Text generation


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("form", ["documents", "pairs"])
def test_the_loss_of_writing_is_that_of_transformers(kind: str, form: str, folders, tmp_path: Path):
    folder = folders(kind)
    if form == "pairs":
        data = write_rows(tmp_path / "d.csv", PAIRS, ("prompt", "response"))
    else:
        data = write_rows(tmp_path / "d.csv", [(text,) for text, _ in PAIRS], ("text",))
    plan, model = planned(folder, data, tmp_path, task="text-generation")
    found, rows = own_loss(plan, model, 7)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    encoded = [[tokenizer.encode(t, add_special_tokens=False).ids for t in row] for row in rows]
    # This tokenizer has no token for a line's end.
    ids = [[BEGIN, *(i for cell in row for i in cell), END] for row in encoded]
    labels = [
        [-100] * (1 + sum(map(len, row[:-1]))) + whole[1 + sum(map(len, row[:-1])) :]
        for row, whole in zip(encoded, ids, strict=True)
    ]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    rows_ids = padded(ids, PADDING)
    with torch.inference_mode():
        output = theirs(
            input_ids=rows_ids,
            attention_mask=(rows_ids != PADDING).long(),
            labels=padded(labels, -100),
        )
    assert found == pytest.approx(output.loss.item(), rel=1e-5)


def test_an_answer_ends_where_it_learned_to(folders, tmp_path: Path):
    words = (*WORDS["fruit"], *WORDS["tool"])
    data = write_rows(
        tmp_path / "d.csv", [(f"the {word}", word) for word in words] * 6, ("prompt", "response")
    )
    start_run(
        config_of(folders("llama"), data, **LEARNING, **{"data.validation": str(data)}),
        tmp_path / "run",
        Recorder(),
    )
    run = Run(tmp_path / "run")
    assert [run.predict(f"the {w}")[0]["generated"] for w in ("plum", "saw")] == ["plum", "saw"]


# Question answering


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [
        (f"{text} and the {word}", f"one {word}", word)
        for (text, _), word in zip(labelled_rows(60), WORDS["bird"] * 8, strict=False)
    ]
    path = tmp_path_factory.mktemp("data") / "q.csv"
    return write_rows(path, rows, ("context", "question", "answer"))


def test_questions_are_answered_and_a_run_goes_on_without_the_folder(
    questions: Path, tmp_path: Path
):
    folder = write_bert(tmp_path / "bert", initializer_range=0.1)
    settings = {"data.test": str(questions), "tokenizer.max_length": 24, "data.stride": 6}
    config = config_of(folder, questions, **settings)
    result = start_run(config, tmp_path / "run", Recorder())
    assert set(result["test"]) >= {"f1", "exact_match"}
    task = Run(tmp_path / "run").saved.task
    assert task.form.num_token_types == 2 and task.form.template.first
    shutil.rmtree(folder)
    resume_run(tmp_path / "run", Recorder())
    again = Run(tmp_path / "run").evaluate(questions)
    assert again["f1"] == pytest.approx(result["test"]["f1"])
    found = Run(tmp_path / "run").predict([("the old owl", "one owl")])
    assert found[0]["answer"] in "the old owl"


def test_windows_are_scored_as_transformers_does(questions: Path, tmp_path: Path):
    folder = write_bert(tmp_path / "bert", initializer_range=0.1)
    plan, model = planned(folder, questions, tmp_path)
    batch = plan.data.splits["train"].pack(np.arange(3))
    theirs = transformers.BertForQuestionAnswering.from_pretrained(folder).eval()
    with torch.inference_mode():
        theirs.qa_outputs.weight.copy_(model.get_parameter("head.scorer.weight"))
        theirs.qa_outputs.bias.copy_(model.get_parameter("head.scorer.bias"))
        ours = model(batch)
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        texts = plan.data.splits["train"].corpus.texts(plan.data.splits["train"].rows[:3])
        expected = []
        for context, question, _ in texts:
            encoded = tokenizer.encode(question, context)
            output = theirs(
                input_ids=torch.tensor([encoded.ids]),
                token_type_ids=torch.tensor([encoded.type_ids]),
            )
            expected.append(torch.stack([output.start_logits[0], output.end_logits[0]], -1))
    torch.testing.assert_close(ours, torch.cat(expected), rtol=1e-4, atol=1e-5)
