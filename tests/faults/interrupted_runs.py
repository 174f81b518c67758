"""Runs in processes of their own, which tests kill at moments of their choosing.

A fork server that has imported everything starts a child in milliseconds; the children are real
processes, and SIGKILL is what it is anywhere.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
# torch._dynamo is what the first optimizer of a process imports, for seconds.
_CONTEXT.set_forkserver_preload(
    ["hasten.training.run", "torch._dynamo", "torch.distributed.checkpoint"]
)

TIMING = ("seconds", "train_seconds", "tokens_per_second")

SETTINGS: dict[str, Any] = {
    "data.augment": "bpe_dropout=0.1",
    "model.num_layers": 2,
    "model.hidden_size": 32,
    "model.num_heads": 2,
    "model.dropout": 0.2,
    "model.attention_dropout": 0.1,
    "model.token_dropout": 0.1,
    "model.stochastic_depth": 0.1,
    "model.head_dropout": 0.1,
    "train.num_threads": 1,
    "train.precision": "float32",
    "train.matrix_library": "default",
    "train.learning_rate": 2e-3,
    "optim.weight_decay": 0.01,
    "eval.patience": 0,
    "train.tokens_per_step": 300,
    "train.micro_batch_tokens": 120,
    "train.epochs": 5,
    "train.ema_decay": 0.95,
    "train.log_every": 6,
    "train.checkpoint_minutes": 5e-4,  # after every second step or so
    "eval.per_epoch": 2,
    "eval.metric": "loss",
    "eval.baseline": False,
}


def _work(environment: dict[str, str], errors: str, arguments: dict[str, Any]) -> None:
    os.environ.update(environment)
    with open(errors, "w") as file:  # noqa: PTH123
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import torch

    torch.set_num_threads(1)
    import hasten

    hasten.train(**arguments)


def start(**arguments: Any) -> BaseProcess:
    """Starts ``hasten.train(**arguments)`` in a process of its own."""
    environment = {name: os.environ[name] for name in ("HASTEN_CACHE", "OMP_NUM_THREADS")}
    handle, errors = tempfile.mkstemp(prefix="hasten-child-")
    os.close(handle)
    process = _CONTEXT.Process(target=_work, args=(environment, errors, arguments), name=errors)
    process.daemon = True
    process.start()
    return process


def finish(process: BaseProcess) -> None:
    """Waits for a process that must succeed."""
    process.join(120)
    errors = Path(process.name)
    printed = errors.read_text()
    errors.unlink()
    assert (process.exitcode, printed) == (0, "")


def kill(process: BaseProcess) -> bool:
    """Kills a process; returns whether it was still alive."""
    assert process.pid is not None
    was_alive = process.exitcode is None
    if was_alive:
        os.kill(process.pid, signal.SIGKILL)
    process.join(30)
    Path(process.name).unlink(missing_ok=True)
    return was_alive and process.exitcode == -signal.SIGKILL


def wait_for(condition: Callable[[], bool], process: BaseProcess, *, every: float = 0.003) -> bool:
    """Polls until the condition holds; False where the process ended before."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if condition():
            return True
        if process.exitcode is not None:
            return condition()
        time.sleep(every)
    raise AssertionError("the moment never came")


def steps_saved(run: Path) -> list[int]:
    """The steps of the committed checkpoints."""
    folder = run / "checkpoints"
    if not folder.is_dir():
        return []
    return sorted(int(p.name[5:]) for p in folder.iterdir() if p.name[5:].isdigit())


def is_writing_checkpoint(run: Path) -> bool:
    """Whether a checkpoint is being written at this moment."""
    folder = run / "checkpoints"
    return folder.is_dir() and any(".partial-" in path.name for path in folder.iterdir())


def weights(run: Path) -> bytes:
    """The bytes of the final model."""
    return (run / "model" / "model.safetensors").read_bytes()


def metrics(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what the clock says."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    return [{k: v for k, v in entry.items() if k not in TIMING} for entry in entries]


def result(run: Path) -> dict[str, Any]:
    """result.json without what the clock or the folder says."""
    found = json.loads((run / "result.json").read_text())
    found.pop("run")
    return {
        key: {k: v for k, v in value.items() if k not in TIMING}
        if isinstance(value, dict)
        else value
        for key, value in found.items()
    }
