"""Results as text for people: the verdict of a run, metrics, predictions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hasten.cli.console import duration

_MAX_CLASSES = 30


def metrics_text(name: str, metrics: Mapping[str, Any]) -> str:
    """Returns a split's metrics: one line, then a table of classes."""
    low, high = metrics["accuracy_interval"]
    lines = [
        f"{name}: accuracy {metrics['accuracy']:.4f} (95% interval {low:.4f} to {high:.4f})  "
        f"macro F1 {metrics['macro_f1']:.4f}  loss {metrics['loss']:.4f}  "
        f"{metrics['num_examples']:,} examples"
    ]
    rows = metrics["per_class"]
    width = max(5, *(len(row["label"]) for row in rows[:_MAX_CLASSES]))
    lines.append(f"  {'class':<{width}}  precision  recall      F1  examples")
    lines += [
        f"  {row['label']:<{width}}  {row['precision']:9.3f}  {row['recall']:6.3f}  "
        f"{row['f1']:6.3f}  {row['num_examples']:8,}"
        for row in rows[:_MAX_CLASSES]
    ]
    if len(rows) > _MAX_CLASSES:
        lines.append(f"  ... and {len(rows) - _MAX_CLASSES} more; --json lists all")
    return "\n".join(lines)


def verdict_text(result: Mapping[str, Any]) -> str:
    """Returns the end of a run: metrics, who won, what it took, and what to do next."""
    parts = [metrics_text(name, result[name]) for name in ("validation", "test") if name in result]
    if result["judged_on"] in result:
        parts.append(_comparison(result))
    facts = result["training"]
    early = ", stopped early" if facts["stopped_early"] else ""
    parts.append(
        f"trained {facts['num_parameters']:,} parameters for {facts['epochs']:.1f} epochs "
        f"({facts['steps']:,} steps{early}) in {duration(facts['seconds'])}: "
        f"{facts['tokens_per_second']:,.0f} tokens/s, padding {facts['padding_fraction']:.2%} of "
        f"the positions in linear layers, {facts['attention_padding_fraction']:.0%} in attention; "
        f"best model from step {facts['best_step']:,}"
    )
    if facts["num_skipped"]:
        parts.append(f"{facts['num_skipped']:,} steps were skipped: not finite")
    run = result["run"]
    parts.append(f'run folder: {run}\ntry it: hasten predict {run} "some text"')
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
