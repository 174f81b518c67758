"""What `hasten train` reaches on SST-2 with its defaults, and in what time.

    for each seed: hasten train train.csv --validation dev.csv --test test.csv --seed N
                   -> accuracy, whole-command seconds, TF-IDF baseline -> medians

Everything about hasten's defaults is chosen on dev.csv. test.csv is read once per reported seed:
while trying things, pass `--test dev`. What follows `--` goes to `hasten train`.

    python benchmarks/sst2.py --seeds 1 2 3 [--test dev] [--output FILE] [-- --epochs 2]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from machine import (
    SST2,
    available_threads,
    child_environment,
    describe_machine,
    keep,
    medians,
    missing,
    run_json,
    say,
    skip,
)

BASELINE = "tfidf_logistic_regression"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, default=SST2, help="folder with train, dev, test.csv")
    parser.add_argument("--test", choices=["test", "dev"], default="test", help="judged on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--threads", type=int, default=available_threads())
    parser.add_argument("--output", type=Path, help="file to keep the result in")
    own, rest = sys.argv[1:], []
    if "--" in own:
        own, rest = own[: own.index("--")], own[own.index("--") + 1 :]
    arguments = parser.parse_args(own)
    arguments.rest = rest
    return arguments


def main() -> None:
    arguments = parse_arguments()
    files = [arguments.data / f"{name}.csv" for name in ("train", "dev", arguments.test)]
    if reason := missing(files):
        skip("sst2", reason, arguments.output)
        return
    seeds = []
    for seed in arguments.seeds:
        seeds.append(run_seed(arguments, files, seed))
        say(describe(seeds[-1]))
    result = {
        "benchmark": "sst2",
        "judged_on": files[2].name,
        "options": arguments.rest,
        "seeds": seeds,
        "medians": medians(seeds),
        "machine": describe_machine(arguments.threads),
    }
    print_table(result)
    keep(result, arguments.output)


def run_seed(arguments: argparse.Namespace, files: list[Path], seed: int) -> dict[str, Any]:
    """Runs the command once, with nothing prepared beforehand."""
    train, validation, test = map(str, files)
    with tempfile.TemporaryDirectory() as name:
        command = [sys.executable, "-m", "hasten", "train", train, "--validation", validation]
        command += ["--test", test, "--seed", str(seed), "--output", f"{name}/run", "--json"]
        environment = child_environment(Path(name), arguments.threads)
        done = run_json([*command, *arguments.rest], environment)
    found, training = done.result, done.result["training"]
    baseline = found["baselines"].get(BASELINE, {})
    return {
        "seed": seed,
        "accuracy": found["test"]["accuracy"],
        "macro_f1": found["test"]["macro_f1"],
        "validation_accuracy": found["validation"]["accuracy"],
        "whole_seconds": done.seconds,
        "train_seconds": training["seconds"],
        "epochs": training["epochs"],
        "steps": training["steps"],
        "num_parameters": training["num_parameters"],
        "tokens_per_second": training["tokens_per_second"],
        "padding_fraction": training["padding_fraction"],
        "tfidf_accuracy": baseline.get("accuracy"),
    }


def describe(run: dict[str, Any]) -> str:
    return (
        f"seed {run['seed']}: accuracy {run['accuracy']:.4f} "
        f"(validation {run['validation_accuracy']:.4f}), {run['whole_seconds']:.1f} s"
    )


def print_table(result: dict[str, Any]) -> None:
    print(f"judged on {result['judged_on']}")
    print(f"{'':8} {'accuracy':>9} {'validation':>11} {'command s':>10} {'training s':>11}")
    runs = {f"seed {run['seed']}": run for run in result["seeds"]}
    for name, run in {**runs, "median": result["medians"]}.items():
        print(
            f"{name:8} {run['accuracy']:9.4f} {run['validation_accuracy']:11.4f} "
            f"{run['whole_seconds']:10.1f} {run['train_seconds']:11.1f}"
        )
    baseline = result["medians"].get("tfidf_accuracy")
    if baseline is None:
        print("TF-IDF + logistic regression: not measured")
    else:
        print(f"TF-IDF + logistic regression: {baseline:.4f}")


if __name__ == "__main__":
    main()
