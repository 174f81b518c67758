"""Tiny Shakespeare by characters, in the setting whose validation loss the field publishes.

    input.txt -+- first 90% of the characters -> train.txt -> hasten train -> loss on val.txt
               `- the rest ----------------------------------> val.txt

Model and training are nanoGPT's small setting for a CPU (its README: a validation loss of 1.88
after 2,000 steps): 4 layers, 4 heads, width 128, 64 characters of context, 12 windows a step,
AdamW at 1e-3 with 100 steps of warm-up and a cosine to 1e-4, no dropout, no biases. Norms,
positions and initial weights are hasten's defaults unless ``--settings`` names others.

    python benchmarks/shakespeare.py --seeds 1 2 3 [--output FILE] [--settings --model.qk_norm true]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from machine import (
    TINY_SHAKESPEARE,
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

TARGET_LOSS, PUBLISHED_LOSS = 1.90, 1.88
TRAIN_SHARE = 0.9
CONTEXT, WINDOWS_PER_STEP, NUM_STEPS, WARMUP_STEPS = 64, 12, 2000, 100
LEARNING_RATE, LAST_LEARNING_RATE = 1e-3, 1e-4
SETTINGS = {
    "task": "text-generation",
    "tokenizer": "char",
    "tokenizer.max_length": CONTEXT,
    "model.num_layers": 4,
    "model.num_heads": 4,
    "model.hidden_size": 128,
    "model.feed_forward_size": 512,
    "model.activation": "gelu",
    "model.norm_placement": "pre",
    "model.bias": "false",
    "model.tie_embeddings": "true",
    "model.dropout": 0,
    "model.attention_dropout": 0,
    "model.token_dropout": 0,
    "data.augment": "none",
    "train.tokens_per_step": CONTEXT * WINDOWS_PER_STEP,
    "train.learning_rate": LEARNING_RATE,
    "train.label_smoothing": 0,
    "train.gradient_clip": 1.0,
    "train.ema_decay": 0,
    "optim.optimizer": "adamw",
    "optim.weight_decay": 0.1,
    "optim.betas": "0.9,0.99",
    "optim.schedule": "cosine",
    "optim.warmup_fraction": WARMUP_STEPS / NUM_STEPS,
    "optim.min_factor": LAST_LEARNING_RATE / LEARNING_RATE,
    "eval.patience": 0,
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, default=TINY_SHAKESPEARE, help="the text")
    parser.add_argument("--max-characters", type=int, help="use only the beginning of the text")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=NUM_STEPS)
    parser.add_argument("--threads", type=int, default=available_threads())
    parser.add_argument("--output", type=Path, help="file to keep the result in")
    parser.add_argument(
        "--settings", nargs=argparse.REMAINDER, default=[], help="the rest goes to hasten train"
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if reason := missing([arguments.data]):
        skip("shakespeare", reason, arguments.output)
        return
    text = arguments.data.read_bytes().decode("utf-8")[: arguments.max_characters]
    num_train = int(TRAIN_SHARE * len(text))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "train.txt").write_bytes(text[:num_train].encode("utf-8"))
        (folder / "val.txt").write_bytes(text[num_train:].encode("utf-8"))
        per_epoch = steps_per_epoch(arguments, folder)
        seeds = []
        for seed in arguments.seeds:
            seeds.append(run_seed(arguments, folder, seed, per_epoch))
            say(f"seed {seed}: loss {seeds[-1]['loss']:.4f}, {seeds[-1]['whole_seconds']:.1f} s")
    result = {
        "benchmark": "shakespeare",
        "num_train_characters": num_train,
        "num_validation_characters": len(text) - num_train,
        "steps": arguments.steps,
        "settings": SETTINGS,
        "options": arguments.settings,
        "target_loss": TARGET_LOSS,
        "published_loss": PUBLISHED_LOSS,
        "reached": all(run["loss"] <= TARGET_LOSS for run in seeds),
        "seeds": seeds,
        "medians": medians(seeds),
        "machine": describe_machine(arguments.threads),
    }
    print_table(result)
    keep(result, arguments.output)


def train_command(arguments: argparse.Namespace, folder: Path, epochs: float) -> list[str]:
    """Returns the command without what differs from run to run."""
    command = [sys.executable, "-m", "hasten", "train", str(folder / "train.txt")]
    command += ["--validation", str(folder / "val.txt"), "--epochs", repr(epochs)]
    for key, value in SETTINGS.items():
        command += [f"--{key}", str(value)]
    return [*command, "--device", "cpu", "--json", *arguments.settings]


def steps_per_epoch(arguments: argparse.Namespace, folder: Path) -> int:
    """Asks for the plan of one epoch."""
    own = Path(tempfile.mkdtemp(dir=folder))
    command = [*train_command(arguments, folder, 1.0), "--dry-run"]
    return run_json(command, child_environment(own, arguments.threads)).result["steps"]


def run_seed(
    arguments: argparse.Namespace, folder: Path, seed: int, per_epoch: int
) -> dict[str, Any]:
    """Runs the command once, with nothing prepared beforehand."""
    own = Path(tempfile.mkdtemp(dir=folder))
    command = train_command(arguments, folder, arguments.steps / per_epoch)
    command += ["--seed", str(seed), "--output", str(own / "run")]
    done = run_json(command, child_environment(own, arguments.threads))
    validation, training = done.result["validation"], done.result["training"]
    if training["steps"] != arguments.steps:
        sys.exit(f"{training['steps']} steps were taken, not {arguments.steps}")
    return {
        "seed": seed,
        "loss": validation["loss"],
        "bits_per_byte": validation["bits_per_byte"],
        "perplexity": validation["perplexity"],
        "whole_seconds": done.seconds,
        "train_seconds": training["seconds"],
        "epochs": training["epochs"],
        "steps": training["steps"],
        "best_step": training["best_step"],
        "num_parameters": training["num_parameters"],
        "num_validation_tokens": validation["num_tokens"],
        "tokens_per_second": training["tokens_per_second"],
    }


def print_table(result: dict[str, Any]) -> None:
    columns = ("loss", "bits/byte", "perplexity", "command s", "training s")
    print(f"validation after {result['steps']:,} steps")
    print(f"{'':8}" + "".join(f"{column:>12}" for column in columns))
    runs = {f"seed {run['seed']}": run for run in result["seeds"]}
    for name, run in {**runs, "median": result["medians"]}.items():
        print(
            f"{name:8}{run['loss']:12.4f}{run['bits_per_byte']:12.4f}{run['perplexity']:12.3f}"
            f"{run['whole_seconds']:12.1f}{run['train_seconds']:12.1f}"
        )
    verdict = "reached by every seed" if result["reached"] else "not reached by every seed"
    print(f"at most {TARGET_LOSS:.2f}: {verdict} (published: {PUBLISHED_LOSS:.2f})")


if __name__ == "__main__":
    main()
