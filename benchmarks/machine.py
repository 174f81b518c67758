"""What the benchmarks share: the machine that figures come from, data files, timed commands.

No figure is of use without its machine, and no machine's figures compare with another's: every
result names where it was measured, and what it shows is a ratio within one run.
"""

from __future__ import annotations

import csv
import importlib.metadata
import itertools
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).resolve().parents[1]
DATA = REPOSITORY.parent / "shared" / "data"
SST2, MULTI30K = DATA / "sst2", DATA / "multi30k"
TINY_SHAKESPEARE = DATA / "tinyshakespeare" / "input.txt"
_SAMPLE_ROWS = 1000
_POLL_SECONDS = 0.05


class Finished(NamedTuple):
    """A command that ended well: its wall-clock seconds and the JSON object it printed."""

    seconds: float
    result: dict[str, Any]


class Watched(NamedTuple):
    """A training that ended well.

    Attributes:
        seconds: wall-clock, of the whole command.
        result: the JSON object it printed.
        evaluations: those of its metrics.jsonl, each with ``command_seconds``, the wall-clock
            seconds from the start of the command to when it stood there.
    """

    seconds: float
    result: dict[str, Any]
    evaluations: list[dict[str, Any]]


class Pairs(NamedTuple):
    """A file's texts and labels, and the columns they stood in."""

    columns: tuple[tuple[str, ...], str]
    texts: list[str]
    labels: list[str]

    def sample(self, num_rows: int | None) -> Pairs:
        """Returns a random choice of rows, the same each time; all of them for None."""
        rows = list(range(len(self.texts)))
        if num_rows is not None and num_rows < len(rows):
            rows = sorted(random.Random(0).sample(rows, num_rows))
        texts, labels = [self.texts[i] for i in rows], [self.labels[i] for i in rows]
        return Pairs(self.columns, texts, labels)

    def write(self, path: Path) -> Path:
        """Writes a CSV file with the columns text and label."""
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            writer.writerows(zip(self.texts, self.labels, strict=True))
        return path


def describe_machine(num_threads: int) -> dict[str, Any]:
    """Returns what a reader needs to judge a figure."""
    packages = ("torch", "tokenizers", "transformers", "scikit-learn", "sacrebleu")
    return {
        "processor": _processor(),
        "num_cores": os.cpu_count(),
        "num_threads": num_threads,
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        **{name: _version(name) for name in packages},
    }


def available_threads() -> int:
    """Returns OMP_NUM_THREADS, else the cores that this process may use."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isdigit() and int(wanted):
        return int(wanted)
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def child_environment(folder: Path, num_threads: int) -> dict[str, str]:
    """Returns an environment in which nothing is downloaded or taken from an earlier run.

    Args:
        folder: of this child alone; hasten's cache goes there, so that its preparation of the
            data counts each time.
        num_threads: threads of the numerical libraries.
    """
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(num_threads),
        "HASTEN_CACHE": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }


def run_json(command: Sequence[str], environment: Mapping[str, str]) -> Finished:
    """Runs a command that prints one JSON object; ends this program where it fails."""
    start = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if done.returncode:
        sys.exit(f"{' '.join(command)}\nexited with {done.returncode}:\n{done.stderr[-3000:]}")
    return Finished(seconds, json.loads(done.stdout))


def run_watched(
    command: Sequence[str],
    environment: Mapping[str, str],
    folder: Path,
    on_evaluation: Callable[[dict[str, Any]], None],
) -> Watched:
    """Runs ``hasten train``, noting when each evaluation of its validation rows is there.

    Args:
        command: which prints one JSON object.
        environment: of the command.
        folder: of this child alone; its run goes to ``run`` in it, its output beside that.
        on_evaluation: told of each evaluation as it comes.
    """
    command = [*command, "--output", str(folder / "run"), "--json"]
    evaluations: list[dict[str, Any]] = []
    with (folder / "out").open("w+") as out, (folder / "err").open("w+") as err:
        start = time.perf_counter()
        child = subprocess.Popen(command, env=environment, stdout=out, stderr=err)
        try:
            ended, seconds = False, 0.0
            while not ended:
                time.sleep(_POLL_SECONDS)
                ended = child.poll() is not None
                seconds = time.perf_counter() - start
                for entry in _evaluations(folder / "run" / "metrics.jsonl")[len(evaluations) :]:
                    evaluations.append({"command_seconds": seconds, **entry})
                    on_evaluation(evaluations[-1])
        finally:
            child.kill()
            child.wait()
        out.seek(0)
        err.seek(0)
        if child.returncode:
            sys.exit(f"{' '.join(command)}\nexited with {child.returncode}:\n{err.read()[-3000:]}")
        return Watched(seconds, json.load(out), evaluations)


def missing(paths: Sequence[Path]) -> str | None:
    """Returns why a benchmark cannot run, or None where all of its files are there."""
    absent = [str(path) for path in paths if not path.is_file()]
    return f"there is no {', '.join(absent)}" if absent else None


def choose_pair(data: Sequence[Path]) -> tuple[Path, Path]:
    """Returns the file to train on and the one to measure on.

    Args:
        data: two files, or a folder with train.csv and dev.csv (else test.csv, as `hasten demo`
            writes it). A benchmark is tuned by looking at it, so it must not look at a test set
            where there is anything else.
    """
    if len(data) == 2:
        return data[0], data[1]
    if len(data) > 2:
        sys.exit("--data: give one folder, or a training file and a file to measure on")
    folder = data[0]
    judged = next((folder / n for n in ("dev.csv", "test.csv") if (folder / n).is_file()), None)
    return folder / "train.csv", judged or folder / "dev.csv"


def read_pairs(path: Path, columns: tuple[tuple[str, ...], str] | None = None) -> Pairs:
    """Reads the texts and labels of a file, as hasten does."""
    from hasten.data.columns import CellError, choose_columns, label_of, resolve_columns, texts_of
    from hasten.data.rows import Row, open_rows

    file = open_rows(path)
    if columns is None:
        sample = itertools.islice((row for row in file if isinstance(row, Row)), _SAMPLE_ROWS)
        choice = choose_columns(list(sample), file.columns, file=str(path))
        columns = choice.text, choice.label
    *text_at, label_at = resolve_columns(file.columns, [*columns[0], columns[1]])
    pairs = Pairs(columns, [], [])
    for row in file:
        if not isinstance(row, Row):
            continue
        try:
            text, label = " ".join(texts_of(row.cells, text_at)), label_of(row.cells[label_at])
        except CellError:
            continue
        pairs.texts.append(text)
        pairs.labels.append(label)
    return pairs


def medians(runs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Returns the median of each figure that all runs have; a seed is no figure."""
    known = [k for k in runs[0] if k != "seed" and all(run[k] is not None for run in runs)]
    return {key: statistics.median(run[key] for run in runs) for key in known}


def keep(result: Mapping[str, Any], path: Path | None) -> None:
    """Writes a result as JSON where a file was asked for."""
    if path is not None:
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def skip(benchmark: str, reason: str, path: Path | None) -> None:
    """Says why a benchmark is skipped."""
    print(f"{benchmark}: skipped, {reason}", file=sys.stderr)
    keep({"benchmark": benchmark, "skipped": reason}, path)


def say(text: str) -> None:
    """Prints progress, apart from results."""
    print(text, file=sys.stderr, flush=True)


def _evaluations(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # what follows is not whole yet
    entries = [json.loads(line) for line in lines]
    return [entry for entry in entries if entry.get("split") == "validation"]


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
