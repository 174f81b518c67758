"""English to German on Multi30k: what `hasten train` reaches from scratch, and in what time.

    train.en, train.de -> hasten train -> test BLEU and chrF, seconds of the whole command
                              `- metrics.jsonl -> seconds until validation BLEU was 30, and 35
    the same files     -> multi30k_peer.py (--peer): Seq2SeqTrainer, untuned -> test BLEU and chrF

hasten gets the files and nothing else but what follows ``--settings``. Its settings are chosen on
the validation files; the test files are read once a run. During training a sample of the validation
pairs is decoded greedily (``--eval.decode_examples``), at the end all of validation and test with
hasten's default for translation. All seconds are wall-clock from the start of the command.

    python benchmarks/multi30k.py [--seeds 1] [--peer] [--output FILE] [--settings --epochs 20]
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from machine import (
    MULTI30K,
    available_threads,
    child_environment,
    describe_machine,
    keep,
    medians,
    missing,
    run_json,
    run_watched,
    say,
    skip,
)

MARKS = (30, 35)
SPLITS = ("train", "val", "test_2016_flickr")
SIDES = ("en", "de")
PEER = Path(__file__).with_name("multi30k_peer.py")
EVALUATION_KEYS = ("command_seconds", "train_seconds", "step", "loss", "bleu", "num_decoded")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, default=MULTI30K, help="folder with the six files")
    parser.add_argument("--max-pairs", type=int, help="use only the first pairs of each file")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--peer", action="store_true", help="run Seq2SeqTrainer too, one seed")
    parser.add_argument("--peer-only", action="store_true", help="run only Seq2SeqTrainer")
    parser.add_argument(
        "--peer-minutes", type=float, default=55, help="as many epochs as fit into so much training"
    )
    parser.add_argument("--peer-epochs", type=int, help="so many epochs instead")
    parser.add_argument("--threads", type=int, default=available_threads())
    parser.add_argument("--output", type=Path, help="file to keep the result in")
    parser.add_argument(
        "--settings", nargs=argparse.REMAINDER, default=[], help="the rest goes to hasten train"
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    files = [arguments.data / f"{split}.{side}" for split in SPLITS for side in SIDES]
    if reason := missing(files):
        skip("multi30k", reason, arguments.output)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = arguments.data if arguments.max_pairs is None else folder
        if arguments.max_pairs is not None:
            write_beginnings(files, arguments.max_pairs, folder)
        seeds = [] if arguments.peer_only else arguments.seeds
        runs = [run_seed(arguments, data, folder, seed) for seed in seeds]
        with_peer = arguments.peer or arguments.peer_only
        peer = run_peer(arguments, data, folder) if with_peer else None
    result = {
        "benchmark": "multi30k",
        "max_pairs": arguments.max_pairs,
        "options": arguments.settings,
        "seeds": runs,
        "medians": medians([run["figures"] for run in runs]) if runs else None,
        "peer": peer,
        "machine": describe_machine(arguments.threads),
    }
    print_table(result)
    keep(result, arguments.output)


def write_beginnings(files: Sequence[Path], num_lines: int, folder: Path) -> None:
    """Copies the first lines of each file."""
    for path in files:
        with path.open("rb") as file:
            (folder / path.name).write_bytes(b"".join(itertools.islice(file, num_lines)))


def run_seed(arguments: argparse.Namespace, data: Path, folder: Path, seed: int) -> dict[str, Any]:
    """Runs the command once, with nothing prepared beforehand."""
    own = Path(tempfile.mkdtemp(dir=folder))
    command = [sys.executable, "-m", "hasten", "train"]
    for flag, split in zip(("", "validation-", "test-"), SPLITS, strict=True):
        command += [f"--{flag}source", str(data / f"{split}.en")]
        command += [f"--{flag}target", str(data / f"{split}.de")]
    command += ["--seed", str(seed), *arguments.settings]
    done = run_watched(command, child_environment(own, arguments.threads), own, show_evaluation)
    test, training = done.result["test"], done.result["training"]
    reached = {f"seconds_to_{mark}": seconds_to(done.evaluations, mark) for mark in MARKS}
    figures = {
        "seed": seed,
        "test_bleu": test["bleu"],
        "test_chrf": test["chrf"],
        "validation_bleu": done.result["validation"]["bleu"],
        "validation_loss": done.result["validation"]["loss"],
        "whole_seconds": done.seconds,
        "train_seconds": training["seconds"],
        **reached,
        "epochs": training["epochs"],
        "steps": training["steps"],
        "best_step": training["best_step"],
        "num_parameters": training["num_parameters"],
        "num_truncated": training["num_truncated"],
        "tokens_per_second": training["tokens_per_second"],
    }
    say(f"seed {seed}: test BLEU {test['bleu']:.2f}, {done.seconds:.1f} s")
    return {
        "figures": figures,
        "bleu_signature": test["bleu_signature"],
        "chrf_signature": test["chrf_signature"],
        "num_test": test["num_decoded"],
        "evaluations": [{k: entry.get(k) for k in EVALUATION_KEYS} for entry in done.evaluations],
        "samples": test["samples"],
    }


def show_evaluation(entry: dict[str, Any]) -> None:
    say(
        f"  {entry['command_seconds']:7.1f} s, step {entry['step']}: loss {entry['loss']:.4f}, "
        f"BLEU {entry.get('bleu', float('nan')):.2f} of {entry.get('num_decoded', 0)}"
    )


def seconds_to(evaluations: Sequence[dict[str, Any]], mark: float) -> float | None:
    """Returns when the first evaluation with so much BLEU was there; None if none had it."""
    seconds = (e["command_seconds"] for e in evaluations if e.get("bleu", 0.0) >= mark)
    return next(seconds, None)


def run_peer(arguments: argparse.Namespace, data: Path, folder: Path) -> dict[str, Any]:
    """Runs multi30k_peer.py in a process of its own."""
    own = Path(tempfile.mkdtemp(dir=folder))
    command = [sys.executable, str(PEER), str(data), "--seed", str(arguments.seeds[0])]
    if arguments.peer_epochs is None:
        command += ["--minutes", str(arguments.peer_minutes)]
        say(f"Seq2SeqTrainer: up to {arguments.peer_minutes:g} minutes of training")
    else:
        command += ["--epochs", str(arguments.peer_epochs)]
    done = run_json(command, child_environment(own, arguments.threads))
    # Its pace is only measured so that the epochs can be chosen.
    return {**done.result, "whole_seconds": done.seconds - done.result["probe_seconds"]}


def print_table(result: dict[str, Any]) -> None:
    marks = "".join(f"{f'to {mark} BLEU':>12}" for mark in MARKS)
    columns = ("BLEU", "chrF", "command s", "training s")
    print("test BLEU and chrF, wall-clock seconds")
    print(f"{'':14}" + "".join(f"{column:>12}" for column in columns) + marks)
    rows = {f"seed {run['figures']['seed']}": run["figures"] for run in result["seeds"]}
    if len(rows) > 1:
        rows["median"] = result["medians"]
    if result["peer"]:
        rows["Seq2SeqTrainer"] = result["peer"]
    for name, row in rows.items():
        reached = (row.get(f"seconds_to_{mark}") for mark in MARKS)
        print(
            f"{name:14}{row['test_bleu']:12.2f}{row['test_chrf']:12.2f}{row['whole_seconds']:12.1f}"
            f"{row['train_seconds']:12.1f}"
            + "".join(f"{'-':>12}" if s is None else f"{s:12.1f}" for s in reached)
        )
    signatures = {run["bleu_signature"] for run in result["seeds"]}
    signatures |= {result["peer"]["bleu_signature"]} if result["peer"] else set()
    print(f"BLEU: {', '.join(sorted(signatures))}")


if __name__ == "__main__":
    main()
