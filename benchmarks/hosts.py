"""Cuts the cable of one of several hosts while they train together, and goes on afterwards.

    network namespaces joined by a bridge --a process each, gloo--> one run
        cable of the last host pulled -> seconds until each process has ended, exit codes, messages
        cable put back -> resumed -> losses of every step beside those of one process

It needs the permission to make network namespaces, which root has, and says so where it has not.

    python benchmarks/hosts.py [--hosts 2 3] [--timeout 20] [--output FILE]
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "distributed")]

from launched_runs import EVERY_STEP, SETTINGS, flags, losses, steps_saved  # noqa: E402
from machine import describe_machine, keep, say, skip  # noqa: E402
from network import hosts, why_not  # noqa: E402
from test_hosts import Group, commands  # noqa: E402

import hasten  # noqa: E402
from builders import write_labelled  # noqa: E402


def main() -> None:
    """Trains on some hosts, cuts, and goes on, for each number of hosts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--hosts", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--timeout", type=float, default=20.0, help="parallel.timeout_seconds")
    parser.add_argument("--output", type=Path, help="file to keep the result in")
    arguments = parser.parse_args()
    if reason := why_not():
        skip("hosts", reason, arguments.output)
        return
    output = arguments.output and arguments.output.absolute()
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        os.environ["HASTEN_CACHE"] = f"{name}/cache"
        write_labelled(Path("tiny.csv"), 60, noise=0.1)
        hasten.train("tiny.csv", output="alone", settings=SETTINGS)
        found = {count: cut_and_go_on(count, arguments.timeout) for count in arguments.hosts}
    for count, one in found.items():
        print(f"{count} hosts: {one}")
    result = {"benchmark": "hosts", "machine": describe_machine(1), "timeout": arguments.timeout}
    keep({**result, "hosts": found}, output)


def cut_and_go_on(count: int, timeout: float) -> dict[str, Any]:
    """Returns what a cut does to a run on some hosts, and whether it goes on."""
    run, group = Path(f"on {count}"), Group()
    settings = {**SETTINGS, **EVERY_STEP, "parallel.timeout_seconds": timeout}
    with hosts(count) as made:
        group.start(commands(made, "tiny.csv", "-o", run, *flags(settings)), made.address(0))
        group.wait_for(lambda: bool(steps_saved(run)))
        made.plug(count - 1, connected=False)
        cut, ended = time.monotonic(), []
        for rank in range(count):
            code, err = group.end(rank)
            last = (err.splitlines() or [""])[-1]
            seconds = round(time.monotonic() - cut, 2)  # or earlier, where an earlier rank was last
            ended.append({"exit_code": code, "ended_within_seconds": seconds, "says": last})
            say(f"{count} hosts: rank {rank}: {ended[-1]}")
        made.plug(count - 1, connected=True)
        group.start(commands(made, "--resume", run), made.address(0))
        codes = [group.end(rank)[0] for rank in range(count)]
    own, wanted = losses(run), losses(Path("alone"))
    return {
        "ended": ended,
        "resumed_exit_codes": codes,
        "has_all_steps": own.keys() == wanted.keys(),
        "largest_relative_difference": max(abs(own[step] / wanted[step] - 1) for step in wanted),
    }


if __name__ == "__main__":
    main()
