"""The article's program against the same run as one command: time to the same accuracy.

    examples/article.py train.csv test.csv     -> its accuracy at the end, seconds in all
    hasten train train.csv --preset article    -> seconds until an evaluation is as accurate

Both train the same model (6 layers, width 512, 8 heads, post-norm, ReLU, learned positions, words
as tokens, dropout 0.1) on the same rows for the same epochs, and are judged on the same rows. All
times are wall-clock from the start of the process, imports and preparation of the data included.
hasten measures several times an epoch, which costs it time, so that the moment is known at which
it got there; the highest of several measurements is a little flattered by chance, so its last one
is printed as well. Smaller settings than the article's are for trying the script.

    python benchmarks/article.py [--data FOLDER | --data TRAIN TEST] [--epochs 2] [--output FILE]
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from machine import (
    REPOSITORY,
    SST2,
    Pairs,
    available_threads,
    child_environment,
    choose_pair,
    describe_machine,
    keep,
    missing,
    read_pairs,
    run_watched,
    say,
    skip,
)

PROGRAM = REPOSITORY / "examples" / "article.py"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, nargs="+", default=[SST2], metavar="PATH")
    parser.add_argument("--max-rows", type=int, help="train on this many rows, drawn at random")
    parser.add_argument("--rounds", type=int, default=1, help="runs of each, in turn")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--num-layers", type=int, default=6)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--num-heads", type=int, default=8)
    parser.add_argument("--evaluations", type=int, default=2, help="hasten's, an epoch")
    parser.add_argument("--seed", type=int, default=1, help="of the first round")
    parser.add_argument("--threads", type=int, default=available_threads())
    parser.add_argument("--output", type=Path, help="file to keep the result in")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    train_file, test_file = choose_pair(arguments.data)
    if reason := missing([train_file, test_file]):
        skip("article", reason, arguments.output)
        return
    train = read_pairs(train_file)
    test = read_pairs(test_file, train.columns)
    train = train.sample(arguments.max_rows)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train.write(folder / "train.csv")
        test.write(folder / "test.csv")
        rounds = [run_round(arguments, folder, number) for number in range(arguments.rounds)]
    result = {
        "benchmark": "article",
        "data": {
            "train": train_file.name,
            "test": test_file.name,
            "folder": train_file.parent.name,
        },
        "num_train": len(train.texts),
        "num_test": len(test.texts),
        "majority_accuracy": majority_accuracy(train, test),
        "epochs": arguments.epochs,
        "model": {n: getattr(arguments, n) for n in ("num_layers", "hidden_size", "num_heads")},
        "rounds": rounds,
        "machine": describe_machine(arguments.threads),
    }
    print_table(result)
    keep(result, arguments.output)


def majority_accuracy(train: Pairs, test: Pairs) -> float:
    """Returns the accuracy of always answering the most frequent label."""
    most_frequent = Counter(train.labels).most_common(1)[0][0]
    return test.labels.count(most_frequent) / len(test.labels)


def run_round(arguments: argparse.Namespace, folder: Path, number: int) -> dict[str, Any]:
    seed = arguments.seed + number
    program = run_program(arguments, folder, seed)
    say(f"round {number + 1}, program: {program['accuracy']:.4f} in {program['seconds']:.1f} s")
    command = run_hasten(arguments, folder, seed)
    say(f"round {number + 1}, hasten: {command['accuracy']:.4f} in {command['seconds']:.1f} s")
    # Of the accuracies only four digits are printed by the program.
    wanted = program["accuracy"] - 5e-5
    reached = [e["seconds"] for e in command["evaluations"] if e["accuracy"] >= wanted]
    to_accuracy = reached[0] if reached else None
    return {
        "seed": seed,
        "program": program,
        "hasten": {**command, "seconds_to_accuracy": to_accuracy},
        "ratio": program["seconds"] / to_accuracy if to_accuracy else None,
        "whole_command_ratio": program["seconds"] / command["seconds"],
    }


def run_program(arguments: argparse.Namespace, folder: Path, seed: int) -> dict[str, float]:
    """Runs examples/article.py and reads what it prints."""
    command = [sys.executable, str(PROGRAM), str(folder / "train.csv"), str(folder / "test.csv")]
    for name in ("epochs", "num_layers", "hidden_size", "num_heads"):
        command += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    command += ["--seed", str(seed)]
    environment = child_environment(folder, arguments.threads)
    start = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if done.returncode:
        sys.exit(f"{PROGRAM.name} exited with {done.returncode}:\n{done.stderr[-3000:]}")
    return {
        "seconds": seconds,
        "accuracy": printed(done.stdout, "Accuracy"),
        "loss": printed(done.stdout, "Test Loss"),
    }


def printed(output: str, name: str) -> float:
    """Returns the number after ``name`` at the start of a line."""
    found = re.search(rf"^{name} ([0-9.]+|nan)$", output, flags=re.MULTILINE)
    return float(found.group(1)) if found else sys.exit(f"no line '{name}' in:\n{output[-3000:]}")


def run_hasten(arguments: argparse.Namespace, folder: Path, seed: int) -> dict[str, Any]:
    """Runs the command, noting when each evaluation appears in its metrics.jsonl."""
    own = Path(tempfile.mkdtemp(dir=folder))
    command = [sys.executable, "-m", "hasten", "train", str(folder / "train.csv")]
    command += ["--validation", str(folder / "test.csv"), "--preset", "article"]
    command += ["--epochs", str(arguments.epochs), "--seed", str(seed), "--device", "cpu"]
    command += ["--eval.baseline", "false", "--eval.per_epoch", str(arguments.evaluations)]
    for name in ("num_layers", "hidden_size", "num_heads"):
        command += [f"--model.{name}", str(getattr(arguments, name))]
    environment = child_environment(own, arguments.threads)
    done = run_watched(command, environment, own, lambda entry: None)
    evaluations = [
        {"seconds": entry["command_seconds"], "accuracy": entry["accuracy"]}
        for entry in done.evaluations
    ]
    training = done.result["training"]
    return {
        "seconds": done.seconds,
        "train_seconds": training["seconds"],
        "accuracy": evaluations[-1]["accuracy"],
        "steps": training["steps"],
        "num_parameters": training["num_parameters"],
        "evaluations": evaluations,
    }


def print_table(result: dict[str, Any]) -> None:
    print(
        f"{result['num_train']:,} examples, {result['epochs']} epochs, measured on "
        f"{result['num_test']:,}; the most frequent label alone: {result['majority_accuracy']:.4f}"
    )
    for round_ in result["rounds"]:
        program, hasten = round_["program"], round_["hasten"]
        print(f"seed {round_['seed']}")
        print(f"  program  accuracy {program['accuracy']:.4f}  whole {program['seconds']:8.1f} s")
        print(f"  hasten   accuracy {hasten['accuracy']:.4f}  whole {hasten['seconds']:8.1f} s")
        if hasten["seconds_to_accuracy"] is None:
            print("  hasten did not reach the program's accuracy")
        else:
            print(
                f"  hasten reached the program's accuracy after "
                f"{hasten['seconds_to_accuracy']:.1f} s: {round_['ratio']:.2f} times as fast"
            )
        if program["accuracy"] <= result["majority_accuracy"] + 0.01:
            print("  the program learned nothing, so its accuracy is no mark to be reached")


if __name__ == "__main__":
    main()
