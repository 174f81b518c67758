"""Measures a model on a split, in bounded memory: no outputs of the whole set are kept."""

from __future__ import annotations

import time
from contextlib import nullcontext

import torch
from torch import nn

from hasten.data.order import cut_micro_batches
from hasten.data.packing import pack_examples
from hasten.optim.averaging import WeightAverage
from hasten.task.contract import Meter, Task
from hasten.training.prepare import Split


@torch.inference_mode()
def measure(
    model: nn.Module, task: Task, split: Split, *, device: torch.device, batch_tokens: int
) -> Meter:
    """Returns a meter that counted every example of the split once.

    Args:
        model: measured as it is, dropout off; its mode is restored.
        task: what is counted.
        split: the examples.
        device: where the model is.
        batch_tokens: token budget of one forward.
    """
    meter, was_training = task.new_meter(), model.training
    model.eval()
    for rows in cut_micro_batches(split.rows, split.store.lengths, batch_tokens):
        batch = pack_examples(split.store, rows, targets=split.targets).to(device)
        meter.update(model(batch), batch)
    model.train(was_training)
    return meter


def evaluate(
    model: nn.Module,
    task: Task,
    split: Split,
    *,
    device: torch.device,
    batch_tokens: int,
    average: WeightAverage | None = None,
) -> dict[str, float]:
    """Returns a split's metrics, of the averaged weights where there are any."""
    start = time.perf_counter()
    with average.swapped() if average is not None else nullcontext():
        metrics = measure(model, task, split, device=device, batch_tokens=batch_tokens).compute()
    seconds = time.perf_counter() - start
    num_tokens = int(split.lengths.sum())
    return {
        **metrics,
        "num_tokens": num_tokens,
        "tokens_per_second": num_tokens / max(seconds, 1e-9),
        "seconds": seconds,
    }
