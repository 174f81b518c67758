"""The end of a run: the best model is saved and tested, and a plain verdict is given.

best weights [-> adapter/] -> model/ -> metrics of validation and test -> baselines -> result.json
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from hasten.config.schema import settled
from hasten.model.adapters import AdapterSettings, merge_adapters
from hasten.model.pretrained.registry import FAMILIES
from hasten.model.search import DecodingSettings
from hasten.model.transformer import Transformer
from hasten.task.contract import Machine
from hasten.training.adapter_files import save_adapter
from hasten.training.checkpoint import copy_into, gather_tensors
from hasten.training.evaluate import evaluate, measure
from hasten.training.fine_tuning import NO_CLASS, adapter_settings
from hasten.training.inherited import read_inherited
from hasten.training.loop import Loop
from hasten.training.planned import Plan
from hasten.training.saved import Inherited, SavedModel, save_model, writable_as
from hasten.training.step import Parts


def finish_run(loop: Loop, plan: Plan) -> dict[str, Any]:
    """Restores the best model, saves it, measures it, and returns the result as JSON values."""
    parts, data, config = loop.parts, plan.data, plan.config
    if loop.best:
        copy_into(parts.model, loop.best, "the best model")
    elif parts.average is not None:
        copy_into(
            parts.model, dict(parts.model.state_dict()) | parts.average.tensors(), "the average"
        )
    parts.model.eval()
    assert isinstance(parts.model, Transformer)
    decoding = DecodingSettings(
        num_beams=settled(config.eval.num_beams), length_penalty=config.eval.length_penalty
    )
    ranks = parts.parallel.ranks
    machine = Machine(parts.device, parts.settings.micro_batch_tokens, ranks)
    validation = data.splits["validation"]
    if len(validation):
        data.task.calibrate(
            lambda: measure(parts.model, data.task, validation, machine, parts.parallel)
        )
    tensors = gather_tensors(parts.model.state_dict(), ranks)
    adapter, inherited = adapter_settings(config.finetune), read_inherited(loop.folder)
    if adapter is not None:
        with_adapters = tensors
        ranks.on_main(lambda: _save_adapter(loop, plan, with_adapters, adapter, inherited))
        tensors = merge_adapters(tensors, adapter.scale)
    saved = SavedModel(parts.model, data.task, decoding)
    ranks.on_main(lambda: save_model(loop.folder / "model", saved, tensors, inherited))
    result: dict[str, Any] = {"run": str(loop.folder), "task": data.task.name}
    result["input_columns"] = list(data.task.input_columns)
    judged = data.splits["train"]
    for name in ("validation", "test"):
        split = data.splits.get(name)
        if split is not None and len(split):
            judged = split
            found = evaluate(
                parts.model, data.task, split, machine, decoding=decoding, parallel=parts.parallel
            )
            result[name] = {**found.metrics, **found.details, "samples": list(found.samples)}
            result["judged_on"] = name
    result.setdefault("judged_on", "train")
    if config.eval.baseline:
        result["baselines"] = ranks.on_main(
            lambda: data.task.baselines(data.splits["train"], judged, loop.observer.note)
        )
    result["training"] = {
        "num_parameters": sum(tensor.numel() for tensor in tensors.values()),
        "num_trained": _count_trained(parts),
        **_training_facts(loop, plan),
    }
    return result


def _count_trained(parts: Parts) -> int:
    """Returns how many numbers were trained, those of adapters included; all processes at once."""
    own = sum(p.numel() for p in parts.parallel.counted_parameters() if p.requires_grad)
    ranks = parts.parallel.ranks
    # Each process of a stage counts what the whole stage has.
    total = ranks.sum(torch.tensor(own, dtype=torch.float64, device=parts.device))
    return round(total.item() / ranks.stage_size)


def _save_adapter(
    loop: Loop,
    plan: Plan,
    tensors: Mapping[str, Tensor],
    settings: AdapterSettings,
    inherited: Inherited | None,
) -> None:
    """Writes the adapter beside the model that it is merged into."""
    base, architecture = plan.config.model.pretrained, plan.architecture
    assert base is not None
    family = writable_as(architecture)
    if family is None:
        loop.observer.note(f"adapter/ is not written: {NO_CLASS}")
        return
    if inherited is not None:  # several families may have the options, each with its own names
        family = next((one for one in FAMILIES if one.name == inherited.family), family)
    save_adapter(loop.folder / "adapter", architecture, tensors, settings, base, family)


def _training_facts(loop: Loop, plan: Plan) -> dict[str, Any]:
    state = loop.state
    return {
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
        "num_truncated": plan.data.splits["train"].num_truncated,
        "rejected": [asdict(entry) for entry in plan.data.sources.rejected[:10]],
        "num_rejected": len(plan.data.sources.rejected),
    }
