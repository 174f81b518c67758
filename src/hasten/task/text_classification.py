"""Text classification: one label for each text, or for each pair of texts.

    text, label -> tokens, class number -> scores (S, K) -> cross-entropy or focal loss

Shapes: S sequences, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.core.batch import PackedBatch
from hasten.task.contract import Meter, Task

UNSEEN = -1
"""Target of a label that training never saw: without loss, and always counted as an error."""


@dataclass(frozen=True)
class LossSettings:
    """How a wrong score is charged.

    Attributes:
        kind: cross_entropy, or focal: cross-entropy times ``(1 - p)^gamma`` with p the
            probability of the right class (Lin et al. 2017).
        focal_gamma: the exponent.
        label_smoothing: share of the target spread evenly over all classes (Szegedy et al. 2016).
    """

    kind: Literal["cross_entropy", "focal"] = "cross_entropy"
    focal_gamma: float = 2.0
    label_smoothing: float = 0.0


class TextClassification(Task):
    """Assigns one of K labels.

    Args:
        labels: the K label names; a class's number is its place here.
        loss: how scores are charged.
        class_weights: (K,) weight of each class in the loss; None for 1 each.
    """

    name = "text-classification"
    higher_is_better = {"loss": False, "accuracy": True, "macro_f1": True}  # noqa: RUF012

    def __init__(
        self,
        labels: tuple[str, ...],
        loss: LossSettings | None = None,
        class_weights: tuple[float, ...] | None = None,
    ) -> None:
        self.labels = labels
        self.loss = loss or LossSettings()
        self.class_weights = class_weights

    @classmethod
    def from_counts(
        cls,
        counts: dict[str, int],
        loss: LossSettings,
        class_weights: Literal["none", "balanced"] = "none",
    ) -> TextClassification:
        """Builds the task whose classes are the labels counted in the training rows."""
        labels = sort_labels(tuple(counts))
        balanced = balanced_class_weights(tuple(counts[label] for label in labels))
        return cls(labels, loss, balanced if class_weights == "balanced" else None)

    def targets(self, label_names: tuple[str, ...], labels: np.ndarray) -> np.ndarray:
        """Translates a file's label numbers (R,) into class numbers, ``UNSEEN`` for others."""
        number = {name: i for i, name in enumerate(self.labels)}
        # A row without label has the number -1, which is the last entry.
        table = np.array([*(number.get(name, UNSEEN) for name in label_names), UNSEEN])
        return table[labels]

    def unit_weights(self, targets: np.ndarray) -> np.ndarray:
        """Returns (E,) the class weight of each target, 0 where the label is unseen."""
        weights = np.asarray(self.class_weights or [1.0] * len(self.labels))
        return np.where(targets == UNSEEN, 0.0, weights[np.maximum(targets, 0)])

    def loss_sum(self, outputs: Tensor, batch: PackedBatch) -> Tensor:
        """Returns the summed loss of scores (S, K); reductions are in float32 or wider."""
        assert batch.targets is not None
        scores_SK = outputs if outputs.dtype == torch.float64 else outputs.float()
        weights_K = None
        if self.class_weights is not None:
            weights_K = torch.tensor(
                self.class_weights, dtype=scores_SK.dtype, device=scores_SK.device
            )
        if self.loss.kind == "cross_entropy":
            return F.cross_entropy(
                scores_SK,
                batch.targets,
                weight=weights_K,
                ignore_index=UNSEEN,
                reduction="sum",
                label_smoothing=self.loss.label_smoothing,
            )
        losses_S = F.cross_entropy(
            scores_SK,
            batch.targets,
            weight=weights_K,
            ignore_index=UNSEEN,
            reduction="none",
            label_smoothing=self.loss.label_smoothing,
        )
        right_S = F.softmax(scores_SK, -1).gather(1, batch.targets.clamp(min=0)[:, None])[:, 0]
        # An exponent under 1 has an infinite slope at 0, which a certain score would reach.
        wrong_S = (1 - right_S).clamp(min=torch.finfo(scores_SK.dtype).eps)
        return (losses_S * wrong_S**self.loss.focal_gamma).sum()

    def new_meter(self) -> ClassificationMeter:
        """Returns an empty confusion matrix and loss sum."""
        return ClassificationMeter(self)

    def predictions(self, outputs: Tensor) -> list[dict[str, Any]]:
        """Returns ``{"label", "probability", "probabilities"}`` of each sequence."""
        probabilities_SK = F.softmax(outputs.double(), -1).tolist()
        found = []
        for row in probabilities_SK:
            best = max(range(len(row)), key=row.__getitem__)
            found.append(
                {
                    "label": self.labels[best],
                    "probability": row[best],
                    "probabilities": dict(zip(self.labels, row, strict=True)),
                }
            )
        return found


class ClassificationMeter(Meter):
    """Confusion counts and loss of one pass.

    Attributes:
        confusion: (K + 1, K) examples by true and predicted class; the last row holds labels
            that training never saw.
    """

    def __init__(self, task: TextClassification) -> None:
        self._task = task
        classes = len(task.labels)
        self.confusion = np.zeros((classes + 1, classes), dtype=np.int64)
        self._loss = self._weight = 0.0

    def update(self, outputs: Tensor, batch: PackedBatch) -> None:
        """Counts one batch of scores (S, K)."""
        assert batch.targets is not None
        self._loss += self._task.loss_sum(outputs, batch).item()
        targets = batch.targets.cpu().numpy()
        self._weight += float(self._task.unit_weights(targets).sum())
        predicted = outputs.argmax(-1).cpu().numpy()
        np.add.at(self.confusion, (targets, predicted), 1)  # -1 is the last row

    def compute(self) -> dict[str, float]:
        """Returns loss, accuracy, macro_f1 (over classes that occur) and num_examples."""
        total = int(self.confusion.sum())
        f1 = [row["f1"] for row in self.per_class() if row["num_examples"]]
        return {
            "loss": self._loss / self._weight if self._weight else float("nan"),
            "accuracy": float(np.trace(self.confusion[:-1])) / total if total else float("nan"),
            "macro_f1": float(np.mean(f1)) if f1 else float("nan"),
            "num_examples": total,
        }

    def state(self) -> dict[str, Tensor]:
        """Returns the counts as tensors."""
        sums = torch.tensor([self._loss, self._weight], dtype=torch.float64)
        return {"confusion": torch.from_numpy(self.confusion.copy()), "sums": sums}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from ``state``."""
        self.confusion[:] = state["confusion"].numpy()
        self._loss, self._weight = state["sums"].tolist()

    def per_class(self) -> list[dict[str, Any]]:
        """Returns precision, recall, F1 and the number of examples of each class."""
        right = np.diagonal(self.confusion)
        rows = []
        for i, label in enumerate(self._task.labels):
            actual, predicted = int(self.confusion[i].sum()), int(self.confusion[:, i].sum())
            rows.append(
                {
                    "label": label,
                    "precision": float(right[i]) / predicted if predicted else 0.0,
                    "recall": float(right[i]) / actual if actual else 0.0,
                    "f1": 2 * float(right[i]) / (actual + predicted) if actual + predicted else 0.0,
                    "num_examples": actual,
                }
            )
        return rows


def balanced_class_weights(counts: tuple[int, ...]) -> tuple[float, ...]:
    """Returns (K,) weights ``total / (K * count)``, so that every class weighs the same."""
    total = sum(counts)
    return tuple(total / (len(counts) * max(count, 1)) for count in counts)


def sort_labels(names: tuple[str, ...]) -> tuple[str, ...]:
    """Returns label names in a fixed order: whole numbers by value, else by text."""
    try:
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    except ValueError:
        return tuple(sorted(names))


def accuracy_interval(accuracy: float, num_examples: int) -> tuple[float, float]:
    """Returns the 95% Wilson score interval of a fraction (Wilson 1927)."""
    if num_examples == 0:
        return 0.0, 1.0
    z = 1.959963984540054
    centre = accuracy + z * z / (2 * num_examples)
    spread = accuracy * (1 - accuracy) / num_examples + z * z / (4 * num_examples**2)
    half = z * spread**0.5
    scale = 1 + z * z / num_examples
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)
