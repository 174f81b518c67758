"""A process that is killed, hangs or raises: the others end soon, it is named, the run goes on.

Which rank it is and after which step is drawn with a seed; ``test_hosts`` has the same without a
launcher, and ``benchmarks/failures.py`` does it many times, at any moment.
"""

from __future__ import annotations

import random
import re
import socket
import time
from pathlib import Path

import pytest
from launched_runs import (
    EVERY_STEP,
    FAULTS,
    SECONDS_TO_NOTICE,
    SETTINGS,
    entries,
    flags,
    has_begun,
    is_alive,
    launched,
    losses,
    steps_saved,
)

import hasten
from builders import write_labelled

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc"),
]
HOST = socket.gethostname()
SETTINGS = {**SETTINGS, "parallel.timeout_seconds": 3}
CAUSES = {
    "kill": "was killed by SIGKILL",
    "hang": r"gave no sign of life for \d+ s and was killed",
    "raise": "failed with RaisedFromOutsideError: somebody wanted it",
}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_labelled(Path("tiny.csv"), 60, noise=0.1)


def fail(fault: str, seed: int, **settings: object) -> tuple[Path, int, str]:
    """Lets a random rank of a run fail after a random step; returns run, rank and messages."""
    chosen = random.Random(f"{fault} {seed}")
    size = chosen.choice([2, 2, 3])
    rank, steps = chosen.randrange(size), chosen.randrange(1, 8)
    run = Path(f"{fault} {seed}")
    given = ("--processes", size, *flags({**SETTINGS, "train.epochs": 400, **settings}))
    with launched(run, "tiny.csv", "-o", run, *given) as command:
        command.wait_for(lambda: has_begun(run) and len(entries(run, "train")) >= steps)
        command.wait_for(
            lambda: "train.checkpoint_minutes" not in settings or steps_saved(run) != []
        )
        ranks = command.ranks()
        pid = command.strike(fault, rank)
        struck = time.monotonic()
        code, out, err = command.end(SECONDS_TO_NOTICE)
    assert (code, out) == (7, ""), err
    assert time.monotonic() - struck < SECONDS_TO_NOTICE
    assert sorted(ranks) == list(range(size)) and not any(map(is_alive, ranks.values()))
    last = err.splitlines()[-1]
    assert re.search(rf"rank {rank} \(process {pid} on {HOST}\) {CAUSES[fault]};", last), err
    assert f"hasten train --resume '{run}'" in last
    return run, rank, err


@pytest.mark.parametrize("fault", FAULTS[1:])  # test_processes has those that are killed
def test_a_failure_ends_the_run_and_names_rank_host_and_cause(fault: str):
    run, rank, err = fail(fault, 0)
    # The others were told to end, as by a signal from outside: nobody saves because of that.
    assert not steps_saved(run) and not list((run / "checkpoints").iterdir())
    if fault == "raise":
        of_rank = f"rank {rank}: " * (rank > 0)
        assert f"hasten: {of_rank}RaisedFromOutsideError: somebody wanted it\n" in err


@pytest.mark.parametrize("fault", FAULTS[1:])
def test_a_run_goes_on_after_a_failure(fault: str, cli):
    settings = {"train.epochs": SETTINGS["train.epochs"], **EVERY_STEP}
    run, _, _ = fail(fault, 1, **settings)
    (*_, saved) = steps_saved(run)
    ended = cli("train", "--resume", run, "--processes", 1)
    assert ended.code == 0 and f"resumed at step {saved} of " in ended.err
    reference = hasten.train("tiny.csv", output="reference", settings=SETTINGS).folder
    for split in ("train", "validation"):
        assert losses(run, split) == pytest.approx(losses(reference, split), rel=1e-4)
