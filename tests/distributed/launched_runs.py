"""`hasten train` in processes that it starts itself, watched and disturbed from outside."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from builders import STILL

SETTINGS: dict[str, Any] = {
    **STILL,
    "model.num_layers": 1,
    "model.hidden_size": 24,
    "model.num_heads": 2,
    "train.num_threads": 1,
    "train.tokens_per_step": 120,
    "train.epochs": 8,
    "train.log_every": 1,
    "train.learning_rate": 3e-3,
    "train.precision": "float32",
    "train.matrix_library": "default",
    "eval.patience": 0,
    "eval.baseline": False,
    "eval.metric": "loss",
}
EVERY_STEP = {"train.checkpoint_minutes": 1e-9}
FAULTS = ("kill", "hang", "raise")
_RAISING = Path(__file__).parent / "raising"
_SECONDS = 120  # a machine may be busy; nothing here is meant to take a tenth of it
SECONDS_TO_NOTICE = 30  # that a process is lost; then whoever waits for it is killed in its turn


def flags(settings: dict[str, Any]) -> list[str]:
    """Returns settings as the command line takes them."""
    return [part for key, value in settings.items() for part in (f"--{key}", str(value))]


class Launched:
    """A command, its processes, and what it says.

    Attributes:
        process: the one that was started and starts the others.
        run: the run's folder.
        orders: folder in which a rank looks for the order to raise.
    """

    def __init__(self, process: subprocess.Popen[str], run: Path, orders: Path) -> None:
        self.process, self.run, self.orders = process, run, orders

    def ranks(self) -> dict[int, int]:
        """Returns the process of each rank that is alive."""
        found = {}
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        for pid in map(int, children.read_text().split()):
            environment = read_environment(pid)
            if "RANK" in environment:
                found[int(environment["RANK"])] = pid
        return found

    def strike(self, fault: str, rank: int) -> int:
        """Kills or stops a rank, or makes it raise; returns its process."""
        pid = self.ranks()[rank]
        if fault == "raise":
            (self.orders / str(rank)).touch()
        else:
            os.kill(pid, signal.SIGKILL if fault == "kill" else signal.SIGSTOP)
        return pid

    def raised_at(self, rank: int) -> float | None:
        """Returns the monotonic time at which a rank raised as it was told; None if it did not."""
        path = self.orders / f"{rank}.raised"
        return float(path.read_text()) if path.exists() else None

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Waits for something to be so while the command goes on."""
        end = time.monotonic() + _SECONDS
        while not condition():
            assert self.process.poll() is None, f"it ended too soon: {self.process.communicate()}"
            assert time.monotonic() < end, "the moment never came"
            time.sleep(0.002)

    def end(self, seconds: float = _SECONDS) -> tuple[int, str, str]:
        """Returns exit code, output and messages once the command and its processes are gone."""
        out, err = self.process.communicate(timeout=seconds)
        return self.process.returncode, out, err


@contextmanager
def launched(run: Path, *arguments: object, starter: Sequence[str] = ()) -> Iterator[Launched]:
    """Starts `hasten train ARGUMENTS`; what is left of it afterwards is killed.

    Args:
        run: the run's folder.
        *arguments: of the command.
        starter: the module that starts the processes in hasten's place, and its arguments.
    """
    command = ["-m", *starter, "-m", "hasten"] if starter else ["-m", "hasten"]
    path = os.pathsep.join(filter(None, [str(_RAISING), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as orders:
        process = subprocess.Popen(
            [sys.executable, *command, "train", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path, "RAISE_IN": orders},
            start_new_session=True,  # so that Ctrl-C can be sent to all that a terminal would
        )
        found = Launched(process, run, Path(orders))
        try:
            yield found
        finally:
            if process.poll() is None:
                for pid in (*found.ranks().values(), process.pid):
                    os.kill(pid, signal.SIGKILL)
            process.communicate()


def train_in_processes(*arguments: object) -> tuple[int, str, str]:
    """Returns exit code, output and messages of `hasten train ARGUMENTS`."""
    with launched(Path(), *arguments) as started:
        return started.end()


def read_environment(pid: int) -> dict[str, str]:
    """Returns the environment that a process was started with; nothing where it has gone."""
    try:
        entries = Path(f"/proc/{pid}/environ").read_text(errors="replace").split("\0")
    except OSError:
        return {}
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def is_alive(pid: int) -> bool:
    """Says whether a process is there and no mere entry that waits to be read."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def entries(run: Path, split: str) -> list[dict[str, Any]]:
    """Returns what metrics.jsonl says of a split."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if entry.get("split") == split]


def losses(run: Path, split: str = "train") -> dict[int, float]:
    """Returns the losses in metrics.jsonl by step, each of which is there once."""
    found = [(entry["step"], entry["loss"]) for entry in entries(run, split)]
    assert len(dict(found)) == len(found), "a step is there twice"
    return dict(found)


def steps_saved(run: Path) -> list[int]:
    """Returns the steps of the committed checkpoints."""
    folder = run / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name[5:]) for name in names if name[5:].isdigit())


def has_begun(run: Path) -> bool:
    """Says whether the first step is taken."""
    return (run / "metrics.jsonl").is_file() and (run / "metrics.jsonl").stat().st_size > 0
