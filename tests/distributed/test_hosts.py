"""Processes that no launcher of ours has started, on one host and on several.

RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT --as a cluster sets them--> processes
    one is stopped, killed or fails; a cable is pulled; versions or files differ
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from launched_runs import EVERY_STEP, SECONDS_TO_NOTICE, SETTINGS, flags, losses, steps_saved
from network import Hosts, hosts, why_not

import hasten
from builders import write_labelled

pytestmark = pytest.mark.slow
HOST = socket.gethostname()
WORKER = str(Path(__file__).with_name("watched_worker.py"))
SETTINGS = {**SETTINGS, "parallel.timeout_seconds": 4}


class Group:
    """Processes that find each other in their environment; what is left of them is killed."""

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[str]] = []
        with socket.socket() as one:
            one.bind(("", 0))
            self.port = one.getsockname()[1]

    def start(
        self,
        commands: Sequence[Sequence[str]],
        address: str = "127.0.0.1",
        own: Mapping[int, Mapping[str, str]] | None = None,
    ) -> None:
        """Starts a process for each command; ``own`` has variables of single ranks."""
        self.processes = []
        for rank, command in enumerate(commands):
            place = {"RANK": rank, "WORLD_SIZE": len(commands), "MASTER_PORT": self.port}
            variables = {name: str(value) for name, value in place.items()}
            self.processes.append(
                subprocess.Popen(
                    command,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    env={
                        **os.environ,
                        "MASTER_ADDR": address,
                        "TORCH_CPP_LOG_LEVEL": "ERROR",  # as the command has it
                        **variables,
                        **(own or {}).get(rank, {}),
                    },
                )
            )

    def end(self, rank: int, seconds: float = 120) -> tuple[int, str]:
        """Returns the exit code and the messages of a rank."""
        _, err = self.processes[rank].communicate(timeout=seconds)
        return self.processes[rank].returncode, err

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Waits for something to be so while all processes go on."""
        end = time.monotonic() + 120
        while not condition():
            ended = [r for r, process in enumerate(self.processes) if process.poll() is not None]
            assert not ended, [self.end(rank) for rank in ended]
            assert time.monotonic() < end, "the moment never came"
            time.sleep(0.01)


@pytest.fixture
def group() -> Iterator[Group]:
    made = Group()
    yield made
    for process in made.processes:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_labelled(Path("tiny.csv"), 60, noise=0.1)


@pytest.mark.parametrize(
    ("fault", "rank", "said"),
    [
        ("hang", 1, rf"rank 1 on {HOST} gave no sign of life for \d+ s; all others stop."),
        ("kill", 2, rf"rank 2 on {HOST} gave no sign of life for \d+ s; all others stop."),
        ("kill", 0, rf"rank 0 on {HOST} cannot be reached any more; rank 1 on {HOST} stops."),
        ("raise", 1, rf"rank 1 on {HOST} failed: ArithmeticError: this does not add up; all"),
    ],
)
def test_processes_watch_each_other(fault: str, rank: int, said: str, group: Group):
    command = [sys.executable, WORKER, *([str(rank)] if fault == "raise" else [])]
    group.start([command] * 3)
    if fault != "raise":
        assert group.processes[0].stdout is not None
        assert group.processes[0].stdout.readline() == "begun\n"
        number = signal.SIGKILL if fault == "kill" else signal.SIGSTOP
        group.processes[rank].send_signal(number)
    others = [other for other in range(3) if other != rank]
    ended = [group.end(other, SECONDS_TO_NOTICE) for other in others]
    assert [code for code, _ in ended] == [7, 7], ended
    # Rank 0 speaks for all that it can reach.
    assert re.search(f"^hasten: {said}", ended[0][1], re.MULTILINE), ended
    assert rank == 0 or ended[1][1] == "", ended
    if fault == "hang":
        group.processes[rank].send_signal(signal.SIGCONT)
        assert group.end(rank, SECONDS_TO_NOTICE)[0] == 7


def test_other_versions_are_refused_before_anything_is_read(group: Group, tmp_path: Path):
    change = tmp_path / "older" / "sitecustomize.py"
    change.parent.mkdir()
    change.write_text("import hasten\nhasten.__version__ = '0.0.9'\n")
    path = os.pathsep.join(filter(None, [str(change.parent), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "hasten", "train", "tiny.csv", "-o", "run"]
    group.start([command] * 2, own={1: {"PYTHONPATH": path}})
    code, err = group.end(0)
    own = f"hasten {hasten.__version__}"
    differ = f"{own} (rank 0 on {HOST}), hasten 0.0.9 (rank 1 on {HOST})"
    wanted = f"hasten: the processes run different versions: {differ}. Install the same on all"
    assert code == 8 and err.startswith(wanted) and len(err.splitlines()) == 1, err
    assert group.end(1) == (8, "")
    assert not Path("run").exists()


# Several hosts


@pytest.fixture
def two_hosts() -> Iterator[Hosts]:
    if reason := why_not():
        pytest.skip(reason)
    with hosts(2) as made:
        yield made


def commands(made: Hosts, *arguments: object) -> list[list[str]]:
    """Returns `hasten train ARGUMENTS` for each host."""
    train = ["env", "GLOO_SOCKET_IFNAME=eth0", sys.executable, "-m", "hasten", "train"]
    return [made.command(n, *train, *map(str, arguments)) for n in range(len(made.names))]


def test_a_run_outlives_a_short_cut_and_goes_on_after_a_long_one(two_hosts: Hosts, group: Group):
    run = Path("run")
    given = ("tiny.csv", "-o", run, *flags({**SETTINGS, **EVERY_STEP}))
    group.start(commands(two_hosts, *given), two_hosts.address(0))
    group.wait_for(lambda: bool(steps_saved(run)))
    two_hosts.plug(1, connected=False)
    time.sleep(1)
    two_hosts.plug(1, connected=True)
    before = max(steps_saved(run))
    group.wait_for(lambda: max(steps_saved(run)) > before + 1)

    two_hosts.plug(1, connected=False)
    cut = time.monotonic()
    ended = [group.end(rank, SECONDS_TO_NOTICE) for rank in range(2)]
    assert time.monotonic() - cut < SECONDS_TO_NOTICE
    assert [code for code, _ in ended] == [7, 7], ended
    assert re.search(r"rank 1 on host-1 gave no sign of life for \d+ s; all others", ended[0][1])
    assert re.search(r"nothing was heard of rank 0 on host-0 for \d+ s; rank 1", ended[1][1])

    (*_, saved) = steps_saved(run)
    two_hosts.plug(1, connected=True)
    group.start(commands(two_hosts, "--resume", run), two_hosts.address(0))
    code, err = group.end(0)
    assert (code, group.end(1)) == (0, (0, "")), err
    assert f"resumed at step {saved} of " in err
    reference = hasten.train("tiny.csv", output="reference", settings=SETTINGS).folder
    for split in ("train", "validation"):
        assert losses(run, split) == pytest.approx(losses(reference, split), rel=1e-4)


def test_hosts_with_other_data_are_refused(two_hosts: Hosts, group: Group):
    write_labelled(Path("other.csv"), 50, noise=0.1)
    given = ("tiny.csv", "-o", "run", *flags(SETTINGS))
    both = commands(two_hosts, *given)
    # A host's mounts are its own here: it sees the other file under the same name.
    start = ["sh", "-c", 'mount --bind other.csv tiny.csv && exec "$0" "$@"']
    at = both[1].index("env")
    group.start([both[0], [*both[1][:at], *start, *both[1][at:]]], two_hosts.address(0))
    code, err = group.end(0)
    path = re.escape(str(Path("tiny.csv").absolute()))
    wanted = rf"{path} is another file for rank 1 on host-1 than for rank 0 on host-0: all hosts"
    assert code == 3 and re.search(f"^hasten: {wanted}", err.splitlines()[-1]), err
    assert group.end(1) == (3, "")
    assert not steps_saved(Path("run"))
