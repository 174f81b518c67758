"""A run before its first step: what was asked for, what was chosen, and the data."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hasten.config.schema import RunConfig, settled
from hasten.data.order import steps_per_epoch
from hasten.model.config import TransformerConfig
from hasten.plan.choices import Choice
from hasten.training.prepare import PreparedData
from hasten.training.pretrained import Pretrained


@dataclass(frozen=True)
class Plan:
    """A run before its first step.

    Attributes:
        config: without any ``auto``.
        choices: what was chosen automatically, and why.
        data: prepared splits.
        device: where to compute.
        architecture: of the model.
        pretrained: what a new run begins with; None for drawn weights.
    """

    config: RunConfig
    choices: list[Choice]
    data: PreparedData
    device: torch.device
    architecture: TransformerConfig
    pretrained: Pretrained | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Global batches of one pass over the training rows."""
        tokens_per_step = settled(self.config.train.tokens_per_step)
        return steps_per_epoch(self.data.splits["train"].lengths, tokens_per_step)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        return max(1, round(settled(self.config.train.epochs) * self.steps_per_epoch))
