"""The end of a run: the best model is saved and tested, and a plain verdict is given.

best weights -> model/ -> metrics of validation and test -> baselines -> result.json
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from hasten.model.transformer import Transformer
from hasten.task import baselines
from hasten.task.text_classification import ClassificationMeter, accuracy_interval
from hasten.training.build import Plan
from hasten.training.checkpoint import copy_into
from hasten.training.evaluate import measure
from hasten.training.loop import Loop
from hasten.training.prepare import Split
from hasten.training.saved import SavedModel, save_model


def finish_run(loop: Loop, plan: Plan) -> dict[str, Any]:
    """Restores the best model, saves it, measures it, and returns the result as JSON values."""
    parts, data = loop.parts, plan.data
    if loop.best:
        copy_into(parts.model, loop.best, "the best model")
    elif parts.average is not None:
        copy_into(
            parts.model, dict(parts.model.state_dict()) | parts.average.tensors(), "the average"
        )
    parts.model.eval()
    assert isinstance(parts.model, Transformer)
    columns = data.sources.columns
    saved = SavedModel(
        parts.model,
        data.task,
        data.tokenizer,
        data.form,
        columns.text,
        columns.label,
    )
    save_model(loop.folder / "model", saved)
    result: dict[str, Any] = {"run": str(loop.folder)}
    judged = data.splits["train"]
    for name in ("validation", "test"):
        split = data.splits.get(name)
        if split is not None and len(split.rows):
            judged = split
            result[name] = _measure(loop, split)
    result["judged_on"] = judged.name
    result["baselines"] = _baselines(loop, plan, judged)
    result["training"] = _training_facts(loop, plan)
    return result


def _measure(loop: Loop, split: Split) -> dict[str, Any]:
    parts = loop.parts
    meter = measure(
        parts.model,
        parts.task,
        split,
        device=parts.device,
        batch_tokens=parts.settings.micro_batch_tokens,
    )
    assert isinstance(meter, ClassificationMeter)
    metrics: dict[str, Any] = dict(meter.compute())
    metrics["accuracy_interval"] = accuracy_interval(
        metrics["accuracy"], int(metrics["num_examples"])
    )
    metrics["per_class"] = meter.per_class()
    return metrics


def _baselines(loop: Loop, plan: Plan, judged: Split) -> dict[str, Any]:
    """Returns accuracies of simpler ways, trained on the same rows as the model."""
    train = plan.data.splits["train"]
    train_targets, targets = train.targets[train.rows], judged.targets[judged.rows]
    found: dict[str, Any] = {
        "majority": {"accuracy": baselines.majority_accuracy(train_targets, targets)}
    }
    if not plan.config.eval.baseline or not baselines.tfidf_available():
        return found
    if len(train.rows) > baselines.MAX_ROWS:
        loop.observer.note(f"TF-IDF baseline: left out above {baselines.MAX_ROWS:,} rows")
        return found
    accuracy, seconds = baselines.tfidf_accuracy(
        _joined(train), train_targets, _joined(judged), targets
    )
    found["tfidf_logistic_regression"] = {"accuracy": accuracy, "seconds": seconds}
    return found


def _joined(split: Split) -> list[str]:
    return [" ".join(cells) for cells in split.corpus.texts(split.rows)]


def _training_facts(loop: Loop, plan: Plan) -> dict[str, Any]:
    state, train = loop.state, plan.data.splits["train"]
    return {
        "num_parameters": sum(p.numel() for p in loop.parts.model.parameters()),
        "steps": state.step,
        "epochs": state.step / plan.steps_per_epoch,
        "best_step": state.best_step,
        "stopped_early": state.stopped_early,
        "num_skipped": state.num_skipped,
        "num_tokens": state.num_tokens,
        "seconds": state.train_seconds,
        "tokens_per_second": state.num_tokens / max(state.train_seconds, 1e-9),
        "padding_fraction": 1 - state.num_tokens / max(1, state.num_positions),
        "attention_padding_fraction": 1 - state.num_tokens / max(1, state.num_attention_positions),
        "num_truncated": train.store.num_truncated,
        "rejected": [asdict(entry) for entry in plan.data.sources.rejected[:10]],
        "num_rejected": len(plan.data.sources.rejected),
    }
