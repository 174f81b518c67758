"""The same model on the same data, trained by transformers.Trainer and by hasten.

    train.csv -> one tokenizer.json -+-> child: Trainer, batch 8  --+
                                     +-> child: Trainer, batch 32 --+-> examples/s, accuracy, ratio
                                     +-> child: hasten train -------+
                                         (in turn, several rounds)

The model is a BERT: post-norm LayerNorm with biases, GELU, learned positions, dropout 0.1 (on
attention too), pooled by its first token [CLS]. Only BERT's pooler, one more matrix and a tanh
between the first token and the classifier, has no counterpart in hasten. Both see [CLS] and the
text's tokens, train for the same epochs with AdamW, a warm-up over a tenth of the steps and linear
decay to zero, measure once at the end and save no checkpoint for Trainer. Trainer otherwise keeps
its defaults (with dynamic padding), hasten too. Learning rates are set for each: Trainer's default
of 5e-5 is meant for fine-tuning and learns nothing from scratch.

    python benchmarks/compare_trainer.py [--data FOLDER | --data TRAIN TEST] [--output FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from machine import (
    SST2,
    Finished,
    available_threads,
    child_environment,
    choose_pair,
    describe_machine,
    keep,
    medians,
    missing,
    read_pairs,
    run_json,
    say,
    skip,
)

MAX_LENGTH = 512
DROPOUT = 0.1
WARMUP_FRACTION = 0.1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, nargs="+", default=[SST2], metavar="PATH")
    parser.add_argument("--max-rows", type=int, help="train on this many rows, drawn at random")
    parser.add_argument("--rounds", type=int, default=2, help="each arm's runs, in turn")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--num-heads", type=int, default=4)
    parser.add_argument("--feed-forward-size", type=int, default=1024)
    parser.add_argument("--vocab-size", type=int, default=8000)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 32], help="Trainer's")
    parser.add_argument(
        "--trainer-learning-rates", type=float, nargs="+", default=[3e-4, 6e-4],
        help="one for each of --batch-sizes",
    )  # fmt: skip
    parser.add_argument("--hasten-learning-rate", default="auto", help="auto: hasten's default")
    parser.add_argument("--hasten-tokens-per-step", default="auto", help="auto: hasten's default")
    parser.add_argument("--seed", type=int, default=1, help="of the first round")
    parser.add_argument("--threads", type=int, default=available_threads())
    parser.add_argument("--output", type=Path, help="file to keep the result in")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if len(arguments.batch_sizes) != len(arguments.trainer_learning_rates):
        parser.error("--trainer-learning-rates: give one for each of --batch-sizes")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    if arguments.child:
        print(json.dumps(train_with_trainer(**json.loads(arguments.child))))
        return
    train_file, test_file = choose_pair(arguments.data)
    if reason := missing([train_file, test_file]):
        skip("compare_trainer", reason, arguments.output)
        return
    with tempfile.TemporaryDirectory() as name:
        result = compare(arguments, train_file, test_file, Path(name))
    print_table(result)
    keep(result, arguments.output)


def compare(
    arguments: argparse.Namespace, train_file: Path, test_file: Path, folder: Path
) -> dict[str, Any]:
    """Runs all arms in turn and returns every figure, the medians and the ratios."""
    train = read_pairs(train_file)
    test = read_pairs(test_file, train.columns)
    train = train.sample(arguments.max_rows)
    train.write(folder / "train.csv")
    test.write(folder / "test.csv")
    vocab_size = write_tokenizer(train.texts, arguments.vocab_size, folder / "tokenizer.json")
    arms = [
        (f"Trainer, batch {size}", {"batch_size": size, "learning_rate": rate})
        for size, rate in zip(arguments.batch_sizes, arguments.trainer_learning_rates, strict=True)
    ]
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name, _ in arms} | {"hasten": []}
    for number in range(arguments.rounds):
        seed = arguments.seed + number
        for name, settings in [*arms, ("hasten", None)]:
            own = Path(tempfile.mkdtemp(dir=folder))
            if settings is None:
                figures = run_hasten(arguments, folder, own, seed)
            else:
                figures = run_trainer(arguments, folder, own, {**settings, "seed": seed})
            examples = arguments.epochs * len(train.texts)
            figures["examples_per_second"] = examples / figures["train_seconds"]
            rounds[name].append(figures)
            say(f"round {number + 1}, {name}: {describe(figures)}")
    middle = {name: medians(figures) for name, figures in rounds.items()}
    ours, theirs = middle["hasten"], [middle[name] for name, _ in arms]
    return {
        "benchmark": "compare_trainer",
        "data": {
            "train": train_file.name,
            "test": test_file.name,
            "folder": train_file.parent.name,
        },
        "num_train": len(train.texts),
        "num_test": len(test.texts),
        "epochs": arguments.epochs,
        "model": {**model_sizes(arguments), "vocab_size": vocab_size, "pooling": "first token"},
        "learning_rates": {
            **{name: settings["learning_rate"] for name, settings in arms},
            "hasten": arguments.hasten_learning_rate,
        },
        "rounds": rounds,
        "medians": middle,
        "ratio": ours["examples_per_second"] / max(arm["examples_per_second"] for arm in theirs),
        "whole_command_ratio": min(arm["whole_seconds"] for arm in theirs) / ours["whole_seconds"],
        "machine": describe_machine(arguments.threads),
    }


def write_tokenizer(texts: Sequence[str], vocab_size: int, path: Path) -> int:
    """Trains the tokenizer of all arms, one that begins each text with [CLS]; returns its size."""
    from tokenizers.processors import TemplateProcessing

    from hasten.data.tokenizer import CLASS, train_tokenizer

    tokenizer = train_tokenizer(texts, vocab_size=vocab_size)
    # hasten puts the class token first by itself where the model pools it.
    tokenizer.post_processor = TemplateProcessing(
        single=f"{CLASS} $A", special_tokens=[(CLASS, tokenizer.token_to_id(CLASS))]
    )
    tokenizer.save(str(path))
    return tokenizer.get_vocab_size()


def model_sizes(arguments: argparse.Namespace) -> dict[str, int]:
    return {
        name: getattr(arguments, name)
        for name in ("num_layers", "hidden_size", "num_heads", "feed_forward_size")
    }


def run_hasten(
    arguments: argparse.Namespace, folder: Path, own: Path, seed: int
) -> dict[str, float]:
    """Runs ``hasten train`` as a person would, without validation rows and without baseline."""
    settings = {
        **{f"model.{name}": size for name, size in model_sizes(arguments).items()},
        "model.activation": "gelu",
        "model.norm": "layernorm",
        "model.norm_placement": "post",
        "model.positions": "learned",
        "model.bias": "true",
        "model.dropout": DROPOUT,
        "model.attention_dropout": DROPOUT,
        "model.head_dropout": DROPOUT,
        "model.token_dropout": 0,
        "model.zero_init_residual": "false",
        "model.pooling": "first",
        "tokenizer.max_length": MAX_LENGTH,
        "data.augment": "none",
        "train.ema_decay": 0,
        "data.validation_fraction": 0,
        "eval.baseline": "false",
        "optim.warmup_fraction": WARMUP_FRACTION,
        "train.learning_rate": arguments.hasten_learning_rate,
        "train.tokens_per_step": arguments.hasten_tokens_per_step,
    }
    command = [sys.executable, "-m", "hasten", "train", str(folder / "train.csv")]
    command += ["--test", str(folder / "test.csv"), "--tokenizer", str(folder / "tokenizer.json")]
    command += ["--epochs", str(arguments.epochs), "--seed", str(seed)]
    command += ["--device", "cpu", "--output", str(own / "run"), "--json"]
    for key, value in settings.items():
        command += [f"--{key}", str(value)]
    done = run_json(command, child_environment(own, arguments.threads))
    training = done.result["training"]
    return {
        "train_seconds": training["seconds"],
        "whole_seconds": done.seconds,
        "accuracy": done.result["test"]["accuracy"],
        "loss": done.result["test"]["loss"],
        "steps": training["steps"],
        "num_parameters": training["num_parameters"],
    }


def run_trainer(
    arguments: argparse.Namespace, folder: Path, own: Path, settings: dict[str, Any]
) -> dict[str, float]:
    """Runs ``train_with_trainer`` in a process of its own."""
    order = {
        **settings,
        "folder": str(folder),
        "output": str(own),
        "epochs": arguments.epochs,
        "threads": arguments.threads,
        "sizes": model_sizes(arguments),
    }
    command = [sys.executable, __file__, "--child", json.dumps(order)]
    done: Finished = run_json(command, child_environment(own, arguments.threads))
    return {**done.result, "whole_seconds": done.seconds}


def train_with_trainer(
    *,
    folder: str,
    output: str,
    sizes: dict[str, int],
    batch_size: int,
    learning_rate: float,
    epochs: int,
    seed: int,
    threads: int,
) -> dict[str, float]:
    """What the child does: the documented way to train a classifier with Trainer."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(threads)
    transformers.set_seed(seed)  # also draws the weights; Trainer's seed comes after the model
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(Path(folder) / "tokenizer.json"),
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=MAX_LENGTH,
    )
    columns = (("text",), "label")
    train, test = (read_pairs(Path(folder) / f"{name}.csv", columns) for name in ("train", "test"))
    labels = {label: number for number, label in enumerate(sorted(set(train.labels)))}
    model = transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=len(tokenizer),
            num_hidden_layers=sizes["num_layers"],
            hidden_size=sizes["hidden_size"],
            num_attention_heads=sizes["num_heads"],
            intermediate_size=sizes["feed_forward_size"],
            hidden_act="gelu",
            hidden_dropout_prob=DROPOUT,
            attention_probs_dropout_prob=DROPOUT,
            max_position_embeddings=MAX_LENGTH,
            type_vocab_size=1,
            layer_norm_eps=1e-5,
            num_labels=len(labels),
        )
    )
    steps = epochs * -(-len(train.texts) // batch_size)
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=output,
            num_train_epochs=epochs,
            per_device_train_batch_size=batch_size,
            per_device_eval_batch_size=32,
            learning_rate=learning_rate,
            warmup_steps=round(WARMUP_FRACTION * steps),
            save_strategy="no",
            eval_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
            seed=seed,
        ),
        train_dataset=encode(tokenizer, train.texts, [labels[name] for name in train.labels]),
        eval_dataset=encode(tokenizer, test.texts, [labels[name] for name in test.labels]),
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda found: {
            "accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())
        },
    )
    start = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):  # Trainer prints its log
        trainer.train()
        train_seconds = time.perf_counter() - start
        metrics = trainer.evaluate()
    return {
        "train_seconds": train_seconds,
        "accuracy": metrics["eval_accuracy"],
        "loss": metrics["eval_loss"],
        "steps": steps,
        "num_parameters": sum(p.numel() for p in model.parameters()),
    }


def encode(tokenizer: Any, texts: list[str], labels: list[int]) -> list[dict[str, Any]]:
    """Returns examples as Trainer takes them; the collator pads them batch by batch."""
    encoded = tokenizer(texts, truncation=True)
    keys = encoded.keys()
    return [
        {**{key: encoded[key][i] for key in keys}, "labels": label}
        for i, label in enumerate(labels)
    ]


def describe(figures: dict[str, float]) -> str:
    return (
        f"{figures['examples_per_second']:,.0f} examples/s, "
        f"training {figures['train_seconds']:.1f} s, "
        f"whole command {figures['whole_seconds']:.1f} s, accuracy {figures['accuracy']:.4f}"
    )


def print_table(result: dict[str, Any]) -> None:
    print(
        f"{result['num_train']:,} examples, {result['epochs']} epochs, "
        f"measured on {result['num_test']:,}; medians of {len(result['rounds']['hasten'])} rounds"
    )
    print(f"{'':20} {'examples/s':>10} {'training s':>10} {'command s':>10} {'accuracy':>9}")
    for name, figures in result["medians"].items():
        print(
            f"{name:20} {figures['examples_per_second']:10.1f} {figures['train_seconds']:10.1f} "
            f"{figures['whole_seconds']:10.1f} {figures['accuracy']:9.4f}"
        )
    print(f"hasten trains {result['ratio']:.2f} times as fast as the faster Trainer")
    print(f"and its whole command takes {1 / result['whole_command_ratio']:.2f} of the time")


if __name__ == "__main__":
    main()
