"""`hasten train --processes`: finishes, stops, goes on, and says what became of its processes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
from launched_runs import (
    EVERY_STEP,
    SECONDS_TO_NOTICE,
    SETTINGS,
    flags,
    has_begun,
    is_alive,
    launched,
    losses,
    steps_saved,
    train_in_processes,
)
from safetensors.torch import load_file

import hasten
from builders import write_labelled
from hasten.training.folder import lock_folder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc"),
]
TWO_BLOCKS = {
    **SETTINGS,
    "model.num_layers": 2,
    "train.epochs": 1,
    "optim.optimizer": "sgd",
    "train.learning_rate": 0.05,
}
HOST = socket.gethostname()
FILES = [
    "architecture.json",
    "checkpoints",
    "config.yaml",
    "data.json",
    "environment.json",
    "metrics.jsonl",
    "model",
    "plan.json",
    "rejected.jsonl",
    "result.json",
    "tokenizer.json",
]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_labelled(Path("tiny.csv"), 60, noise=0.1)


@pytest.fixture
def reference() -> Path:
    """The same run in one process, never disturbed."""
    return hasten.train("tiny.csv", output="reference", settings=SETTINGS).folder


def assert_same_losses(run: Path, reference: Path) -> None:
    """Losses of every step and evaluation are equal up to the rounding of float32."""
    for split in ("train", "validation"):
        found, wanted = losses(run, split), losses(reference, split)
        assert found.keys() == wanted.keys()
        assert found == pytest.approx(wanted, rel=1e-4)


def said(err: str) -> list[str]:
    """Returns the messages of a command that ended early, which are ours and said once."""
    lines = [line for line in err.splitlines() if line]
    own = [line for line in lines if line.startswith("hasten: ")]
    assert len(set(own)) == len(own), "it is said twice"
    assert not re.search(r"torch|Traceback|Warning", err), err
    return own


def assert_complete(run: Path) -> None:
    """The run is finished, and nothing half-written is left."""
    assert sorted(path.name for path in run.iterdir() if path.name != ".lock") == FILES
    assert not [path for path in run.rglob("*") if ".partial" in path.name]
    predictions = hasten.load(run).predict(["the old hammer", "a wren"])
    assert all(found["label"] in ("fruit", "tool", "bird") for found in predictions)


def test_two_processes_train_and_say_so_once(reference: Path):
    code, out, err = train_in_processes("tiny.csv", "-o", "run", "--processes", 2, *flags(SETTINGS))
    assert code == 0, err
    assert len(re.findall(r"^validation: accuracy ", out, re.MULTILINE)) == 1
    assert len(re.findall(r"^run folder: run$", out, re.MULTILINE)) == 1
    assert len(re.findall(r"^step 1/", err, re.MULTILINE)) == 1
    assert "Traceback" not in err and "Warning" not in err
    run = Path("run")
    assert_complete(run)
    assert_same_losses(run, reference)
    config = (run / "config.yaml").read_text()
    assert "processes: 2" in config and "layout: replicate=2" in config


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model of two blocks that one process has trained."""
    folder = tmp_path_factory.mktemp("exported")
    data = write_labelled(folder / "tiny.csv", 60, noise=0.1)
    return hasten.train(data, output=folder / "run", settings=TWO_BLOCKS).folder


@pytest.mark.parametrize("layout", ["tensor=2", "context=2", "pipeline=2"])
def test_processes_that_share_a_model_export_it_whole(layout: str, exported: Path):
    given = ("tiny.csv", "-o", "run", "--parallel", layout, *flags(TWO_BLOCKS))
    code, _, err = train_in_processes(*given)
    assert code == 0, err
    assert_same_losses(Path("run"), exported)
    wanted, found = exported / "model", Path("run/model")
    files = sorted(file.name for file in wanted.iterdir())
    assert sorted(file.name for file in found.iterdir()) == files
    weights = [name for name in files if name.endswith(".safetensors")]
    assert weights
    for name in weights:
        tensors = load_file(found / name)
        assert tensors.keys() == load_file(wanted / name).keys()
        for key, tensor in load_file(wanted / name).items():
            torch.testing.assert_close(tensors[key], tensor, rtol=1e-3, atol=1e-5, msg=key)


def test_a_run_goes_on_with_another_number_of_processes(reference: Path, cli):
    """Saved by four of them, it goes on with one, with four in another layout, and with two."""
    run = Path("a run")
    layout = "shard=2,tensor=2"
    given = ("tiny.csv", "-o", run, "--parallel", layout, *flags({**SETTINGS, **EVERY_STEP}))
    with launched(run, *given) as command:
        command.wait_for(lambda: bool(steps_saved(run)))
        command.process.terminate()
        code, out, err = command.end()
    assert (code, out) == (143, ""), err
    assert said(err)[-1:] == ["hasten: stopped; go on with: hasten train --resume 'a run'"]
    (*_, saved) = steps_saved(run)
    assert 0 < saved < max(losses(reference)) and not (run / "model").exists()
    copy = Path("copy")
    shutil.copytree(run, copy)

    ended = cli("train", "--resume", run, "--processes", 1)
    assert ended.code == 0 and f"resumed at step {saved} of " in ended.err
    assert_complete(run)
    assert_same_losses(run, reference)

    with launched(copy, "--resume", copy, "--processes", 4, "--parallel", "shard=4") as command:
        command.wait_for(lambda: max(steps_saved(copy)) > saved)
        os.killpg(command.process.pid, signal.SIGINT)  # as Ctrl-C in a terminal does
        code, out, err = command.end()
    assert (code, out) == (130, ""), err
    assert said(err)[-1:] == ["hasten: stopped; go on with: hasten train --resume copy"]
    code, out, err = train_in_processes("--resume", copy, "--parallel", "replicate=2", "--json")
    assert (code, err) == (0, "")
    assert len(out.splitlines()) == 1
    result = json.loads(out)
    assert result["run"] == str(copy) and result["validation"]["num_examples"] == 6
    assert_complete(copy)
    assert_same_losses(copy, reference)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--parallel shard=3 --processes 2", "shard=3 is a layout of 3 processes.* there are 2"),
        ("--parallel sharp=2", "no axis 'sharp'.* Did you mean 'shard'?"),
        ("--parallel shard=2,shard=2", "one whole number for each axis"),
        ("--parallel shard", "one whole number for each axis"),
        ("--processes 0", "parallel.processes: '0' .*at least 1"),
        ("--processes two", "parallel.processes: 'two'"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(
    arguments: str, message: str, cli, monkeypatch
):
    monkeypatch.setattr("hasten.training.launching.launch", lambda *_, **__: 1)
    ended = cli("train", "tiny.csv", "-o", "run", *arguments.split())
    assert (ended.code, ended.out) == (2, "")
    assert re.fullmatch(rf"hasten: .*{message}.*\n", ended.err), ended.err
    assert [path.name for path in Path().iterdir()] == ["tiny.csv"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_said_once():
    given = ("tiny.csv", "-o", "run", "--processes", 2, "--train.device", "cuda")
    code, out, err = train_in_processes(*given)
    assert (code, out) == (8, "")
    assert len(said(err)) == len(err.splitlines()) == 1 and "no CUDA device" in err, err
    assert [path.name for path in Path().iterdir()] == ["tiny.csv"]


def test_a_process_killed_in_preparing_ends_the_run(own_cache: Path):
    """The others wait for rank 0 then, and must not wait for ever."""
    given = ("tiny.csv", "-o", "run", "--processes", 2, *flags(SETTINGS))
    with launched(Path("run"), *given) as command:
        command.wait_for(lambda: any(own_cache.iterdir()) and len(command.ranks()) == 2)
        pid = command.strike("kill", 0)
        code, out, err = command.end(SECONDS_TO_NOTICE)
    assert (code, out) == (7, ""), err
    assert f"rank 0 (process {pid} on {HOST}) was killed by SIGKILL" in said(err)[-1]
    assert [path.name for path in Path().iterdir()] == ["tiny.csv"]


@pytest.mark.parametrize(("rank", "is_saved"), [(1, False), (0, True)])
def test_a_killed_process_ends_the_run_and_is_named(rank: int, is_saved: bool, reference, cli):
    run = Path("run")
    settings = {**SETTINGS, **(EVERY_STEP if is_saved else {"train.epochs": 40})}
    layout = "shard=2" if is_saved else "replicate=2"
    with launched(run, "tiny.csv", "-o", run, "--parallel", layout, *flags(settings)) as command:
        command.wait_for(lambda: bool(steps_saved(run)) if is_saved else has_begun(run))
        ranks = command.ranks()
        pid = command.strike("kill", rank)
        code, out, err = command.end(SECONDS_TO_NOTICE)
    assert (code, out) == (7, ""), err
    last = said(err)[-1]
    assert f"rank {rank} (process {pid} on {HOST}) was killed by SIGKILL" in last, err
    assert "hasten train --resume run" in last
    assert sorted(ranks) == [0, 1] and not any(map(is_alive, ranks.values()))
    if is_saved:
        assert cli("train", "--resume", run, "--processes", 1).code == 0
        assert_complete(run)
        assert_same_losses(run, reference)


def test_processes_end_with_their_launcher():
    run = Path("run")
    settings = {**SETTINGS, "train.epochs": 400}
    with launched(run, "tiny.csv", "-o", run, "--processes", 2, *flags(settings)) as command:
        command.wait_for(lambda: has_begun(run))
        ranks = command.ranks()
        command.process.kill()
        end = time.monotonic() + SECONDS_TO_NOTICE
        while any(map(is_alive, ranks.values())):
            assert time.monotonic() < end, "they train on"
            time.sleep(0.05)
        _, err = command.process.communicate()
    assert sorted(ranks) == [0, 1] and "has lost its launcher and stops" in err
    lock_folder(run).release()  # it is free again


def test_a_run_goes_on_by_itself_after_a_process_was_lost(reference: Path):
    run = Path("run")
    given = ("--processes", 2, "--max-restarts", 1, *flags({**SETTINGS, **EVERY_STEP}))
    with launched(run, "tiny.csv", "-o", run, *given) as command:
        command.wait_for(lambda: bool(steps_saved(run)))
        command.strike("kill", 1)
        code, out, err = command.end()
    assert code == 0, err
    assert len(re.findall(r"^run folder: run$", out, re.MULTILINE)) == 1
    assert len(re.findall(r"rank 1 .* was killed by SIGKILL.* started again", err)) == 1
    assert re.search(r"^resumed at step [1-9]\d* of ", err, re.MULTILINE)
    assert_complete(run)
    assert_same_losses(run, reference)


def test_processes_that_torchrun_starts_again_go_on(reference: Path):
    run = Path("run")
    starter = ["torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1"]
    starter += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    given = ("tiny.csv", "-o", run, *flags({**SETTINGS, **EVERY_STEP}))
    with launched(run, *given, starter=starter) as command:
        command.wait_for(lambda: bool(steps_saved(run)))
        command.strike("kill", 1)
        code, out, err = command.end()
    assert code == 0, err
    assert len(re.findall(r"^run folder: run$", out, re.MULTILINE)) == 1
    assert_complete(run)
    assert_same_losses(run, reference)
