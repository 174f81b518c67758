"""Mixed precision: the loss stays, overflow costs one step and no weight, auto is measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from builders import STILL, TINY, Recorder, write_labelled, write_rows
from hasten.config.load import build_config
from hasten.core.errors import MachineError, UsageError
from hasten.model.token_loss import linear_cross_entropy_sum
from hasten.model.transformer import Transformer
from hasten.plan import probe
from hasten.training import build as build_module
from hasten.training import loop as loop_module
from hasten.training.build import build_loop, plan_run
from hasten.training.loop import Loop
from hasten.training.observe import MetricsLog
from hasten.training.precision import convert_matrices, first_loss_scale, next_loss_scale
from hasten.training.step import run_step

TASKS = ("text-classification", "text-generation", "translation")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("data")
    pairs = [(f"the {i} red birds fly", f"die {i} roten vögel fliegen") for i in range(60)]
    return {
        "text-classification": write_labelled(folder / "labelled.csv", 120),
        "text-generation": write_rows(folder / "texts.csv", [pair[:1] for pair in pairs], ["text"]),
        "translation": write_rows(folder / "pairs.csv", pairs, ["source", "target"]),
    }


def make(file: Path, folder: Path, **settings: Any) -> tuple[Loop, Recorder]:
    overrides = {
        "data.train": str(file),
        "train.tokens_per_step": 300,
        "train.epochs": 2,
        "train.learning_rate": 1e-3,
        **STILL,
        **{key: value for key, value in TINY.items() if key != "model.pooling"},
        **settings,
    }
    recorder = Recorder()
    plan = plan_run(build_config(overrides=overrides), recorder)
    return build_loop(plan, folder, recorder), recorder


def train(file: Path, folder: Path, **settings: Any) -> tuple[Loop, list[dict[str, Any]]]:
    folder.mkdir()
    loop, _ = make(file, folder, **settings)
    log = MetricsLog(folder / "metrics.jsonl")
    loop.run(log)
    log.close()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return loop, [json.loads(line) for line in lines]


@pytest.mark.parametrize("task", TASKS)
def test_the_final_loss_is_that_of_float32(task: str, files: dict[str, Path], tmp_path: Path):
    losses, weights = {}, {}
    for precision in ("float32", "bf16", "fp16"):
        settings = {"task": task, "train.precision": precision, "eval.decode_examples": 0}
        settings |= {"eval.metric": "loss"}
        loop, entries = train(files[task], tmp_path / precision, **settings)
        evaluations = [entry for entry in entries if entry.get("split") == "validation"]
        losses[precision] = evaluations[-1]["loss"]
        weights[precision] = torch.cat([p.flatten() for p in loop.parts.model.parameters()])
        assert weights[precision].dtype == torch.float32
        states = loop.parts.optimizer.state.values()
        assert all(t.dtype == torch.float32 for state in states for t in state.values())
        assert evaluations[-1]["loss"] < evaluations[0]["loss"]
    for precision in ("bf16", "fp16"):
        assert losses[precision] == pytest.approx(losses["float32"], rel=0.01)
        # It did compute in 16 bits, and those have other mantissas.
        assert not torch.equal(weights[precision], weights["float32"])
    assert not torch.equal(weights["bf16"], weights["fp16"])


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> list[Transformer]:
    """Rounds to 8 bits on a device without such units; returns the models that are converted."""
    pytest.importorskip("torchao")
    converted: list[Transformer] = []

    def convert(model: Transformer, precision: str) -> None:
        convert_matrices(model, precision, emulates=True)
        converted.append(model)

    monkeypatch.setattr(build_module, "convert_matrices", convert)
    monkeypatch.setattr(probe, "_check_fp8", lambda device: None)
    return converted


@pytest.mark.parametrize("task", TASKS)
def test_the_final_loss_of_8_bits_is_that_of_float32(
    task: str, files: dict[str, Path], tmp_path: Path, emulated: list[Transformer]
):
    losses, names = {}, {}
    for precision in ("float32", "fp8"):
        settings = {"task": task, "train.precision": precision, "eval.decode_examples": 0}
        settings |= {"eval.metric": "loss", "model.hidden_size": 32}
        _, entries = train(files[task], tmp_path / precision, **settings)
        losses[precision] = [e["loss"] for e in entries if e.get("split") == "validation"][-1]
        names[precision] = {n: (t.shape, t.dtype) for n, t in emulated[-1].state_dict().items()}
    kinds = [type(module).__name__ for module in emulated[-1].modules()]
    assert kinds.count("Float8Linear") >= 6 * len(emulated[-1].blocks)
    assert kinds.count("Linear") == (task == "text-classification") * 2  # pooling, classifier
    assert emulated[-1].row_multiple == 16
    assert names["fp8"] == names["float32"]  # a checkpoint of one is one of the other
    assert losses["fp8"] == pytest.approx(losses["float32"], rel=0.01)
    assert losses["fp8"] != losses["float32"]


def test_8_bits_are_refused_where_nothing_multiplies_them():
    with pytest.raises(UsageError, match=r"fp8 needs a GPU.*bf16 or auto"):
        probe.choose_precision("fp8", torch.device("cpu"), 64)


def test_8_bits_without_torchao_say_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    model = Transformer(50, num_layers=1, hidden_size=16, num_heads=2)
    with pytest.raises(MachineError, match=r"hasten\[gpu\]"):
        convert_matrices(model, "fp8")
    assert model.row_multiple == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("task", TASKS)
def test_the_final_loss_on_a_gpu_is_that_of_float32(
    task: str, files: dict[str, Path], tmp_path: Path
):
    losses = {}
    for precision in ("float32", "bf16", "fp16", "fp8"):
        settings = {"task": task, "train.precision": precision, "eval.decode_examples": 0}
        settings |= {"eval.metric": "loss", "model.hidden_size": 64, "train.device": "cuda"}
        _, entries = train(files[task], tmp_path / precision, **settings)
        losses[precision] = [e["loss"] for e in entries if e.get("split") == "validation"][-1]
    for precision in ("bf16", "fp16", "fp8"):
        assert losses[precision] == pytest.approx(losses["float32"], rel=0.01)


@given(
    scale=st.floats(1, 2**30),
    good=st.integers(0, 1999),
    finite=st.lists(st.booleans(), min_size=1, max_size=40),
)
def test_the_loss_scale_halves_on_overflow_and_doubles_after_long_peace(
    scale: float, good: int, finite: list[bool]
):
    for is_finite in finite:
        before, steps = scale, good
        scale, good = next_loss_scale(before, steps, is_finite)
        assert scale >= 1
        if not is_finite:
            assert good == 0 and scale == max(1.0, before / 2)
        elif steps == 1999:
            assert good == 0 and scale == 2 * before
        else:
            assert good == steps + 1 and scale == before


def test_the_loss_scale_does_not_change_the_step(files: dict[str, Path], tmp_path: Path):
    found = []
    for scale in (1.0, 2.0**10):
        loop, _ = make(files["text-classification"], tmp_path, **{"train.precision": "float32"})
        for step in range(3):
            result = run_step(loop.parts, loop.train, np.arange(20), step, loss_scale=scale)
        found.append((result, torch.cat([p.flatten() for p in loop.parts.model.parameters()])))
    # A power of two is taken out of a gradient as it was put in.
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


def test_overflow_skips_steps_lowers_the_scale_and_is_logged(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(loop_module, "first_loss_scale", lambda precision: 2.0**40)
    settings = {"train.precision": "fp16", "train.log_every": 1, "train.epochs": 8}
    loop, entries = train(files["text-classification"], tmp_path / "run", **settings)
    skipped = [entry for entry in entries if entry.get("skipped")]
    assert len(skipped) == loop.state.num_skipped > 5  # more than max_skipped_steps allows of NaN
    assert [entry["loss_scale"] for entry in skipped[:3]] == [2.0**40, 2.0**39, 2.0**38]
    trained = [entry for entry in entries if entry.get("split") == "train"]
    assert trained[-1]["loss_scale"] == loop.state.loss_scale < 2.0**40
    resumed, _ = make(files["text-classification"], tmp_path / "run", **settings)
    resumed.resume()
    assert resumed.state.loss_scale == loop.state.loss_scale
    assert resumed.state.loss_scale_steps == loop.state.loss_scale_steps > 0


def test_only_float16_scales_its_loss():
    scaled = {name for name in probe.PRECISIONS if first_loss_scale(name) > 1}
    assert scaled == {"fp16"}


@pytest.mark.parametrize(
    ("wanted", "factor", "precision", "warns"),
    [
        ("auto", 0.01, "float32", False),
        ("auto", 1.1, "float32", False),
        ("auto", 3.0, "bf16", False),
        ("bf16", 0.01, "bf16", True),
        ("fp16", 0.5, "fp16", True),
        ("bf16", 3.0, "bf16", False),
        ("float32", 3.0, "float32", False),
    ],
)
def test_what_is_measured_decides_and_what_is_asked_for_stays(
    wanted: str, factor: float, precision: str, warns: bool, monkeypatch: pytest.MonkeyPatch
):
    rates = {torch.float32: 1e11, torch.bfloat16: 1e11 * factor, torch.float16: 1e11 * factor}
    monkeypatch.setattr(probe, "matrix_rate", lambda dtype, device, size: rates[dtype])
    monkeypatch.setattr(
        probe.FeedForwardTrial, "rate", lambda trial, name: rates[probe.PRECISIONS[name]]
    )
    chosen, reason, warning = probe.choose_precision(wanted, torch.device("cpu"), 64)
    assert chosen == precision and (warning is not None) == warns
    if wanted == "auto":
        assert f"{factor:g}" in reason
    if warning is not None:
        assert f"{1 / factor:.1f} times as long" in warning and wanted in warning


def test_products_alone_do_not_choose_16_bits(monkeypatch: pytest.MonkeyPatch):
    rates = {torch.float32: 1e11, torch.bfloat16: 3e11}
    monkeypatch.setattr(probe, "matrix_rate", lambda dtype, device, size: rates[dtype])
    monkeypatch.setattr(probe.FeedForwardTrial, "rate", lambda trial, name: 1e11)
    chosen, reason, _ = probe.choose_precision("auto", torch.device("cpu"), 64)
    assert chosen == "float32" and "computes 1.0 times as fast" in reason


def test_16_bits_that_change_the_gradients_are_not_chosen(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(probe, "_factor", lambda precision, rate_of: 3.0)
    monkeypatch.setattr(probe.FeedForwardTrial, "change", lambda trial, name: 0.5)
    chosen, reason, _ = probe.choose_precision("auto", torch.device("cpu"), 64)
    assert chosen == "float32" and "bf16 changes what a feed-forward computes by 50.0%" in reason


@pytest.mark.parametrize("size", [16, 256])
def test_a_feed_forward_changes_by_the_rounding_of_the_precision(size: int):
    trial = probe.FeedForwardTrial(torch.device("cpu"), size)
    assert trial.change("float32") == 0
    assert 1e-4 < trial.change("bf16") < probe._MOST_CHANGE


def test_a_hopeless_precision_is_not_measured_again():
    asked: list[str] = []

    def rate(precision: str) -> float:
        asked.append(precision)
        return {"float32": 1e11, "bf16": 1e9, "fp16": 9e10}[precision]

    assert probe._factor("bf16", rate) == 0.01
    assert asked == ["float32", "bf16"]
    assert probe._factor("fp16", rate) == 0.9
    assert asked[2:] == ["float32", "fp16"] * 3


def test_a_slow_precision_is_said_before_the_first_step(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    rates = {torch.float32: 1e11, torch.bfloat16: 1e9}
    monkeypatch.setattr(probe, "matrix_rate", lambda dtype, device, size: rates[dtype])
    _, recorder = make(files["translation"], tmp_path, **{"train.precision": "bf16"})
    assert any("100.0 times as long as float32's" in text for text in recorder.warnings)


def test_a_rate_is_that_of_the_products():
    device = torch.device("cpu")
    rates = [probe.matrix_rate(torch.float32, device, size) for size in (32, 256)]
    rates += [probe.FeedForwardTrial(device, size).rate("float32") for size in (32, 256)]
    assert all(1e8 < rate < 1e15 for rate in rates)


def test_scores_of_tokens_narrow_and_losses_do_not():
    torch.manual_seed(0)
    hidden = torch.randn(40, 16, requires_grad=True)
    weight = torch.randn(60_000, 16, requires_grad=True)
    targets = torch.randint(60_000, (40,))
    exact = linear_cross_entropy_sum(hidden, weight, targets)
    narrow = linear_cross_entropy_sum(hidden.bfloat16(), weight.bfloat16(), targets)
    assert narrow.dtype == torch.float32
    assert narrow.item() == pytest.approx(exact.item(), rel=0.01)
