"""What every task provides to the one loop.

    targets --unit_weights--> how much each example counts  (known before the forward)
    outputs, batch --loss_sum--> scalar, divided by the step's summed weights
    outputs, batch --Meter.update--> running counts --compute--> {"accuracy": ...}

A task is one file that implements this and one line in ``task.registry``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from hasten.core.batch import PackedBatch


class Meter(ABC):
    """Running counts of one evaluation, in bounded memory."""

    @abstractmethod
    def update(self, outputs: Tensor, batch: PackedBatch) -> None:
        """Counts one batch."""

    @abstractmethod
    def compute(self) -> dict[str, float]:
        """Returns the metrics of everything counted."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Returns the counts as tensors, so that a resumed run goes on counting."""

    @abstractmethod
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from ``state``."""


class Task(ABC):
    """One way to learn from examples.

    Attributes:
        name: as on the Hugging Face Hub.
        higher_is_better: for each metric that a model can be judged by.
    """

    name: ClassVar[str]
    higher_is_better: ClassVar[dict[str, bool]]

    @abstractmethod
    def unit_weights(self, targets: np.ndarray) -> np.ndarray:
        """Returns (E,) float64, what each example adds to the divisor of the loss."""

    @abstractmethod
    def loss_sum(self, outputs: Tensor, batch: PackedBatch) -> Tensor:
        """Returns the scalar sum of the weighted losses of a batch with targets."""

    @abstractmethod
    def new_meter(self) -> Meter:
        """Returns an empty meter."""

    @abstractmethod
    def predictions(self, outputs: Tensor) -> list[dict[str, Any]]:
        """Returns one JSON-like prediction per sequence."""
