"""What happens during a run, told to whoever listens.

    loop --StepInfo, EvaluationInfo, notes--> Observer (terminal, plain lines, metrics.jsonl)

Observers are told; they change nothing. All values are plain numbers.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class StepInfo:
    """The steps since the last report.

    Attributes:
        step: optimizer steps done, of ``total_steps``.
        total_steps: steps of the whole run.
        epoch: passes over the data, with a fraction.
        loss: per unit, averaged over the steps reported.
        accuracy: of the training batches as they were seen (dropout on), or None.
        learning_rate: of the last step.
        gradient_norm: of the last step, before clipping.
        num_tokens: tokens seen since the start of the run.
        tokens_per_second: of the steps reported.
        seconds_left: estimated from the last steps; early stopping may end it sooner.
        num_skipped: steps skipped so far because something was not finite.
    """

    step: int
    total_steps: int
    epoch: float
    loss: float
    accuracy: float | None
    learning_rate: float
    gradient_norm: float
    num_tokens: int
    tokens_per_second: float
    seconds_left: float
    num_skipped: int


@dataclass(frozen=True)
class EvaluationInfo:
    """One evaluation.

    Attributes:
        step: optimizer steps done.
        epoch: passes over the data, with a fraction.
        split: validation or test.
        metrics: by name.
        is_best: whether this is the best model so far.
        samples: some predictions as text.
    """

    step: int
    epoch: float
    split: str
    metrics: dict[str, Any]
    is_best: bool
    samples: tuple[str, ...] = ()


class Observer(Protocol):
    """Whoever wants to know."""

    def note(self, text: str) -> None:
        """A decision and its reason."""

    def warn(self, text: str) -> None:
        """Something the person should look at."""

    def step(self, info: StepInfo) -> None:
        """Progress."""

    def evaluation(self, info: EvaluationInfo) -> None:
        """A measurement."""


class Silent:
    """Hears everything and says nothing."""

    def note(self, text: str) -> None:
        """Ignores a note."""

    def warn(self, text: str) -> None:
        """Ignores a warning."""

    def step(self, info: StepInfo) -> None:
        """Ignores progress."""

    def evaluation(self, info: EvaluationInfo) -> None:
        """Ignores a measurement."""


class MetricsLog:
    """Appends one JSON object a line to metrics.jsonl.

    Its length is part of every checkpoint, so that a resumed run cuts what was written after the
    checkpoint and the file reads as if nothing had happened.
    """

    def __init__(self, path: Path, length: int = 0) -> None:
        self._file = path.open("ab")
        self._file.truncate(min(length, self._file.tell()))
        self._file.seek(0, os.SEEK_END)

    def write(self, entry: dict[str, Any]) -> None:
        """Appends one entry; a number that is not finite becomes null, as JSON has none."""
        entry = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in entry.items()
        }
        self._file.write((json.dumps(entry, ensure_ascii=False) + "\n").encode())
        self._file.flush()

    def length(self) -> int:
        """Returns the bytes written so far."""
        return self._file.tell()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class NoLog(MetricsLog):
    """Stands in where another process writes the file."""

    def __init__(self) -> None:
        """Opens nothing."""

    def write(self, entry: dict[str, Any]) -> None:
        """Writes nothing."""

    def length(self) -> int:
        """Returns 0."""
        return 0

    def close(self) -> None:
        """Closes nothing."""
