"""Whatever kills a run, resuming it ends in the very same weights."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from interrupted_runs import (
    SETTINGS,
    finish,
    is_writing_checkpoint,
    kill,
    metrics,
    result,
    start,
    steps_saved,
    wait_for,
    weights,
)

import hasten
from builders import write_labelled
from hasten.core.errors import DamagedError, DataError, HastenError, MachineError, UsageError
from hasten.training.checkpoint import open_newest_checkpoint

VARIANTS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "adafactor-plateau": {
        "optim.optimizer": "adafactor",
        "optim.schedule": "plateau",
        "optim.plateau_patience": 1,
        "train.learning_rate": 0.03,
        "train.l1": 1e-5,
    },
    "nadam-stops-early": {
        "optim.optimizer": "nadam",
        "train.ema_decay": 0.0,
        "eval.patience": 3,
        "train.learning_rate": 0.03,
        "eval.metric": "macro_f1",
        "train.epochs": 12,
        "data.augment": "word_swap=0.2,word_dropout=0.05,bpe_dropout=0.1",
    },
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("data")
    return {
        "data": str(write_labelled(folder / "train.csv", 160, noise=0.1)),
        "test": str(write_labelled(folder / "test.csv", 40, seed=9)),
    }


@pytest.fixture(scope="module")
def references(data: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An uninterrupted run of each variant, that saves at evaluations only."""
    runs = {}
    for name, settings in VARIANTS.items():
        runs[name] = tmp_path_factory.mktemp("reference") / name
        settings = {**SETTINGS, **settings, "train.checkpoint_minutes": 60}
        finish(start(output=str(runs[name]), settings=settings, **data))
    return runs


def assert_same(run: Path, reference: Path) -> None:
    assert weights(run) == weights(reference)
    assert metrics(run) == metrics(reference)
    assert result(run) == result(reference)
    assert not [p for p in run.rglob("*") if ".partial-" in p.name]
    assert len(steps_saved(run)) <= 2


def test_a_run_repeats_itself(data: dict[str, str], references: dict[str, Path], tmp_path: Path):
    finish(start(output=str(tmp_path / "run"), settings=SETTINGS, **data))
    assert_same(tmp_path / "run", references["adamw"])
    finish(start(output=str(tmp_path / "other"), settings={**SETTINGS, "train.seed": 1}, **data))
    assert weights(tmp_path / "other") != weights(references["adamw"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "trial"), [(v, t) for v in VARIANTS for t in range(4 if v == "adamw" else 2)]
)
def test_killed_at_random_moments_again_and_again(
    variant: str, trial: int, data: dict[str, str], references: dict[str, Path], tmp_path: Path
):
    draw = random.Random(f"{variant} {trial}")
    run = tmp_path / "run"
    process = start(output=str(run), settings={**SETTINGS, **VARIANTS[variant]}, **data)
    num_kills = 0
    for _ in range(3):
        before = max(steps_saved(run), default=0)
        further = draw.randint(1, 10)
        came = wait_for(
            lambda wanted=before + further: (
                max(steps_saved(run), default=0) >= wanted or (run / "result.json").exists()
            ),
            process,
        )
        if came and draw.random() < 0.5:  # in the middle of writing one
            wait_for(
                lambda: is_writing_checkpoint(run) or (run / "result.json").exists(),
                process,
                every=0.0003,
            )
            time.sleep(draw.random() * 0.004)
        else:
            time.sleep(draw.random() * 0.05)
        num_kills += kill(process)
        process = start(resume=str(run))
    finish(process)
    assert num_kills >= 2
    assert_same(run, references[variant])


def test_killed_while_writing_a_checkpoint(
    data: dict[str, str], references: dict[str, Path], tmp_path: Path
):
    """Repeats until a half-written checkpoint is really there after the kill."""
    run, draw = tmp_path / "run", random.Random(3)
    process = start(output=str(run), settings=SETTINGS, **data)
    torn = 0
    for _ in range(12):
        wait_for(lambda: bool(steps_saved(run)), process)
        wait_for(lambda: is_writing_checkpoint(run), process, every=0.0003)
        time.sleep(draw.random() * 0.003)
        kill(process)
        torn += is_writing_checkpoint(run)
        process = start(resume=str(run))
        if torn >= 2:
            break
    finish(process)
    assert torn >= 1, "no kill fell into a checkpoint"
    assert_same(run, references["adamw"])


def test_killed_before_the_first_checkpoint(
    data: dict[str, str], references: dict[str, Path], tmp_path: Path
):
    run = tmp_path / "run"
    process = start(output=str(run), settings={**SETTINGS, "train.checkpoint_minutes": 60}, **data)
    wait_for(lambda: (run / "metrics.jsonl").exists(), process)
    kill(process)
    assert steps_saved(run) == []
    with pytest.raises(UsageError):  # there is no model yet
        hasten.load(run)
    shutil.rmtree(run / "checkpoints", ignore_errors=True)  # nor need there be the empty folder
    finish(start(resume=str(run)))
    assert weights(run) == weights(references["adamw"])


def test_killed_while_saving_the_model(
    data: dict[str, str], references: dict[str, Path], tmp_path: Path
):
    run = tmp_path / "run"
    process = start(output=str(run), settings=SETTINGS, **data)
    wait_for(
        lambda: run.exists() and any(".partial-" in p.name for p in run.iterdir()),
        process,
        every=0.0003,
    )
    kill(process)
    finish(start(resume=str(run)))
    assert_same(run, references["adamw"])


def test_a_finished_run_resumes_to_itself(references: dict[str, Path], tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(references["adamw"], run)
    shutil.rmtree(run / "model")
    hasten.train(resume=run)
    assert_same(run, references["adamw"])


@pytest.fixture
def stopped(data: dict[str, str], tmp_path: Path) -> Path:
    """A run killed with two checkpoints."""
    run = tmp_path / "run"
    process = start(output=str(run), settings=SETTINGS, **data)
    wait_for(lambda: len(steps_saved(run)) == 2 and max(steps_saved(run)) > 5, process)
    kill(process)
    assert not (run / "result.json").exists()
    return run


def test_a_second_process_on_the_same_folder_is_refused(data: dict[str, str], tmp_path: Path):
    run = tmp_path / "run"
    settings = {**SETTINGS, "train.epochs": 400}
    process = start(output=str(run), settings=settings, **data)
    wait_for(lambda: bool(steps_saved(run)), process)
    before = metrics(run)[:1]
    with pytest.raises(MachineError, match=f"in use by process {process.pid}") as caught:
        hasten.train(resume=run)
    assert caught.value.exit_code == 8
    with pytest.raises(UsageError, match="exists already"):
        hasten.train(output=run, settings=SETTINGS, **data)
    assert process.exitcode is None and metrics(run)[:1] == before
    assert kill(process)


@pytest.mark.parametrize("which", ["data", "test"])
def test_a_changed_data_file_is_refused_by_name(which: str, tmp_path: Path):
    files = {
        "data": write_labelled(tmp_path / "train.csv", 60),
        "test": write_labelled(tmp_path / "test.csv", 20),
    }
    run = tmp_path / "run"
    arguments = {name: str(path) for name, path in files.items()}
    process = start(output=str(run), settings={**SETTINGS, "train.epochs": 200}, **arguments)
    wait_for(lambda: bool(steps_saved(run)), process)
    kill(process)
    content = files[which].read_bytes()
    files[which].write_bytes(content.replace(b"the", b"teh", 1))
    with pytest.raises(DataError, match=f"{files[which].name} has changed") as caught:
        hasten.train(resume=run)
    assert caught.value.exit_code == 3
    files[which].unlink()
    with pytest.raises(DataError, match=f"{files[which].name}: the run's data file is gone"):
        hasten.train(resume=run)
    files[which].write_bytes(content)  # put back, it goes on
    process = start(resume=str(run))
    step = max(steps_saved(run))
    wait_for(lambda: max(steps_saved(run), default=0) > step, process)
    kill(process)


def flip_bit(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place % len(content)] ^= 1 << (place % 8)
    path.write_bytes(content)


def test_a_damaged_checkpoint_is_refused_naming_the_file(
    stopped: Path, references: dict[str, Path], tmp_path: Path
):
    newest = sorted((stopped / "checkpoints").glob("step-*"))[-1]
    draw = random.Random(0)
    files = sorted(path.name for path in newest.iterdir())
    assert files == [
        "average.safetensors",
        "best.safetensors",
        "manifest.json",
        "model.safetensors",
        "optimizer.safetensors",
        "pace.safetensors",
    ]
    whole = tmp_path / "whole"
    shutil.copytree(newest, whole)

    def refused(name: str) -> None:
        with pytest.raises(DamagedError, match=rf"{newest.name}/{name}") as caught:
            open_newest_checkpoint(stopped / "checkpoints")
        assert caught.value.exit_code == 4
        assert f"remove {newest}" in str(caught.value)
        shutil.copyfile(whole / name, newest / name)

    for name in files:
        size = (newest / name).stat().st_size
        for place in [0, size - 1, *(draw.randrange(size) for _ in range(25))]:
            flip_bit(newest / name, place)
            refused(name)
        for length in (0, 1, size // 2, size - 1):
            (newest / name).write_bytes((whole / name).read_bytes()[:length])
            refused(name)
        with (newest / name).open("ab") as file:
            file.write(b" ")
        if name != "manifest.json":  # white space after JSON changes nothing
            refused(name)
        shutil.copyfile(whole / name, newest / name)
        (newest / name).unlink()
        refused(name)
    for content in ("[]", "{}", '{"format_version": 1}', "null", "3"):
        (newest / "manifest.json").write_text(content)
        refused("manifest.json")
    flip_bit(newest / "model.safetensors", 1000)
    with pytest.raises(DamagedError, match=r"model.safetensors"):
        hasten.train(resume=stopped)
    # What the message advises works, and loses nothing.
    shutil.rmtree(newest)
    hasten.train(resume=stopped)
    assert_same(stopped, references["adamw"])


def test_a_checkpoint_of_another_version_is_refused(stopped: Path, monkeypatch):
    from hasten.training import checkpoint

    version = checkpoint.FORMAT_VERSION
    monkeypatch.setattr(checkpoint, "FORMAT_VERSION", version + 1)
    message = f"format version {version}; this hasten reads {version + 1}"
    with pytest.raises(DamagedError, match=message):
        hasten.train(resume=stopped)


@pytest.mark.parametrize("name", ["config.yaml", "data.json", "tokenizer.json"])
def test_a_damaged_run_folder_is_refused(name: str, stopped: Path):
    (stopped / name).write_text("{")
    with pytest.raises(DamagedError) as caught:
        hasten.train(resume=stopped)
    assert str(stopped) in str(caught.value)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UsageError, match="not a run folder") as caught:
            hasten.train(resume=folder)
        assert caught.value.exit_code == 2
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UsageError, match="give it alone"):
        hasten.train("a.csv", resume=tmp_path)


def test_a_disk_that_fills_up_leaves_the_last_checkpoint(
    stopped: Path, references: dict[str, Path], monkeypatch: pytest.MonkeyPatch
):
    import errno

    from hasten.training import checkpoint

    original, calls = checkpoint._write_file, []

    def full(file: Path, parts: Any) -> None:
        calls.append(file)
        if len(calls) > 7:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
        original(file, parts)

    monkeypatch.setattr(checkpoint, "_write_file", full)
    with pytest.raises(MachineError, match=r"No space left.*free some space and resume") as caught:
        hasten.train(resume=stopped)
    assert caught.value.exit_code == 8
    assert not is_writing_checkpoint(stopped)
    monkeypatch.undo()
    hasten.train(resume=stopped)
    assert weights(stopped) == weights(references["adamw"])


def test_what_the_disk_did_not_keep_is_noticed_when_written(
    stopped: Path, monkeypatch: pytest.MonkeyPatch
):
    from hasten.training import checkpoint

    original = checkpoint._write_file

    def lossy(file: Path, parts: Any) -> None:
        original(file, parts)
        flip_bit(file, file.stat().st_size - 3)

    before = steps_saved(stopped)
    monkeypatch.setattr(checkpoint, "_write_file", lossy)
    with pytest.raises(MachineError, match="did not keep"):
        hasten.train(resume=stopped)
    assert steps_saved(stopped) == before


CHILD = """
import json, sys
import torch
torch.set_num_threads(1)
import hasten
from hasten.training.loop import Interrupted
try:
    hasten.train(**json.loads(sys.argv[1]))
except Interrupted as interrupted:
    sys.exit(100 + interrupted.signal_number)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_before_it_ends_the_run(
    number: signal.Signals, data: dict[str, str], references: dict[str, Path], tmp_path: Path
):
    run = tmp_path / "run"
    # Checkpoints only at evaluations: the one that is looked for is the signal's.
    settings = {**SETTINGS, "train.checkpoint_minutes": 60, "eval.per_epoch": 1}
    arguments = json.dumps({"output": str(run), "settings": settings, **data})
    process = subprocess.Popen([sys.executable, "-c", CHILD, arguments], stderr=subprocess.PIPE)
    end = time.monotonic() + 90
    while not (run / "metrics.jsonl").exists() or not metrics(run):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.001)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 100 + number, errors.decode()
    (*_, saved) = steps_saved(run)
    # The first entry is there before its step has looked for signals.
    assert saved >= metrics(run)[0]["step"] and not (run / "model").exists()
    reference = tmp_path / "reference"
    finish(start(output=str(reference), settings=settings, **data))
    finish(start(resume=str(run)))
    assert_same(run, reference)


@pytest.mark.slow
def test_the_command_line_goes_on_after_kill_and_after_control_c(
    data: dict[str, str], references: dict[str, Path], tmp_path: Path
):
    run = tmp_path / "run"
    flags = [part for key, value in SETTINGS.items() for part in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "hasten", "train"]
    process = subprocess.Popen(
        [*command, data["data"], "--test", data["test"], "--output", str(run), *flags],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    end = time.monotonic() + 90
    while not steps_saved(run):
        if process.poll() is not None:
            raise AssertionError(process.communicate()[1].decode())
        assert time.monotonic() < end
        time.sleep(0.001)
    process.kill()
    process.communicate()
    step = max(steps_saved(run))
    process = subprocess.Popen(
        [*command, "--resume", str(run)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    while max(steps_saved(run)) < step + 2:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors.decode()
    assert f"--resume {run}" in errors.decode()
    done = subprocess.run([*command, "--resume", str(run), "--json"], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    printed = json.loads(done.stdout)
    assert printed["run"] == str(run) and 0 <= printed["test"]["accuracy"] <= 1
    assert_same(run, references["adamw"])


def test_errors_are_for_people():
    for error in (DamagedError, DataError, MachineError, UsageError):
        assert issubclass(error, HastenError) and issubclass(error, ValueError)
