"""A layout that nobody gave: chosen by the memory of real processes, said, saved, read back."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from launched_runs import SETTINGS, flags, losses

from builders import write_labelled
from hasten.config.load import replace_values
from hasten.config.schema import ParallelConfig, RunConfig
from hasten.parallel.launch import launch
from hasten.training.observe import Silent
from hasten.training.session import plan_only, resumed_config

pytestmark = pytest.mark.slow
CHOSEN = {
    **SETTINGS,
    "model.num_layers": 4,
    "train.epochs": 2,
    "train.ema_decay": 0.9,
    "optim.optimizer": "adamw",
}


def train(memory: str, *arguments: object) -> int:
    """Returns the exit code of two processes that find so much memory."""
    worker = str(Path(__file__).parent / "little_memory.py")
    return launch([sys.executable, worker, memory, "train", *map(str, arguments)], 2, num_threads=1)


def test_little_memory_is_shared_and_the_choice_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    write_labelled(Path("tiny.csv"), 60, noise=0.1)
    values = {**CHOSEN, "data.train": ("tiny.csv",), "parallel.processes": 2}
    plan = plan_only(replace_values(RunConfig(), values), None, Silent())
    whole = next(choice for choice in plan.choices if choice.key == "parallel.layout")
    assert whole.value == "replicate=2"
    need = re.match(r"a whole copy needs about ([\d.]+) MB of [\d.,]+ GB a process", whole.reason)
    assert need is not None, whole.reason

    # Just as much, of which a tenth is not planned with.
    memory = str(int(float(need[1]) * 1e6))
    assert train(memory, "tiny.csv", "-o", "run", *flags(CHOSEN)) == 0
    said = capfd.readouterr().err
    assert f"parallel.layout shard=2 (a whole copy would need about {need[1]} MB" in said
    saved = json.loads(Path("run/plan.json").read_text())
    choice = next(one for one in saved if one["key"] == "parallel.layout")
    assert choice["value"] == "shard=2"
    assert "all-reduce measured at" in choice["reason"]
    assert losses(Path("run"))

    Path("run/result.json").unlink()
    assert train("unasked", "--resume", "run", "--processes", 2) == 0
    assert "parallel.layout" not in capfd.readouterr().err
    kept = resumed_config(Path("run"), ParallelConfig(processes=2)).parallel
    assert (kept.processes, kept.layout) == (2, "shard=2")
    anew = resumed_config(Path("run"), ParallelConfig(processes=3)).parallel
    assert (anew.processes, anew.layout) == (3, "auto")
