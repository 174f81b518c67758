"""Results as text for people: the verdict of a run, metrics, predictions."""

from __future__ import annotations

import json
import shlex
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hasten.cli.console import count, duration

_MAX_CLASSES = 30


def metrics_text(name: str, metrics: Mapping[str, Any]) -> str:
    """Returns a split's metrics: one line, then a table of classes."""
    low, high = metrics["accuracy_interval"]
    lines = [
        f"{name}: accuracy {metrics['accuracy']:.4f} (95% interval {low:.4f} to {high:.4f})  "
        f"macro F1 {metrics['macro_f1']:.4f}  loss {metrics['loss']:.4f}  "
        f"{count(metrics['num_examples'], 'example')}"
    ]
    rows = metrics["per_class"]
    width = max(5, *(_columns(row["label"]) for row in rows[:_MAX_CLASSES]))
    lines.append(f"  {'class':<{width}}  precision  recall      F1  examples")
    lines += [
        f"  {row['label']}{' ' * (width - _columns(row['label']))}  {row['precision']:9.3f}  "
        f"{row['recall']:6.3f}  {row['f1']:6.3f}  {row['num_examples']:8,}"
        for row in rows[:_MAX_CLASSES]
    ]
    if len(rows) > _MAX_CLASSES:
        lines.append(f"  ... and {len(rows) - _MAX_CLASSES} more; --json lists all")
    return "\n".join(lines)


def _columns(text: str) -> int:
    """Returns how wide a text is on a terminal, where Chinese takes two columns a character."""
    return sum(
        0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF")
        for c in text
    )


def verdict_text(result: Mapping[str, Any]) -> str:
    """Returns the end of a run: metrics, who won, what it took, and what to do next."""
    parts = [metrics_text(name, result[name]) for name in ("validation", "test") if name in result]
    if result["judged_on"] in result:
        parts.append(_comparison(result))
    else:
        parts.append("no rows were left to measure the model on: give --validation or --test")
    facts = result["training"]
    early = ", stopped early" if facts["stopped_early"] else ""
    best = f"; best model from step {facts['best_step']:,}" if facts["best_step"] else ""
    parts.append(
        f"trained {facts['num_parameters']:,} parameters for {facts['epochs']:.1f} epochs "
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
    columns = json.loads((run / "data.json").read_text(encoding="utf-8"))["text_columns"]
    texts = ['"some text"'] if len(columns) == 1 else [f'"some {name}"' for name in columns]
    parts.append(f"run folder: {run}")
    parts.append(f"try it: hasten predict {shlex.quote(str(run))} {' '.join(texts)}")
    return "\n".join(parts)


def _comparison(result: Mapping[str, Any]) -> str:
    judged = result["judged_on"]
    ours = result[judged]["accuracy"]
    baselines = result["baselines"]
    lines = [
        f"compared on {judged}, trained on the same rows:",
        f"  this model                    {ours:.4f}",
    ]
    simple = baselines.get("tfidf_logistic_regression")
    if simple is not None:
        took = duration(simple["seconds"])
        lines.append(f"  TF-IDF + logistic regression  {simple['accuracy']:.4f}  ({took})")
    lines.append(f"  always the largest class      {baselines['majority']['accuracy']:.4f}")
    rival = max(b["accuracy"] for b in baselines.values())
    low, high = result[judged]["accuracy_interval"]
    sure = "" if not low <= rival <= high else ", within the 95% interval: too close to be sure"
    difference = 100 * (ours - rival)
    if difference > 0:
        lines.append(f"this model won by {difference:.1f} points{sure}")
    elif difference == 0:
        lines.append("a tie")
    else:
        lines.append(f"the simpler way won by {-difference:.1f} points{sure}")
    return "\n".join(lines)
