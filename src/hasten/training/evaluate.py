"""Measures a model on a split, in bounded memory: no outputs of the whole set are kept."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hasten.data.examples import Examples
from hasten.data.order import cut_micro_batches
from hasten.model.search import DecodingSettings
from hasten.model.transformer import Transformer
from hasten.optim.averaging import WeightAverage
from hasten.parallel.data_parallel import DataParallel
from hasten.task.contract import DecodedSample, Machine, Meter, Task


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation found.

    Attributes:
        metrics: by name.
        details: what else the task has to say, as JSON values.
        samples: some predictions as text.
    """

    metrics: dict[str, Any]
    details: dict[str, Any]
    samples: tuple[str, ...]


@torch.inference_mode()
def measure(
    model: Transformer,
    task: Task,
    examples: Examples,
    machine: Machine,
    parallel: DataParallel | None = None,
) -> Meter:
    """Returns a meter that counted every example once.

    Args:
        model: measured as it is, dropout off; its mode is restored.
        task: what is counted.
        examples: of one split.
        machine: where to compute, in which portions; its processes share the examples, and all
            of them get the whole count.
        parallel: how the model is spread over them; None where each has it to itself.
    """
    parallel = parallel or DataParallel(model, machine.ranks)
    meter, was_training, ranks = task.new_meter(examples), model.training, machine.ranks.of_batch
    model.eval()
    pieces = cut_micro_batches(np.arange(len(examples)), examples.lengths, machine.batch_tokens)
    own = list(ranks.share(pieces))
    is_short = len(own) < -(-len(pieces) // ranks.size)
    parallel.measure_on(
        (examples.pack(piece).to(machine.device) for piece in own),
        meter.update,
        (lambda: examples.pack(pieces[0]).to(machine.device)) if is_short else None,
    )
    model.train(was_training)
    return meter if machine.ranks.size == 1 else meter.merged(ranks.gather(meter.state()))


def evaluate(
    model: Transformer,
    task: Task,
    examples: Examples,
    machine: Machine,
    *,
    decoding: DecodingSettings | None = None,
    limit: int | None = None,
    average: WeightAverage | None = None,
    parallel: DataParallel | None = None,
) -> Evaluation:
    """Measures a model on a split, with the averaged weights where there are any.

    Args:
        model: its mode is restored.
        task: what is measured.
        examples: of one split.
        machine: where to compute, in which portions.
        decoding: how to decode, where the task decodes; None to leave it out.
        limit: decode only so many examples; None for all.
        average: weights to measure in place of the model's own.
        parallel: how the model is spread over processes.
    """
    start = time.perf_counter()
    was_training = model.training
    with average.swapped() if average is not None else nullcontext(), torch.inference_mode():
        meter = measure(model, task, examples, machine, parallel)
        seconds = time.perf_counter() - start
        decoded = DecodedSample()
        if decoding is not None and limit != 0:
            model.eval()
            with (parallel or DataParallel(model, machine.ranks)).gathered() as one:
                assert isinstance(one, Transformer)
                decoded = task.decode(one, examples, machine, decoding, limit)
            model.train(was_training)
    num_tokens = int(examples.lengths.sum())
    metrics = {
        **meter.compute(),
        **decoded.metrics,
        "num_tokens": num_tokens,
        "tokens_per_second": num_tokens / max(seconds, 1e-9),
        "seconds": time.perf_counter() - start,
    }
    return Evaluation(metrics, meter.details(), decoded.samples)
