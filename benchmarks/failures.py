"""Kills, stops or breaks a random rank at a random moment of a run, many times.

    hasten train --processes 2 to 4 --moment--> SIGKILL | SIGSTOP | an exception, on one rank
        -> seconds until the command ends, its exit code, whether it names rank, host and cause
        -> some are resumed: the losses of every step beside those of an undisturbed run

Moments are drawn evenly between the start of the processes and the end of an undisturbed run of as
many, imports and preparation included. An exception waits until the libraries are loaded; seconds
count from when it is raised. A fault after which the run ends well all the same, because its work
was done or because Python was where it ignores exceptions, is counted and drawn again.

    python benchmarks/failures.py [--trials 20] [--kinds kill hang raise] [--seed 0] [--output FILE]

A result that is there is completed by the kinds that are run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "distributed")]

from launched_runs import (  # noqa: E402 - found by the line above
    EVERY_STEP,
    FAULTS,
    SETTINGS,
    Launched,
    flags,
    is_alive,
    launched,
    losses,
)
from machine import describe_machine, keep, say  # noqa: E402

from builders import write_labelled  # noqa: E402

_SIZES = (2, 3, 4)
_LIMIT_SECONDS = 30.0
_HANGS_AFTER_SECONDS = 90.0
_TOLERANCE = 1e-4
_SETTINGS = {**SETTINGS, **EVERY_STEP, "train.epochs": 16, "train.learning_rate": 3e-4}
_CAUSES = {
    "kill": "was killed by SIGKILL",
    "hang": "gave no sign of life for",
    "raise": "failed with RaisedFromOutsideError: somebody wanted it",
}


def main() -> None:
    """Runs the trials of each kind and prints what came of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--trials", type=int, default=20, help="of each kind")
    parser.add_argument("--kinds", nargs="+", choices=FAULTS, default=FAULTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=5.0, help="parallel.timeout_seconds")
    parser.add_argument("--resumed", type=int, default=3, help="trials of each kind to resume")
    parser.add_argument("--output", type=Path, help="file to keep the result in")
    arguments = parser.parse_args()
    found: dict[str, Any] = {}
    if arguments.output:
        arguments.output = arguments.output.resolve()  # the trials run in a folder of their own
        if arguments.output.is_file():
            found = json.loads(arguments.output.read_text())["kinds"]
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        os.environ["HASTEN_CACHE"] = f"{name}/cache"
        write_labelled(Path("tiny.csv"), 60, noise=0.1)
        usual = {size: undisturbed(size) for size in _SIZES}
        say(f"undisturbed: {', '.join(f'{n} processes {s:.1f} s' for n, s in usual.items())}")
        for kind in arguments.kinds:
            found[kind] = summarised(run_kind(kind, arguments, usual), kind, arguments.timeout)
        if "hang" in arguments.kinds:
            at_default = strike_once("hang", random.Random(arguments.seed), {}, usual, "default")
            assert at_default is not None
            found["hang"]["at the default timeout"] = at_default
    result = {
        "benchmark": "failures",
        "machine": describe_machine(1),
        "timeout_seconds": arguments.timeout,
        "seed": arguments.seed,
        "undisturbed_seconds": usual,
        "kinds": found,
    }
    for kind, summary in found.items():
        print(f"{kind}: {described(summary)}")
    keep(result, arguments.output)


def command_for(run: str, size: int, settings: dict[str, Any]) -> list[str]:
    """Returns the arguments of `hasten train` for a run."""
    return ["tiny.csv", "-o", run, "--processes", str(size), *flags({**_SETTINGS, **settings})]


def undisturbed(size: int) -> float:
    """Returns the seconds from the start of the processes to the end; keeps the run."""
    run = Path(f"undisturbed {size}")
    with launched(run, *command_for(str(run), size, {})) as command:
        command.wait_for(lambda: len(command.ranks()) == size)
        started = time.monotonic()
        code, _, err = command.end()
        assert code == 0, err
        return time.monotonic() - started


def run_kind(
    kind: str, arguments: argparse.Namespace, usual: dict[int, float]
) -> list[dict[str, Any]]:
    """Returns what came of each trial of a kind."""
    chosen = random.Random(f"{kind} {arguments.seed}")
    settings = {"parallel.timeout_seconds": arguments.timeout}
    trials: list[dict[str, Any]] = []
    resumed, number = 0, 0
    while len(trials) < arguments.trials:
        run, number = f"{kind} {number}", number + 1
        trial = strike_once(kind, chosen, settings, usual, run)
        if trial is None or trial.get("exit_code") == 0:
            say(f"{run}: it ended well; drawn again")
            continue
        if resumed < arguments.resumed and Path(run, "config.yaml").is_file():
            trial["resumed"] = resume(run, trial["processes"])
            resumed += 1
        trials.append(trial)
        say(f"{run}: {trial}")
    say(f"{kind}: {number - len(trials)} of {number} runs ended well")
    return trials


def strike_once(
    kind: str,
    chosen: random.Random,
    settings: dict[str, Any],
    usual: dict[int, float],
    run: str,
) -> dict[str, Any] | None:
    """Returns what came of one fault; None where the run had ended before it."""
    size = chosen.choice(_SIZES)
    rank, moment = chosen.randrange(size), chosen.uniform(0, usual[size])
    with launched(Path(run), *command_for(run, size, settings)) as command:
        command.wait_for(lambda: len(command.ranks()) == size)
        ranks = command.ranks()
        time.sleep(moment)
        if command.process.poll() is not None or rank not in command.ranks():
            return None
        struck = time.monotonic()
        pid = command.strike(kind, rank)
        trial = {"processes": size, "rank": rank, "moment_seconds": round(moment, 2)}
        return trial | outcome(command, struck, ranks, (kind, rank, pid))


def outcome(
    command: Launched, struck: float, ranks: dict[int, int], blow: tuple[str, int, int]
) -> dict[str, Any]:
    """Waits for the end of a run that was struck; returns how it ended."""
    kind, rank, pid = blow
    try:
        code, _, err = command.end(_HANGS_AFTER_SECONDS)
    except subprocess.TimeoutExpired:
        return {"hangs": True}
    if kind == "raise":
        struck = command.raised_at(rank) or struck
    last = (err.splitlines() or [""])[-1]
    who = rf"rank {rank} \(process {pid} on {re.escape(socket.gethostname())}\) "
    return {
        "hangs": any(map(is_alive, ranks.values())),
        "seconds": round(time.monotonic() - struck, 2),
        "exit_code": code,
        "is_named": re.search(who + re.escape(_CAUSES[kind]), last) is not None,
        "last_message": last,
    }


def resume(run: str, size: int) -> dict[str, Any]:
    """Goes on with a run; returns how far its losses are from those of an undisturbed one."""
    with launched(Path(run), "--resume", run) as command:
        code, _, err = command.end()
    if code:
        return {"exit_code": code, "messages": err}
    own, wanted = losses(Path(run)), losses(Path(f"undisturbed {size}"))
    worst = max(abs(own[step] / wanted[step] - 1) for step in wanted)
    is_same = own.keys() == wanted.keys() and worst < _TOLERANCE
    return {"exit_code": code, "is_same": is_same, "largest_relative_difference": worst}


def summarised(trials: list[dict[str, Any]], kind: str, timeout: float) -> dict[str, Any]:
    """Returns the counts of a kind, with every trial."""
    seconds = [trial["seconds"] for trial in trials if not trial["hangs"]]
    again = [trial["resumed"] for trial in trials if "resumed" in trial]
    return {
        "trials": len(trials),
        "hangs": sum(trial["hangs"] for trial in trials),
        "exit_codes": Counter(str(trial.get("exit_code")) for trial in trials),
        "is_named": sum(trial.get("is_named", False) for trial in trials),
        "seconds": [min(seconds), statistics.median(seconds), max(seconds)],
        "within_limit": sum(one < _LIMIT_SECONDS for one in seconds),
        "timeout_seconds": timeout if kind == "hang" else None,
        "resumed": len(again),
        "resumed_with_the_same_losses": sum(one.get("is_same", False) for one in again),
        "each": trials,
    }


def described(found: dict[str, Any]) -> str:
    """Returns a summary in words."""
    least, median, most = found["seconds"]
    text = (
        f"{found['hangs']} hangs in {found['trials']} trials, exit codes "
        f"{dict(found['exit_codes'])}, ended after {least:.1f} to {most:.1f} s (median "
        f"{median:.1f}), named in {found['is_named']}, resumed with the same losses "
        f"{found['resumed_with_the_same_losses']} of {found['resumed']}"
    )
    if default := found.get("at the default timeout"):
        text += f"; with the default timeout after {default['seconds']:.1f} s"
    return text


if __name__ == "__main__":
    main()
