"""One optimizer step: micro-batches, one divisor, one update.

    global batch --deal--> own micro-batches --forward, backward--> gradients of sum / weight
        summed over processes -> penalties once -> finite? -> clip -> learning rate
        -> optimizer -> averaged weights

The loss is a sum divided by a weight known before the first backward, never a mean of means, so
how the batch is cut, and among how many processes, changes the result by rounding only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hasten.core.seeds import derive_seed
from hasten.data.examples import Examples
from hasten.data.order import deal_micro_batches
from hasten.model.transformer import Transformer
from hasten.optim.averaging import WeightAverage
from hasten.optim.clipping import clip_gradients_, gradient_norm, scale_gradients_
from hasten.optim.optimizers import set_learning_rate
from hasten.optim.penalties import add_penalty_gradients_
from hasten.optim.schedules import Schedule
from hasten.parallel.data_parallel import DataParallel
from hasten.task.contract import Meter, Task


@dataclass(frozen=True)
class StepSettings:
    """What a step needs to know besides its parts.

    Attributes:
        seed: of the run; dropout derives from it.
        learning_rate: peak, multiplied by the schedule's factor.
        micro_batch_tokens: token budget of one forward and backward.
        gradient_clip: largest global norm; 0 for none.
        precision: float32, bf16 or fp16, of matrix products.
        l1: coefficient of the sum of absolute weights.
        l2: coefficient of the sum of squared weights.
    """

    seed: int
    learning_rate: float
    micro_batch_tokens: int
    gradient_clip: float = 0.0
    precision: str = "float32"
    l1: float = 0.0
    l2: float = 0.0


@dataclass(frozen=True)
class Parts:
    """What a run trains, and with what."""

    model: Transformer
    parallel: DataParallel
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
    parts: Parts,
    split: Examples,
    examples: np.ndarray,
    step: int,
    meter: Meter | None = None,
    loss_scale: float = 1.0,
) -> StepResult:
    """Trains on one global batch.

    Args:
        parts: model, optimizer and so on; updated in place.
        split: where the examples are.
        examples: (S,) numbers of the examples of the global batch.
        step: number of this step, from 0.
        meter: counts the outputs as they were seen in training, or None.
        loss_scale: factor of the loss in the backward pass, taken out of the gradients again.
    """
    settings, parameters = parts.settings, list(parts.model.parameters())
    parts.model.train()
    own = _run_micro_batches(parts, split, examples, step, meter, loss_scale)
    sums = parts.parallel.ranks.sum(own)
    if loss_scale != 1:
        scale_gradients_(parameters, 1 / loss_scale)
    if settings.l1 or settings.l2:
        add_penalty_gradients_(parts.penalised, l1=settings.l1, l2=settings.l2)
    norm = gradient_norm(parts.parallel.counted_parameters(), parts.parallel.ranks)
    rate = settings.learning_rate * parts.schedule.factor(step)
    loss, num_positions, num_attention_positions, norm_value = [*sums.tolist(), norm.item()]
    is_finite = math.isfinite(loss) and math.isfinite(norm_value)
    if is_finite:
        if settings.gradient_clip:
            clip_gradients_(parameters, max_norm=settings.gradient_clip, norm=norm)
        set_learning_rate(parts.optimizer, rate)
        parts.optimizer.step()
        if parts.average is not None:
            parts.average.update()
    parts.optimizer.zero_grad(set_to_none=True)
    return StepResult(
        loss=loss,
        gradient_norm=norm_value,
        learning_rate=rate,
        num_tokens=int(split.lengths[examples].sum()),
        num_positions=round(num_positions),
        num_attention_positions=round(num_attention_positions),
        is_finite=is_finite,
    )


def _run_micro_batches(
    parts: Parts,
    split: Examples,
    examples: np.ndarray,
    step: int,
    meter: Meter | None,
    loss_scale: float,
) -> Tensor:
    """Leaves the gradients of the whole batch in the parameters.

    Returns:
        (3,) float64, of this process's micro-batches: loss, positions, positions in attention.
    """
    settings, parallel = parts.settings, parts.parallel
    ranks = parallel.ranks.of_batch
    weight = float(split.weights[examples].sum())
    rounds = deal_micro_batches(examples, split.lengths, settings.micro_batch_tokens, ranks.size)
    pieces = [of_ranks[ranks.rank] for of_ranks in rounds]
    # A process without examples runs one that counts for nothing: all have to take part.
    batches = [
        split.pack(piece if len(piece) else examples[:1], weight).to(parts.device)
        for piece in pieces
    ]

    def seed_dropout(number: int, stage: int) -> None:
        draw = number * ranks.size + ranks.rank
        place = (step, draw, stage) if stage else (step, draw)
        torch.manual_seed(derive_seed("dropout", settings.seed, *place))

    def scaled_loss(number: int, outputs: Any) -> Tensor:
        counts, batch = len(pieces[number]) > 0, batches[number]
        outputs = _widened(outputs)
        share = parallel.own_loss(parts.task.loss_sum, outputs, batch) / batch.weight
        if meter is not None and counts and parallel.ranks.speaks_for_share:
            with torch.no_grad():
                meter.update(_detached(outputs), batch)
        share = share if counts else share * 0
        return share if loss_scale == 1 else share * loss_scale

    loss = parallel.train_on(batches, scaled_loss, seed_dropout)
    filled, speaks = parallel.filled(batches), parallel.ranks.speaks_for_share
    return torch.tensor(
        [
            loss.double().item() / loss_scale * parallel.has_loss,
            sum(batch.num_positions for batch in filled) * speaks,
            sum(batch.num_attention_positions for batch in filled) * speaks,
        ],
        dtype=torch.float64,
    )


def _widened(outputs: Any) -> Any:
    """Returns scores in float32 or wider; what makes scores of tokens is widened in its loss."""
    is_narrow = isinstance(outputs, Tensor) and outputs.element_size() < 4
    return outputs.float() if is_narrow else outputs


def _detached(outputs: Any) -> Any:
    if isinstance(outputs, Tensor):
        return outputs.detach()
    parts = (part.detach() if isinstance(part, Tensor) else part for part in outputs)
    return type(outputs)(*parts)
