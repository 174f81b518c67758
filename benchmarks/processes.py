"""One process with all cores against several that share the same run.

    hasten train                          -> tokens/s of training, accuracy      N threads
    torchrun --nproc-per-node=1 ...       -> the same                            N threads
    hasten train --processes N            -> the same                            N times 1 thread
    hasten train --parallel shard=N       -> the same

The second is the same process where a launcher has started it; what that costs is kept as
"distributed_overhead", a share of the first's tokens/s. All train the same encoder (4 layers, width
256) on the same rows, in turn. With one core a process, nothing is left to gain but what threads
lose by waiting for each other; more of them on more machines add up.

    python benchmarks/processes.py [--data TRAIN TEST] [--processes 2] [--rounds 2] [--output FILE]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machine import (
    SST2,
    available_threads,
    child_environment,
    choose_pair,
    describe_machine,
    keep,
    missing,
    run_json,
    say,
    skip,
)

UNDER_TORCHRUN = "one process under torchrun"
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node=1", "-m"]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, nargs="+", default=[SST2], metavar="PATH")
    parser.add_argument("--processes", type=int, default=available_threads())
    parser.add_argument("--rounds", type=int, default=2, help="runs of each, in turn")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--tokens-per-step", type=int, default=4096)
    parser.add_argument("--output", type=Path, help="file to keep the result in")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    train, judged = choose_pair(arguments.data)
    if reason := missing([train, judged]):
        skip("processes", reason, arguments.output)
        return
    count = arguments.processes
    ways = {
        "one process": ([], count),
        UNDER_TORCHRUN: ([], count),
        f"replicate={count}": (["--parallel", f"replicate={count}"], 1),
        f"shard={count}": (["--parallel", f"shard={count}"], 1),
    }
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    for number in range(arguments.rounds):
        for name, (flags, num_threads) in ways.items():
            launcher = TORCHRUN if name == UNDER_TORCHRUN else []
            work = Work((train, judged), flags, num_threads, number, launcher)
            runs[name].append(run(arguments, work))
            say(f"round {number + 1}, {name}: {describe(runs[name][-1])}")
    medians = {
        name: {key: statistics.median(run[key] for run in some) for key in some[0]}
        for name, some in runs.items()
    }
    alone = medians["one process"]["tokens_per_second"]
    ratios = {name: found["tokens_per_second"] / alone for name, found in medians.items()}
    for name, found in medians.items():
        print(f"{name:26} {describe(found)}, ratio {ratios[name]:.2f}")
    keep(
        {
            "benchmark": "processes",
            "data": [train.name, judged.name],
            "processes": count,
            "tokens_per_step": arguments.tokens_per_step,
            "rounds": runs,
            "medians": medians,
            "ratios": ratios,
            "distributed_overhead": 1 - ratios[UNDER_TORCHRUN],
            "machine": describe_machine(available_threads()),
        },
        arguments.output,
    )


@dataclass(frozen=True)
class Work:
    """One run.

    Attributes:
        files: to train on, and to judge by.
        flags: besides those that all runs have.
        num_threads: of each process.
        seed: of the run.
        launcher: of Python's modules, with its flags; empty for none.
    """

    files: tuple[Path, Path]
    flags: list[str]
    num_threads: int
    seed: int
    launcher: list[str]


def run(arguments: argparse.Namespace, work: Work) -> dict[str, Any]:
    """Trains once, with nothing prepared beforehand."""
    with tempfile.TemporaryDirectory() as name:
        command = [sys.executable, "-m", *work.launcher, "hasten", "train", str(work.files[0])]
        command += ["--validation", str(work.files[1]), "--seed", str(work.seed), "--json"]
        command += ["--epochs", str(arguments.epochs), "--output", f"{name}/run"]
        command += ["--model.num_layers", str(arguments.num_layers)]
        command += ["--model.hidden_size", str(arguments.hidden_size)]
        command += ["--train.tokens_per_step", str(arguments.tokens_per_step), *work.flags]
        done = run_json(command, child_environment(Path(name), work.num_threads))
    training = done.result["training"]
    return {
        "tokens_per_second": training["tokens_per_second"],
        "train_seconds": training["seconds"],
        "whole_seconds": done.seconds,
        "accuracy": done.result["validation"]["accuracy"],
    }


def describe(run: dict[str, Any]) -> str:
    return (
        f"{run['tokens_per_second']:,.0f} tokens/s, {run['train_seconds']:.1f} s of training, "
        f"{run['whole_seconds']:.1f} s in all, accuracy {run['accuracy']:.4f}"
    )


if __name__ == "__main__":
    main()
