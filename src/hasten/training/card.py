"""The model card: what a model is for, how good it is, where it came from, how to load it.

run folder (result.json, data.json, config.yaml) --write_card--> README.md
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from hasten import __version__
from hasten.config.schema import RunConfig
from hasten.model.config import TransformerConfig
from hasten.training.pretrained import HUB_ID

_METRICS = {  # as the hub calls them, in the order in which they are shown
    "accuracy": "accuracy",
    "macro_f1": "f1",
    "exact_match": "exact_match",
    "f1": "f1",
    "bleu": "bleu",
    "chrf": "chrf",
    "perplexity": "perplexity",
    "bits_per_byte": "bits_per_byte",
    "loss": "loss",
}
_LOADERS = {
    "text-classification": "AutoModelForSequenceClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "text-generation": "AutoModelForCausalLM",
    "translation": "AutoModelForSeq2SeqLM",
}
_TRAINING = ("optimizer", "learning_rate", "epochs", "tokens_per_step", "seed")


def model_card(
    name: str,
    config: RunConfig,
    architecture: TransformerConfig,
    result: Mapping[str, Any],
    data: Mapping[str, Any],
) -> str:
    """Returns README.md.

    Args:
        name: of the model.
        config: of its run.
        architecture: of the model.
        result: result.json of the run; may be empty.
        data: data.json of the run.
    """
    task = str(config.task)
    split = str(result.get("judged_on", "test"))
    metrics = _measured(result.get(split, {}))
    base = config.model.pretrained
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": task}
    front["tags"] = ["hasten"]
    if base is not None and HUB_ID.fullmatch(base):
        front["base_model"] = base
    if metrics:
        front["metrics"] = list(dict.fromkeys(_METRICS[key] for key in metrics))
        front["model-index"] = [{"name": name, "results": [_result(task, split, metrics)]}]
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n",
        f"# {name}\n",
        *_task_lines(task, architecture, data),
        "## How good it is\n",
        *_metric_lines(split, metrics, result),
        "## Data\n",
        *_data_lines(data),
        "## How it was trained\n",
        *_training_lines(config, architecture, result),
        "## How to load it\n",
        _loading(task),
        "## Limits\n",
        *_limits(architecture, split, data),
    ]
    return "\n".join(parts)


def _measured(metrics: Mapping[str, Any]) -> dict[str, float]:
    found = {key: metrics.get(key) for key in _METRICS}
    return {
        key: float(value)
        for key, value in found.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }


def _result(task: str, split: str, metrics: Mapping[str, float]) -> dict[str, Any]:
    return {
        "task": {"type": task},
        "dataset": {"name": "own data", "type": "own", "split": split},
        "metrics": [
            {"type": _METRICS[key], "name": key, "value": round(value, 6)}
            for key, value in metrics.items()
        ],
    }


def _task_lines(
    task: str, architecture: TransformerConfig, data: Mapping[str, Any]
) -> Iterator[str]:
    kind = architecture.architecture.replace("_", "-")
    columns = ", ".join(f"`{name}`" for name in data.get("columns", ()))
    yield f"A Transformer ({kind}) for {task}" + (f", from {columns}." if columns else ".")
    labels = data.get("id2label")
    if labels:
        shown = [labels[str(i)] for i in range(len(labels))]
        more = f" and {len(shown) - 30} more" if len(shown) > 30 else ""
        yield "Labels: " + ", ".join(f"`{label}`" for label in shown[:30]) + f"{more}."
    yield ""


def _metric_lines(
    split: str, metrics: Mapping[str, float], result: Mapping[str, Any]
) -> Iterator[str]:
    if not metrics:
        yield "It was not measured.\n"
        return
    baselines: Mapping[str, Mapping[str, Any]] = result.get("baselines", {})
    yield f"| on {split} | " + " | ".join(metrics) + " |"
    yield "|---" * (len(metrics) + 1) + "|"
    for name, values in {"this model": metrics, **baselines}.items():
        cells = [_number(values.get(key)) for key in metrics]
        yield f"| {name.replace('_', ' ')} | " + " | ".join(cells) + " |"
    number = result.get(split, {}).get("num_examples")
    yield ""
    if number is not None:
        yield f"{number:,} examples. Fractions are 0 to 1, BLEU and chrF 0 to 100.\n"


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else "-"


def _data_lines(data: Mapping[str, Any]) -> Iterator[str]:
    for name, number in data.get("num_examples", {}).items():
        yield f"- {name}: {number:,} examples, {data['num_tokens'][name]:,} tokens"
    for entry in data.get("files", ()):
        file = str(entry["path"]).rpartition("/")[2]
        yield f"- {entry['split']} file `{file}`, SHA-256 `{entry['sha256']}`"
    yield ""


def _training_lines(
    config: RunConfig, architecture: TransformerConfig, result: Mapping[str, Any]
) -> Iterator[str]:
    base = config.model.pretrained
    told: Mapping[str, Any] = result.get("training", {})
    begun = "weights drawn at random"
    if base is not None:  # of a folder the name alone: where it lies says nothing to others
        begun = f"the weights of `{base if HUB_ID.fullmatch(base) else Path(base).name}`"
    if config.finetune.adapter != "none":
        begun += f", through adapters ({config.finetune.adapter}, rank {config.finetune.rank})"
        begun += " that are merged"
    yield f"With hasten {__version__}, beginning with {begun}."
    size = f"{architecture.num_layers} layers of width {architecture.hidden_size}"
    if "num_parameters" in told:
        size += f", {told['num_parameters']:,} parameters"
    yield f"- {size}, at most {architecture.max_positions:,} tokens"
    values = {**config.optim.model_dump(), **config.train.model_dump()}
    settings = ", ".join(f"{key} {values[key]}" for key in _TRAINING if values.get(key) is not None)
    yield f"- {settings}"
    if "steps" in told:
        yield f"- {told['steps']:,} steps, {told['num_tokens']:,} tokens, {told['seconds']:.0f} s"
    yield ""


def _loading(task: str) -> str:
    name = _LOADERS.get(task, "AutoModel")
    lines = (
        f"from transformers import AutoTokenizer, {name}",
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
        f'model = {name}.from_pretrained("FOLDER")',
    )
    return "```python\n" + "\n".join(lines) + "\n```\n"


def _limits(architecture: TransformerConfig, split: str, data: Mapping[str, Any]) -> Iterator[str]:
    yield f"- It takes at most {architecture.max_positions:,} tokens; what is longer has to be cut."
    if architecture.source_vocab_size:
        yield (
            "- Source and target have a vocabulary each: AutoTokenizer loads that of the source "
            "alone, `tokenizer.json`; outputs are decoded with `target_tokenizer.json`."
        )
    yield "- What it was not trained on, in language, subject or style, it was not measured on."
    if split != "test":
        yield (
            f"- The figures are of {split}, by which the model was chosen, and may flatter it; "
            "no test data was given."
        )
    rows: Mapping[str, Any] = data.get("rows", {})
    rejected = sum(int(entry.get("rejected", 0)) for entry in rows.values())
    if rejected:
        yield f"- {rejected:,} rows of the data could not be used."
