"""One optimizer step: micro-batches, one divisor, one update.

    global batch --cut--> micro-batches --forward, backward--> gradients of sum / weight
        penalties once -> finite? -> clip -> learning rate -> optimizer -> averaged weights

The loss is a sum divided by a weight known before the first backward, never a mean of means, so
how the batch is cut changes the result by rounding only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hasten.core.batch import PackedBatch
from hasten.core.seeds import derive_seed
from hasten.data.examples import Examples
from hasten.data.order import cut_micro_batches
from hasten.model.transformer import Transformer
from hasten.optim.averaging import WeightAverage
from hasten.optim.clipping import clip_gradients_, gradient_norm
from hasten.optim.optimizers import set_learning_rate
from hasten.optim.penalties import add_penalty_gradients_
from hasten.optim.schedules import Schedule
from hasten.task.contract import Meter, Task


@dataclass(frozen=True)
class StepSettings:
    """What a step needs to know besides its parts.

    Attributes:
        seed: of the run; dropout derives from it.
        learning_rate: peak, multiplied by the schedule's factor.
        micro_batch_tokens: token budget of one forward and backward.
        gradient_clip: largest global norm; 0 for none.
        l1: coefficient of the sum of absolute weights.
        l2: coefficient of the sum of squared weights.
    """

    seed: int
    learning_rate: float
    micro_batch_tokens: int
    gradient_clip: float = 0.0
    l1: float = 0.0
    l2: float = 0.0


@dataclass(frozen=True)
class Parts:
    """What a run trains, and with what."""

    model: Transformer
    task: Task
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    penalised: tuple[nn.Parameter, ...]
    average: WeightAverage | None
    device: torch.device
    settings: StepSettings


@dataclass(frozen=True)
class StepResult:
    """What came of one step.

    Attributes:
        loss: per unit, without penalties.
        gradient_norm: global, before clipping.
        learning_rate: used.
        num_tokens: tokens of the batch's examples.
        num_positions: positions that passed through linear layers, filler included.
        num_attention_positions: positions inside attention groups, padding included.
        is_finite: False where the step was skipped and the optimizer left untouched.
    """

    loss: float
    gradient_norm: float
    learning_rate: float
    num_tokens: int
    num_positions: int
    num_attention_positions: int
    is_finite: bool


def run_step(
    parts: Parts, split: Examples, examples: np.ndarray, step: int, meter: Meter | None = None
) -> StepResult:
    """Trains on one global batch.

    Args:
        parts: model, optimizer and so on; updated in place.
        split: where the examples are.
        examples: (S,) numbers of the examples of the global batch.
        step: number of this step, from 0.
        meter: counts the outputs as they were seen in training, or None.
    """
    settings, parameters = parts.settings, list(parts.model.parameters())
    weight = float(split.weights[examples].sum())
    parts.model.train()
    loss = torch.zeros((), device=parts.device)
    num_positions = num_attention_positions = 0
    pieces = cut_micro_batches(examples, split.lengths, settings.micro_batch_tokens)
    for number, piece in enumerate(pieces):
        batch = split.pack(piece, weight)
        loss = loss + _accumulate(parts, batch.to(parts.device), step, number, meter)
        num_positions += batch.num_positions
        num_attention_positions += batch.num_attention_positions
    if settings.l1 or settings.l2:
        add_penalty_gradients_(parts.penalised, l1=settings.l1, l2=settings.l2)
    norm = gradient_norm(parameters)
    rate = settings.learning_rate * parts.schedule.factor(step)
    loss_value, norm_value = torch.stack([loss.double(), norm.double()]).tolist()
    is_finite = bool(np.isfinite(loss_value) and np.isfinite(norm_value))
    if is_finite:
        if settings.gradient_clip:
            clip_gradients_(parameters, max_norm=settings.gradient_clip, norm=norm)
        set_learning_rate(parts.optimizer, rate)
        parts.optimizer.step()
        if parts.average is not None:
            parts.average.update()
    parts.optimizer.zero_grad(set_to_none=True)
    return StepResult(
        loss=loss_value,
        gradient_norm=norm_value,
        learning_rate=rate,
        num_tokens=int(split.lengths[examples].sum()),
        num_positions=num_positions,
        num_attention_positions=num_attention_positions,
        is_finite=is_finite,
    )


def _accumulate(
    parts: Parts, batch: PackedBatch, step: int, number: int, meter: Meter | None
) -> Tensor:
    """Adds one micro-batch's gradients; returns its share of the step's loss."""
    torch.manual_seed(derive_seed("dropout", parts.settings.seed, step, number))
    outputs = parts.model(batch)
    share = parts.task.loss_sum(outputs, batch) / batch.weight
    share.backward()
    if meter is not None:
        with torch.no_grad():
            meter.update(_detached(outputs), batch)
    return share.detach()


def _detached(outputs: Any) -> Any:
    if isinstance(outputs, Tensor):
        return outputs.detach()
    parts = (part.detach() if isinstance(part, Tensor) else part for part in outputs)
    return type(outputs)(*parts)
