"""What a run becomes that is stopped and resumed, or loaded by a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import hasten
from builders import Recorder

TIMING = ("seconds", "tokens_per_second", "train_seconds")


class Stopped(BaseException):
    """Ends a run at once, as a kill does: nothing is saved on the way."""


class StopAt(Recorder):
    """Stops a run at the end of a step, before that step's checkpoint."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self._step = step

    def step(self, info: Any) -> None:
        super().step(info)
        if info.step == self._step:
            raise Stopped


def assert_resumes_exactly(folder: Path, settings: dict[str, Any]) -> None:
    """Trains to the end; then again, stopped twice and resumed; weights and metrics are equal.

    Every step has its checkpoint, which is there two steps later at the latest. The first stop
    falls into the first epoch, the second after it.
    """
    settings = {**settings, "train.log_every": 1, "train.checkpoint_minutes": 1e-9}
    whole = hasten.train(output=folder / "whole", settings=settings)
    per_epoch = round(whole.result["training"]["steps"] / settings["train.epochs"])
    assert per_epoch >= 3
    stopped = folder / "stopped"
    arguments: dict[str, Any] = {"output": stopped, "settings": settings}
    for step in (3, per_epoch + 2):
        try:
            hasten.train(**arguments, observer=StopAt(step))
        except Stopped:
            pass
        else:
            raise AssertionError("it came to its end")
        assert (stopped / "checkpoints" / f"step-{step - 2:08}").is_dir()
        assert not (stopped / "checkpoints" / f"step-{step:08}").exists()
        assert not (stopped / "model").exists()
        torch.manual_seed(step)  # what the process drew in the meantime is of no account
        arguments = {"resume": stopped}
    resumed = hasten.train(resume=stopped)
    for name in ("model.safetensors", "config.json", "hasten.json", "tokenizer.json"):
        first, second = ((run / "model" / name).read_bytes() for run in (whole.folder, stopped))
        assert first == second, name
    assert _metrics(whole.folder) == _metrics(stopped)
    assert _without_timing(whole.result) == _without_timing(resumed.result)


def predict_in_new_process(run: Path, *arguments: str) -> list[dict[str, Any]]:
    """Returns the predictions of `hasten predict RUN ARGUMENTS --json`."""
    command = [sys.executable, "-m", "hasten", "predict", str(run.absolute()), *arguments]
    ended = subprocess.run(
        [*command, "--json"], capture_output=True, text=True, check=False, cwd=os.sep
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    return json.loads(ended.stdout)["predictions"]


def _metrics(run: Path) -> list[dict[str, Any]]:
    lines: Sequence[str] = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [_without_timing(json.loads(line)) for line in lines]


def _without_timing(values: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _without_timing(value) if isinstance(value, dict) else value
        for name, value in values.items()
        if name not in (*TIMING, "run")
    }
