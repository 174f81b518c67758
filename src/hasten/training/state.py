"""Where a run stands: everything besides tensors that resuming needs, as plain numbers."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any


@dataclass
class TrainState:
    """The position of a run.

    Attributes:
        step: global batches consumed, which is also the place in the data.
        num_tokens: tokens of examples seen.
        num_positions: positions that passed through linear layers, filler included.
        num_attention_positions: positions inside attention groups, padding included.
        num_skipped: steps skipped because something was not finite.
        skipped_in_a_row: of these, the latest without a good one between.
        best_metric: best validation value so far, or None.
        best_loss: loss of that model.
        best_step: step it was measured at.
        loss_scale: factor of the next step's loss in float16; 1 in other precisions.
        loss_scale_steps: finite steps since it last changed.
        evaluations_since_best: evaluations without progress in the metric.
        stopped_early: whether early stopping ended the run.
        train_seconds: time spent training, over all processes that worked on the run.
        evaluations: every evaluation's step, split and metrics.
    """

    step: int = 0
    num_tokens: int = 0
    num_positions: int = 0
    num_attention_positions: int = 0
    num_skipped: int = 0
    skipped_in_a_row: int = 0
    best_metric: float | None = None
    best_loss: float | None = None
    best_step: int = 0
    loss_scale: float = 1.0
    loss_scale_steps: int = 0
    evaluations_since_best: int = 0
    stopped_early: bool = False
    train_seconds: float = 0.0
    evaluations: list[dict[str, Any]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Returns the state as JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainState:
        """Restores a state; unknown or missing names raise ``TypeError``."""
        return cls(**values)

    def record(self, value: float, higher_is_better: bool, loss: float) -> bool:
        """Counts an evaluation; returns whether it is the best so far.

        Args:
            value: of the metric that models are judged by.
            higher_is_better: of that metric.
            loss: decides between equal values, which small validation sets often have; a lower
                loss alone is no progress, though, for which patience would wait.
        """
        best, best_loss = self.best_metric, self.best_loss
        is_better = best is None or (value > best if higher_is_better else value < best)
        if best_loss is None or best_loss != best_loss:
            best_loss = math.inf
        is_finer = value == best and loss < best_loss
        # A metric that is not a number is never better, and never becomes the one to beat.
        is_best = value == value and (is_better or is_finer)
        if is_best:
            self.best_metric, self.best_loss, self.best_step = value, loss, self.step
        if is_best and is_better:
            self.evaluations_since_best = 0
        else:
            self.evaluations_since_best += 1
        return is_best
