"""The loop: evaluation, the best model, stopping, what is logged, and giving up."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_training_step import Poisoned
from torch import Tensor

from builders import STILL, TINY, Recorder, write_labelled, write_rows
from hasten.config.load import build_config, differences, replace_values
from hasten.config.schema import ModelConfig
from hasten.core.errors import DivergenceError, HastenError, UsageError
from hasten.data.order import plan_epoch, steps_per_epoch
from hasten.task.contract import Machine
from hasten.task.text_classification import LabelledExamples
from hasten.training.build import Plan, build_loop, build_model, plan_run
from hasten.training.evaluate import evaluate, measure
from hasten.training.finish import finish_run
from hasten.training.loop import Loop
from hasten.training.observe import MetricsLog
from hasten.training.session import plan_only, start_run
from hasten.training.state import TrainState


@pytest.fixture(scope="module")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_labelled(tmp_path_factory.mktemp("data") / "train.csv", 150, noise=0.2)


def make(data_file: Path, folder: Path, **settings: Any) -> tuple[Loop, Plan, Recorder]:
    overrides = {
        "data.train": str(data_file),
        "train.tokens_per_step": 400,
        "train.epochs": 3,
        **TINY,
        **settings,
    }
    recorder = Recorder()
    plan = plan_run(build_config(overrides=overrides), recorder)
    return build_loop(plan, folder, recorder), plan, recorder


def run(loop: Loop) -> list[dict[str, Any]]:
    log = MetricsLog(loop.folder / "metrics.jsonl")
    try:
        loop.run(log)
    finally:
        log.close()
    return read_log(loop.folder)


def read_log(folder: Path) -> list[dict[str, Any]]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def test_what_is_logged_adds_up(data_file: Path, tmp_path: Path):
    settings = {"train.log_every": 4, "eval.per_epoch": 2, "data.augment": "none"}
    loop, plan, recorder = make(data_file, tmp_path, **settings)
    entries = run(loop)
    total, per_epoch = plan.total_steps, plan.steps_per_epoch
    assert loop.state.step == total == 3 * per_epoch
    trained = [e for e in entries if e.get("split") == "train"]
    assert [e["step"] for e in trained] == [*range(4, total, 4), total]
    assert trained[-1]["num_tokens"] == 3 * int(loop.train.lengths.sum()) == loop.state.num_tokens
    assert trained[-1]["epoch"] == 3.0
    evaluated = [e for e in entries if e.get("split") == "validation"]
    every = max(1, round(per_epoch / 2))
    assert [e["step"] for e in evaluated] == sorted({*range(every, total + 1, every), total})
    assert [i.step for i in recorder.steps] == [e["step"] for e in trained]
    assert [i.metrics["accuracy"] for i in recorder.evaluations] == [
        e["accuracy"] for e in evaluated
    ]
    assert all(0 <= e["accuracy"] <= 1 for e in entries)
    assert recorder.steps[-1].seconds_left == 0
    assert loop.state.evaluations[-1]["step"] == total


def test_training_loss_and_accuracy_are_of_the_steps_since_the_last_line(
    data_file: Path, tmp_path: Path
):
    """One line for all steps of an epoch equals the mean of a line for each."""
    fine, _, _ = make(data_file, tmp_path, **{"train.log_every": 1, "train.epochs": 1})
    lines = [e for e in run(fine) if e.get("split") == "train"]
    (tmp_path / "b").mkdir()
    coarse, _, _ = make(data_file, tmp_path / "b", **{"train.log_every": 1000, "train.epochs": 1})
    (line,) = [e for e in run(coarse) if e.get("split") == "train"]
    assert line["loss"] == pytest.approx(np.mean([e["loss"] for e in lines]))
    assert line["num_tokens"] == lines[-1]["num_tokens"]


def test_the_best_model_is_kept_and_restored(data_file: Path, tmp_path: Path):
    loop, plan, recorder = make(
        data_file,
        tmp_path,
        **STILL,
        **{
            "eval.per_epoch": 3,
            "eval.metric": "loss",
            "train.epochs": 16,
            "train.learning_rate": 0.02,
        },
    )
    seen: dict[int, dict[str, Tensor]] = {}
    original = recorder.evaluation

    def evaluation(info: Any) -> None:
        seen[info.step] = {n: t.clone() for n, t in loop.parts.model.state_dict().items()}
        original(info)

    recorder.evaluation = evaluation  # pyright: ignore[reportAttributeAccessIssue]
    run(loop)
    losses = {info.step: info.metrics["loss"] for info in recorder.evaluations}
    best = min(losses, key=lambda step: losses[step])
    assert best != plan.total_steps, "the run must overfit for this test to mean anything"
    assert loop.state.best_step == best and loop.state.best_metric == losses[best]
    assert [i.is_best for i in recorder.evaluations] == [
        i.metrics["loss"] == min(list(losses.values())[: n + 1])
        for n, i in enumerate(recorder.evaluations)
    ]
    result = finish_run(loop, plan)
    for name, tensor in loop.parts.model.state_dict().items():
        assert torch.equal(tensor, seen[best][name])
    assert result["validation"]["loss"] == losses[best]
    assert result["training"]["best_step"] == best


def test_the_averaged_weights_are_what_is_evaluated_and_kept(data_file: Path, tmp_path: Path):
    loop, plan, recorder = make(
        data_file, tmp_path, **{"train.ema_decay": 0.97, "eval.metric": "loss"}
    )
    run(loop)
    parts, split = loop.parts, loop.validation
    assert parts.average is not None and split is not None
    machine = Machine(parts.device, batch_tokens=500)
    raw = measure(parts.model, parts.task, split, machine).compute()
    last = recorder.evaluations[-1].metrics
    copy = build_model(plan, Path("none"), Recorder())
    copy.load_state_dict(dict(copy.state_dict()) | parts.average.tensors())
    averaged = measure(copy, parts.task, split, machine).compute()
    assert averaged["loss"] == pytest.approx(last["loss"], abs=1e-6)
    assert abs(raw["loss"] - last["loss"]) > 1e-4
    if loop.state.best_step == loop.state.step:
        finish_run(loop, plan)
        for name, tensor in parts.average.tensors().items():
            assert torch.equal(parts.model.get_parameter(name), tensor)


def test_evaluation_leaves_the_training_weights_and_mode(data_file: Path, tmp_path: Path):
    loop, _, _ = make(data_file, tmp_path, **{"train.ema_decay": 0.5})
    run(loop)
    parts = loop.parts
    before = {n: t.clone() for n, t in parts.model.state_dict().items()}
    assert loop.validation is not None
    parts.model.train()
    found = [
        evaluate(
            parts.model,
            parts.task,
            loop.validation,
            Machine(parts.device, batch_tokens=size),
            average=parts.average,
        ).metrics
        for size in (50, 100000)
    ]
    assert parts.model.training
    assert all(torch.equal(before[n], t) for n, t in parts.model.state_dict().items())
    assert found[0]["accuracy"] == found[1]["accuracy"]
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], abs=1e-6)
    assert found[0]["num_examples"] == len(loop.validation)
    assert found[0]["num_tokens"] == int(loop.validation.lengths.sum())


def test_early_stopping_ends_a_run_that_learns_nothing(data_file: Path, tmp_path: Path):
    loop, plan, recorder = make(
        data_file,
        tmp_path,
        **{"train.learning_rate": 1e-12, "eval.patience": 2, "train.epochs": 10},
    )
    run(loop)
    assert loop.state.stopped_early and len(recorder.evaluations) == 3
    assert loop.state.step == 3 * plan.steps_per_epoch
    assert loop.state.best_step == plan.steps_per_epoch
    result = finish_run(loop, plan)
    assert result["training"]["stopped_early"] is True
    assert result["training"]["steps"] == 3 * plan.steps_per_epoch


def test_patience_counts_evaluations_without_progress_only():
    state = TrainState()
    for step, value in enumerate([0.5, 0.4, 0.6, 0.6, float("nan"), 0.7]):
        state.step = step
        state.record(value, higher_is_better=True, loss=1.0)
    assert (state.best_metric, state.best_step, state.evaluations_since_best) == (0.7, 5, 0)
    state = TrainState()
    assert not state.record(float("nan"), higher_is_better=False, loss=1.0)
    assert state.best_metric is None and state.evaluations_since_best == 1
    assert state.record(3.0, higher_is_better=False, loss=1.0)
    assert state.record(2.0, higher_is_better=False, loss=1.0)
    assert not state.record(2.0, higher_is_better=False, loss=1.0)
    assert TrainState.from_dict(json.loads(json.dumps(state.as_dict()))) == state


def test_of_equal_metrics_the_lower_loss_is_the_better_model_but_no_progress():
    """Small validation sets often measure the same accuracy again."""
    state = TrainState()
    found = []
    for step, (accuracy, loss) in enumerate(
        [(0.5, 1.0), (0.5, 0.9), (0.5, 0.95), (0.5, 0.9), (0.4, 0.1), (0.5, 0.8), (0.6, 3.0)]
    ):
        state.step = step
        is_best = state.record(accuracy, higher_is_better=True, loss=loss)
        found.append((is_best, state.best_step, state.best_loss, state.evaluations_since_best))
    assert found == [
        (True, 0, 1.0, 0),
        (True, 1, 0.9, 1),  # kept, though patience goes on
        (False, 1, 0.9, 2),
        (False, 1, 0.9, 3),
        (False, 1, 0.9, 4),
        (True, 5, 0.8, 5),
        (True, 6, 3.0, 0),
    ]


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_a_loss_that_is_not_a_number_never_wins_a_tie(higher_is_better: bool):
    state = TrainState()
    assert state.record(0.5, higher_is_better, loss=math.nan)  # the first of all
    assert not state.record(0.5, higher_is_better, loss=math.nan)
    assert state.record(0.5, higher_is_better, loss=5.0)
    assert not state.record(0.5, higher_is_better, loss=math.nan)
    assert state.best_loss == 5.0


@given(
    values=st.lists(
        st.tuples(st.sampled_from([0.2, 0.5, math.nan]), st.sampled_from([0.1, 0.7, 2.0])),
        min_size=1,
        max_size=12,
    ),
    higher_is_better=st.booleans(),
)
def test_the_best_is_the_first_of_the_best(
    values: list[tuple[float, float]], higher_is_better: bool
):
    state = TrainState()
    for step, (value, loss) in enumerate(values):
        state.step = step
        assert state.record(value, higher_is_better, loss) == (
            state.best_step == step and state.best_metric == value
        )
    sign = -1 if higher_is_better else 1
    ranks = [(sign * v, loss, i) for i, (v, loss) in enumerate(values) if not math.isnan(v)]
    if ranks:
        assert state.best_step == min(ranks)[2]
        first = min((rank, i) for rank, _, i in ranks)[1]
        assert state.evaluations_since_best == len(values) - 1 - first
    else:
        assert state.best_metric is None and state.evaluations_since_best == len(values)


def test_plateau_lowers_the_rate(data_file: Path, tmp_path: Path):
    loop, plan, _ = make(
        data_file,
        tmp_path,
        **{
            "train.learning_rate": 1e-12,
            "optim.schedule": "plateau",
            "train.epochs": 8,
            "optim.plateau_patience": 1,
            "optim.plateau_factor": 0.25,
            "train.log_every": 1,
            "optim.warmup_fraction": 0.0,
            "eval.patience": 0,
        },
    )
    entries = [e for e in run(loop) if e.get("split") == "train"]
    n = plan.steps_per_epoch
    rates = [entries[epoch * n]["learning_rate"] for epoch in range(8)]
    assert rates == pytest.approx([1e-12 * 0.25**k for k in (0, 0, 0, 1, 1, 2, 2, 3)], rel=1e-6)


def poison(loop: Loop, steps: set[int]) -> None:
    """Makes the loss of whole steps NaN: one micro-batch each."""
    poisoned = Poisoned(loop.parts.task, {step + 1 for step in steps}, float("nan"))
    loop.parts = dataclasses.replace(loop.parts, task=poisoned)  # pyright: ignore


def test_skipped_steps_are_counted_and_logged_with_their_lines(data_file: Path, tmp_path: Path):
    loop, plan, recorder = make(data_file, tmp_path, **{"train.log_every": 1, "train.epochs": 1})
    poison(loop, {1, 3})
    entries = run(loop)
    assert loop.state.num_skipped == 2 and loop.state.skipped_in_a_row == 0
    skipped = [e for e in entries if e.get("skipped")]
    assert [e["step"] for e in skipped] == [2, 4]
    batches = plan_epoch(
        loop.train.in_epoch(0).lengths, seed=0, epoch=0, num_batches=plan.steps_per_epoch
    )
    for entry, batch in zip(skipped, (batches[1], batches[3]), strict=True):
        rows = sorted(loop.train.rows[batch].tolist())
        lines = loop.train.corpus.lines[rows].tolist()
        assert entry["lines"] == {str(data_file): lines}
    assert len(recorder.warnings) >= 2 and str(data_file) in recorder.warnings[-1]
    # A line over a skipped step alone has no loss, rather than a perfect one.
    by_step = {e["step"]: e for e in entries if e.get("split") == "train"}
    assert by_step[2]["loss"] is None and by_step[3]["loss"] > 0
    assert math.isnan(recorder.steps[1].loss)
    result = finish_run(loop, plan)
    assert result["training"]["num_skipped"] == 2


class Moving(LabelledExamples):
    """Examples that have other numbers in an epoch, and are more of them, as windows may be."""

    def in_epoch(self, epoch: int) -> LabelledExamples:
        rows, targets = np.tile(self.rows[::-1], 2), np.tile(self.targets[::-1], 2)
        weights = np.ones(len(rows))
        return LabelledExamples(self.corpus, rows, self.store, targets=targets, weights=weights)


def test_the_lines_of_a_skipped_step_are_those_of_its_epochs_examples(
    data_file: Path, tmp_path: Path
):
    loop, plan, _ = make(data_file, tmp_path, **{"train.epochs": 1, "data.augment": "none"})
    train = loop.train
    assert isinstance(train, LabelledExamples)
    loop.train = moving = Moving(
        train.corpus, train.rows, train.store, targets=train.targets, weights=train.weights
    )
    poison(loop, {2})
    (skipped,) = [e for e in run(loop) if e.get("skipped")]
    examples = moving.in_epoch(0)
    batches = plan_epoch(examples.lengths, seed=0, epoch=0, num_batches=plan.steps_per_epoch)
    assert batches[2].max() >= len(train)  # a number that only the epoch's examples know
    assert skipped["lines"] == examples.lines(batches[2].tolist())


class Shrinking(LabelledExamples):
    """Examples that are fewer in an epoch, as windows are where augmentation deletes words."""

    def in_epoch(self, epoch: int) -> LabelledExamples:
        few = np.arange(0, len(self), 3)
        return LabelledExamples(
            self.corpus,
            self.rows[few],
            self.store,
            targets=self.targets[few],
            weights=self.weights[few],
        )


def test_an_epoch_may_have_fewer_examples_than_the_run_has_steps_for_it(
    data_file: Path, tmp_path: Path
):
    loop, plan, _ = make(
        data_file, tmp_path, **{"train.tokens_per_step": 1, "train.epochs": 2, "train.log_every": 1}
    )
    train = loop.train
    assert isinstance(train, LabelledExamples) and plan.steps_per_epoch == len(train)
    loop.train = Shrinking(
        train.corpus, train.rows, train.store, targets=train.targets, weights=train.weights
    )
    trained = [e for e in run(loop) if e.get("split") == "train"]
    assert len(trained) == plan.total_steps and loop.state.num_skipped == 0
    tokens = np.diff([0, *(entry["num_tokens"] for entry in trained)])
    assert tokens.min() > 0  # no step without examples


def test_several_skipped_steps_in_a_row_end_the_run_naming_lines(data_file: Path, tmp_path: Path):
    loop, _, _ = make(data_file, tmp_path, **{"train.max_skipped_steps": 3, **STILL})
    poison(loop, {2, 4, 5, 7, 8, 9})
    with pytest.raises(DivergenceError, match=r"3 steps in a row.*train\.csv lines \d+") as caught:
        run(loop)
    assert caught.value.exit_code == 6
    assert loop.state.step == 10 and loop.state.num_skipped == 6
    lines = [int(n) for n in str(caught.value).split("lines ")[1].split(" ...")[0].split(", ")]
    lengths = loop.train.lengths
    per_epoch = steps_per_epoch(lengths, 400)
    epoch, place = divmod(9, per_epoch)
    batch = plan_epoch(lengths, seed=0, epoch=epoch, num_batches=per_epoch)[place]
    expected = sorted(int(loop.train.corpus.lines[row]) for row in loop.train.rows[batch])
    assert lines == expected[: len(lines)] and lines


def test_the_log_goes_on_where_the_checkpoint_was(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.write({"step": 1, "loss": float("nan")})
    length = log.length()
    log.write({"step": 2})
    log.close()
    log = MetricsLog(path, length)
    assert log.length() == length
    log.write({"step": 3, "é": math.inf})
    log.close()
    assert read_log(tmp_path) == [{"step": 1, "loss": None}, {"step": 3, "é": None}]
    path.unlink()  # a person removed it: no hole of zeros in the new one
    log = MetricsLog(path, length)
    log.write({"step": 4})
    log.close()
    assert read_log(tmp_path) == [{"step": 4}]


@pytest.mark.parametrize(
    "settings",
    [
        {"optim.momentum": 0.5},
        {"model.hidden_size": 30, "model.num_heads": 4},
        {"optim.schedule": "constant", "optim.min_factor": 0.5},
        {"eval.patience": 3, "data.validation_fraction": 0.0},
        {"tokenizer.path": "/no/such/tokenizer.json"},
        {"data.label_column": "nothing"},
    ],
)
def test_settings_that_do_not_fit_leave_no_folder(data_file: Path, tmp_path: Path, settings: dict):
    config = build_config(overrides={"data.train": str(data_file), **TINY, **settings})
    with pytest.raises(HastenError) as caught:
        start_run(config, tmp_path / "run", Recorder())
    assert isinstance(caught.value, HastenError) and len(str(caught.value).splitlines()) <= 2
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(HastenError):  # nor is there a plan to show
        plan_only(config, tmp_path / "run", Recorder())


def test_an_existing_folder_is_never_replaced(
    data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = build_config(overrides={"data.train": str(data_file), **TINY, "train.epochs": 1})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious").touch()
    with pytest.raises(UsageError, match=r"exists already.*--output"):
        start_run(config, tmp_path / "run", Recorder())
    # Created by another process between the check and the first write.
    from hasten.training import session

    monkeypatch.setattr(session, "choose_folder", lambda output, train: tmp_path / "run")
    with pytest.raises(HastenError, match="run"):
        start_run(config, tmp_path / "run", Recorder())
    assert [p.name for p in tmp_path.rglob("*")] == ["run", "precious"]


def test_training_leaves_the_callers_random_state_and_threads(data_file: Path, tmp_path: Path):
    config = build_config(overrides={"data.train": str(data_file), **TINY, "train.epochs": 1})
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    threads = torch.get_num_threads()
    start_run(config, tmp_path / "run", Recorder())
    assert torch.equal(torch.rand(3), expected) and torch.get_num_threads() == threads
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_a_run_without_validation_rows_keeps_its_last_weights(data_file: Path, tmp_path: Path):
    loop, plan, recorder = make(data_file, tmp_path, **{"data.validation_fraction": 0.0})
    run(loop)
    last = {n: t.clone() for n, t in loop.parts.model.state_dict().items()}
    result = finish_run(loop, plan)
    assert recorder.evaluations == [] and "validation" not in result
    assert result["judged_on"] == "train"
    assert all(torch.equal(last[n], t) for n, t in loop.parts.model.state_dict().items())


def test_warnings_name_what_a_person_should_look_at(tmp_path: Path):
    rows = [(f"text number {i} about {'ab'[i % 2]}", "ab"[i % 2]) for i in range(60)]
    train = write_rows(
        tmp_path / "t.csv", [*rows, rows[0], ("rare one", "c"), ("", "a")], ("text", "label")
    )
    test = write_rows(
        tmp_path / "v.csv", [rows[1], ("new", "a"), ("newer", "unheard of")], ("text", "label")
    )
    recorder = Recorder()
    overrides = {
        "data.train": str(train),
        "data.test": str(test),
        **TINY,
        "tokenizer.max_length": 3,
    }
    plan = plan_run(build_config(overrides=overrides), recorder)
    text = "\n".join(recorder.warnings)
    for wanted in (
        "1 rejected",
        "line 64",
        "repeat an earlier row's text: 1",
        "fewer than 10 examples: 1, namely c",
        "1 rows have the same text",
        "unheard of",
        "longer than 3 tokens",
    ):
        assert wanted in text, wanted
    assert plan.data.splits["test"].targets.tolist()[-1] == -1


MODEL_SETTINGS: dict[str, Any] = {
    "num_layers": 3,
    "hidden_size": 48,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "feed_forward_size": 50,
    "activation": "swiglu",
    "norm": "layernorm",
    "norm_placement": "post",
    "positions": "learned",
    "sliding_window": 5,
    "logit_softcap": 30.0,
    "tie_embeddings": False,
    "qk_norm": True,
    "bias": True,
    "dropout": 0.11,
    "attention_dropout": 0.12,
    "token_dropout": 0.13,
    "head_dropout": 0.14,
    "stochastic_depth": 0.15,
    "initializer_std": 0.031,
    "zero_init_residual": False,
    "pooling": "mean",
}
ELSEWHERE = {
    "text-classification": {"num_decoder_layers", "logit_softcap"},
    "translation": {"pooling"},
}


@pytest.mark.parametrize("task", ELSEWHERE)
def test_every_model_setting_reaches_the_model(task: str, data_file: Path, tmp_path: Path):
    assert {*MODEL_SETTINGS, "pretrained", "portable"} == ModelConfig.model_fields.keys()
    default = ModelConfig()
    assert not [name for name in MODEL_SETTINGS if MODEL_SETTINGS[name] == getattr(default, name)]
    settings = {n: v for n, v in MODEL_SETTINGS.items() if n not in ELSEWHERE[task]}
    columns = {"data.source": "text", "data.target": "label"} if task == "translation" else {}
    others = {key: value for key, value in TINY.items() if not key.startswith("model.")}
    overrides = {
        "data.train": str(data_file),
        "task": task,
        "tokenizer.max_length": 77,
        **others,
        **columns,
        **{f"model.{name}": value for name, value in settings.items()},
    }
    plan = plan_run(build_config(overrides=overrides), Recorder())
    found = build_model(plan, Path("none"), Recorder()).config
    assert {name: getattr(found, name) for name in settings} == settings
    assert found.architecture == plan.data.task.architecture
    assert found.vocab_size == plan.data.task.tokenizers[-1].get_vocab_size()
    assert found.max_positions >= 77
    if task == "text-classification":
        assert (found.max_positions, found.num_labels, found.head) == (77, 3, "classification")


@pytest.mark.parametrize(
    ("task", "name"), [(task, name) for task, names in ELSEWHERE.items() for name in sorted(names)]
)
def test_a_setting_without_effect_is_refused(task: str, name: str, data_file: Path, tmp_path: Path):
    columns = {"data.source": "text", "data.target": "label"} if task == "translation" else {}
    overrides = {
        "data.train": str(data_file),
        "task": task,
        **{key: value for key, value in TINY.items() if key != "model.pooling"},
        **columns,
        f"model.{name}": MODEL_SETTINGS[name],
    }
    with pytest.raises(UsageError, match=rf"model\.{name} has no effect .*leave it out"):
        plan_only(build_config(overrides=overrides), tmp_path / "run", Recorder())


def test_a_plan_holds_no_auto(data_file: Path, tmp_path: Path):
    recorder = Recorder()
    plan = plan_run(build_config(overrides={"data.train": str(data_file)}), recorder)
    assert '"auto"' not in json.dumps(plan.config.model_dump())
    values = {choice.key: choice.value for choice in plan.choices}
    given = build_config(overrides={"data.train": str(data_file)})
    assert sorted(values) == sorted(differences(given, plan.config))
    assert replace_values(given, values) == plan.config
    # The plan of a plan is itself: the saved configuration runs again as it ran.
    again = plan_run(plan.config, recorder)
    assert again.config == plan.config and again.total_steps == plan.total_steps


def test_every_choice_has_a_reason(data_file: Path):
    plan = plan_run(build_config(overrides={"data.train": str(data_file)}), Recorder())
    assert [choice.key for choice in plan.choices if not choice.reason] == []
