"""What `hasten train` reaches on CMRC 2018, extractive question answering in Chinese.

    dev.json --by a hash of each document's title--> train, validation and test (a tenth each)
    for each seed: hasten train train.json --validation ... --test ... --seed N
                   -> exact match, F1, whole-command seconds, first-sentence baseline -> medians

All questions of a document are in the same part, so that no context of the test was seen. The
scores are those of the data's own script: characters count, not words. Training from scratch on
2,600 questions is no match for a pretrained encoder; the baseline answers every question with
the first sentence of its context. hasten's defaults are used; what follows `--` goes to it too.

With --model it begins with a pretrained encoder; with --redrawn too, with one of the same kind and
tokenizer whose weights are drawn anew, to see what pretraining is worth.

    python benchmarks/cmrc.py --seeds 1 2 3 [--model FOLDER [--redrawn]] [-- --epochs 2]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from machine import (
    REPOSITORY,
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

CMRC = REPOSITORY.parent / "shared" / "data" / "cmrc2018" / "dev.json"
BASELINE = "first_sentence"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, default=CMRC, help="a file in the layout of SQuAD")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--model", type=Path, help="folder of a pretrained encoder")
    parser.add_argument("--redrawn", action="store_true", help="with its weights drawn anew")
    parser.add_argument("--threads", type=int, default=available_threads())
    parser.add_argument("--output", type=Path, help="file to keep the result in")
    own, rest = sys.argv[1:], []
    if "--" in own:
        own, rest = own[: own.index("--")], own[own.index("--") + 1 :]
    arguments = parser.parse_args(own)
    if arguments.redrawn and arguments.model is None:
        parser.error("--redrawn needs --model")
    arguments.rest = rest
    return arguments


def main() -> None:
    arguments = parse_arguments()
    if reason := missing([arguments.data]):
        skip("cmrc", reason, arguments.output)
        return
    parts = split_documents(json.loads(arguments.data.read_text(encoding="utf-8")))
    seeds = []
    for seed in arguments.seeds:
        seeds.append(run_seed(arguments, parts, seed))
        say(describe(seeds[-1]))
    result = {
        "benchmark": "cmrc",
        "data": arguments.data.name,
        "num_questions": {name: count_questions(part) for name, part in parts.items()},
        "options": arguments.rest,
        "begins_with": None if arguments.model is None else arguments.model.absolute().parent.name,
        "redrawn": arguments.redrawn,
        "seeds": seeds,
        "medians": medians(seeds),
        "machine": describe_machine(arguments.threads),
    }
    print_table(result)
    keep(result, arguments.output)


def split_documents(document: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Returns the articles of each part; those of one title stay together."""
    parts: dict[str, list[dict[str, Any]]] = {"train": [], "validation": [], "test": []}
    for number, article in enumerate(document["data"]):
        name = str(article.get("title", number))
        tenth = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10
        parts[{0: "test", 1: "validation"}.get(tenth, "train")].append(article)
    return parts


def count_questions(articles: list[dict[str, Any]]) -> int:
    return sum(len(p["qas"]) for article in articles for p in article["paragraphs"])


def run_seed(
    arguments: argparse.Namespace, parts: dict[str, list[dict[str, Any]]], seed: int
) -> dict[str, Any]:
    """Runs the command once, with nothing prepared beforehand."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = {part: str(folder / f"{part}.json") for part in parts}
        for part, articles in parts.items():
            content = json.dumps({"data": articles}, ensure_ascii=False)
            Path(files[part]).write_text(content, encoding="utf-8")
        command = [sys.executable, "-m", "hasten", "train", files["train"]]
        command += ["--validation", files["validation"], "--test", files["test"]]
        command += ["--seed", str(seed), "--output", f"{name}/run", "--json"]
        if arguments.model is not None:
            model = folder / "model"
            shutil.copytree(arguments.model, model)
            if arguments.redrawn:
                redraw(model, seed)
            command += ["--model", str(model)]
        environment = child_environment(folder, arguments.threads)
        done = run_json([*command, *arguments.rest], environment)
    found, training = done.result, done.result["training"]
    baseline = found["baselines"][BASELINE]
    return {
        "seed": seed,
        "exact_match": found["test"]["exact_match"],
        "f1": found["test"]["f1"],
        "validation_f1": found["validation"]["f1"],
        "whole_seconds": done.seconds,
        "train_seconds": training["seconds"],
        "epochs": training["epochs"],
        "steps": training["steps"],
        "num_parameters": training["num_parameters"],
        "tokens_per_second": training["tokens_per_second"],
        "baseline_exact_match": baseline["exact_match"],
        "baseline_f1": baseline["f1"],
    }


def redraw(folder: Path, seed: int) -> None:
    """Writes weights drawn at random, as transformers draws them, over those of a model."""
    import torch
    import transformers

    torch.manual_seed(seed)
    config = transformers.AutoConfig.from_pretrained(folder)
    transformers.AutoModel.from_config(config).save_pretrained(folder)


def describe(run: dict[str, Any]) -> str:
    return (
        f"seed {run['seed']}: exact match {run['exact_match']:.4f}, F1 {run['f1']:.4f} "
        f"(validation {run['validation_f1']:.4f}), {run['whole_seconds']:.1f} s"
    )


def print_table(result: dict[str, Any]) -> None:
    print(f"{result['data']}, judged on {result['num_questions']['test']} questions")
    print(f"{'':15} {'exact match':>11} {'F1':>7} {'command s':>10} {'training s':>11}")
    runs = {f"seed {run['seed']}": run for run in result["seeds"]}
    for name, run in {**runs, "median": result["medians"]}.items():
        print(
            f"{name:15} {run['exact_match']:11.4f} {run['f1']:7.4f} "
            f"{run['whole_seconds']:10.1f} {run['train_seconds']:11.1f}"
        )
    simple = result["medians"]
    print(
        f"{'first sentence':15} {simple['baseline_exact_match']:11.4f} {simple['baseline_f1']:7.4f}"
    )


if __name__ == "__main__":
    main()
