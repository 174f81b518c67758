"""Results as text for people: the verdict of a run, metrics, predictions."""

from __future__ import annotations

import shlex
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hasten.cli.console import count, duration

_MAX_CLASSES = 30


def metrics_text(name: str, metrics: Mapping[str, Any]) -> str:
    """Returns a split's metrics: one line, then what else the task has to say."""
    values = [_FORMATS[key](metrics) for key in _FORMATS if metrics.get(key) is not None]
    lines = [f"{name}: {'  '.join(values)}"]
    lines += [f"  {metrics[key]}" for key in _SIGNATURES if key in metrics]
    if "per_class" in metrics:
        lines += _class_table(metrics["per_class"])
    lines += [f"  {line}" for sample in metrics.get("samples", ()) for line in sample.split("\n")]
    return "\n".join(lines)


def _accuracy(metrics: Mapping[str, Any]) -> str:
    text = f"accuracy {metrics['accuracy']:.4f}"
    if "accuracy_interval" not in metrics:
        return text
    low, high = metrics["accuracy_interval"]
    return f"{text} (95% interval {low:.4f} to {high:.4f})"


_SIGNATURES = ("bleu_signature", "chrf_signature")
_FORMATS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "bleu": lambda m: f"BLEU {m['bleu']:.2f}",
    "chrf": lambda m: f"chrF {m['chrf']:.2f}",
    "exact_match": lambda m: f"exact match {m['exact_match']:.4f}",
    "f1": lambda m: f"F1 {m['f1']:.4f}",
    "token_error_rate": lambda m: f"token error rate {m['token_error_rate']:.4f}",
    "accuracy": _accuracy,
    "macro_f1": lambda m: f"macro F1 {m['macro_f1']:.4f}",
    "loss": lambda m: f"loss {m['loss']:.4f}",
    "perplexity": lambda m: f"perplexity {m['perplexity']:.2f}",
    "bits_per_byte": lambda m: f"{m['bits_per_byte']:.4f} bits per byte",
    "num_examples": lambda m: count(m["num_examples"], "example"),
}


def _class_table(rows: list[dict[str, Any]]) -> list[str]:
    width = max(5, *(_columns(row["label"]) for row in rows[:_MAX_CLASSES]))
    lines = [f"  {'class':<{width}}  precision  recall      F1  examples"]
    lines += [
        f"  {row['label']}{' ' * (width - _columns(row['label']))}  {row['precision']:9.3f}  "
        f"{row['recall']:6.3f}  {row['f1']:6.3f}  {row['num_examples']:8,}"
        for row in rows[:_MAX_CLASSES]
    ]
    if len(rows) > _MAX_CLASSES:
        lines.append(f"  ... and {len(rows) - _MAX_CLASSES} more; --json lists all")
    return lines


def _columns(text: str) -> int:
    """Returns how wide a text is on a terminal, where Chinese takes two columns a character."""
    return sum(
        0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF")
        for c in text
    )


def verdict_text(result: Mapping[str, Any]) -> str:
    """Returns the end of a run: metrics, who won, what it took, and what to do next."""
    parts = [metrics_text(name, result[name]) for name in ("validation", "test") if name in result]
    if result["judged_on"] not in result:
        parts.append("no rows were left to measure the model on: give --validation or --test")
    elif result.get("baselines"):
        parts.append(_comparison(result))
    facts = result["training"]
    early = ", stopped early" if facts["stopped_early"] else ""
    best = f"; best model from step {facts['best_step']:,}" if facts["best_step"] else ""
    parts.append(
        f"trained {_trained(facts)} parameters for {facts['epochs']:.1f} epochs "
        f"({count(facts['steps'], 'step')}{early}) in {duration(facts['seconds'])}: "
        f"{facts['tokens_per_second']:,.0f} tokens/s, "
        f"padding {facts['padding_fraction']:.2%} of the positions in linear layers, "
        f"{facts['attention_padding_fraction']:.0%} in attention{best}"
    )
    if facts["num_skipped"]:
        parts.append(
            f"skipped because something was not finite: {count(facts['num_skipped'], 'step')}"
        )
    run = Path(result["run"])
    parts.append(f"run folder: {run}")
    parts.append(f"try it: hasten predict {shlex.quote(str(run))} {_try(result)}")
    return "\n".join(parts)


def _trained(facts: Mapping[str, Any]) -> str:
    trained, total = facts["num_trained"], facts["num_parameters"]
    return f"{total:,}" if trained == total else f"{trained:,} of {total:,}"


def _try(result: Mapping[str, Any]) -> str:
    """Returns arguments of `hasten predict` to begin with."""
    texts = [f'"some {name}"' for name in result["input_columns"]]
    return '"some text"' if len(texts) == 1 else " ".join(texts)


def _comparison(result: Mapping[str, Any]) -> str:
    """Says plainly who won: the model, or one of the simpler ways."""
    judged, baselines = result["judged_on"], result["baselines"]
    metric = next(key for key in next(iter(baselines.values())) if key != "seconds")
    ours = result[judged][metric]
    lines = [
        f"compared by {metric} on {judged}, trained on the same rows:",
        f"  this model                    {ours:.4f}",
    ]
    for name, text in _BASELINES.items():
        if simple := baselines.get(name):
            took = f"  ({duration(simple['seconds'])})" if "seconds" in simple else ""
            lines.append(f"  {text:<28}  {simple[metric]:.4f}{took}")
    rival = max(b[metric] for b in baselines.values())
    low, high = result[judged].get(f"{metric}_interval", (rival, rival))
    sure = "" if not low < rival < high else ", within the 95% interval: too close to be sure"
    difference = 100 * (ours - rival)
    if difference > 0:
        lines.append(f"this model won by {difference:.1f} points{sure}")
    elif difference == 0:
        lines.append("a tie")
    else:
        lines.append(f"the simpler way won by {-difference:.1f} points{sure}")
    return "\n".join(lines)


_BASELINES = {
    "tfidf_logistic_regression": "TF-IDF + logistic regression",
    "majority": "always the largest class",
    "first_sentence": "always the first sentence",
}
