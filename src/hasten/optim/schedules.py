"""Learning-rate schedules: a factor in [0, 1] of the peak rate for every optimizer step.

    steps already taken -> Schedule.factor -> rate of the step about to be taken
    evaluation metric   -> Schedule.observe   (only `plateau` listens)

Counting: ``step`` is the number of optimizer steps already taken, so 0 for the first one, and
``factor(step)`` is for the step about to be taken. With ``w`` warm-up steps and ``T`` in all:

    step        0          ...   w-1       w      ...   T-1           T (never taken)
    factor    1/(w+1)      ...  w/(w+1)    1      ...   a little      final_factor

so no step is wasted on a rate of 0, neither the first nor the last. In terms of the schedules of
``transformers``, whose step 0 has rate 0: ``ours(step; w, T) == theirs(step + 1; w + 1, T + 1)``.

All but ``plateau`` are pure functions of the step; their state is their name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hasten.core.errors import DamagedError, UsageError, nearest

_DECAY_FRACTION = 0.2  # Hägele et al. 2024: a decay of a fifth of the steps loses nothing to cosine


@dataclass(frozen=True)
class PlateauSettings:
    """When ``plateau`` lowers the rate, and by how much.

    Attributes:
        factor: what the rate is multiplied by, in (0, 1).
        patience: evaluations without improvement that are tolerated; the next one lowers the rate.
        threshold: an improvement must exceed this fraction of the best value so far.
        minimum: the factor never goes below this.
        greater_is_better: True for accuracy and the like, False for a loss.
    """

    factor: float = 0.5
    patience: int = 2
    threshold: float = 1e-4
    minimum: float = 0.0
    greater_is_better: bool = False


class Schedule:
    """A schedule that is a pure function of the step, and the interface of those that are not."""

    def __init__(self, name: str, function: Callable[[int], float]):
        self.name = name
        self._function = function

    def factor(self, step: int) -> float:
        """Returns the factor in [0, 1] for the step about to be taken, ``step`` being taken."""
        assert step >= 0, step
        return self._function(step)

    def observe(self, metric: float) -> None:
        """Hears the metric of an evaluation; only ``plateau`` makes use of it."""

    def state_dict(self) -> dict[str, Any]:
        """Returns what must be kept to continue: JSON scalars only."""
        return {"name": self.name}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from ``state_dict``.

        Raises:
            DamagedError: the state is of another schedule.
        """
        if state.get("name") != self.name:
            raise DamagedError(
                f"The saved schedule is '{state.get('name')}', this run's is '{self.name}'."
            )


class PlateauSchedule(Schedule):
    """Warm-up, then constant, lowered when the metric of evaluations stops improving.

    The rule of ``torch.optim.lr_scheduler.ReduceLROnPlateau`` with a relative threshold. A metric
    that is not finite counts as no improvement.
    """

    def __init__(self, settings: PlateauSettings, *, warmup_steps: int):
        super().__init__("plateau", lambda step: _warmup(step, warmup_steps))
        self._settings = settings
        self._scale = 1.0
        self._best: float | None = None
        self._num_bad = 0

    def factor(self, step: int) -> float:
        """Returns the factor in [0, 1] for the step about to be taken."""
        return super().factor(step) * self._scale

    def observe(self, metric: float) -> None:
        """Lowers the factor after ``patience`` + 1 evaluations in a row without improvement."""
        if self._is_better(metric):
            self._best = metric
            self._num_bad = 0
            return
        self._num_bad += 1
        if self._num_bad > self._settings.patience:
            self._scale = max(self._settings.minimum, self._scale * self._settings.factor)
            self._num_bad = 0

    def state_dict(self) -> dict[str, Any]:
        """Returns the scale, the best metric so far (or None) and the evaluations since."""
        return {
            **super().state_dict(),
            "scale": self._scale,
            "best": self._best,
            "num_bad": self._num_bad,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from ``state_dict``.

        Raises:
            DamagedError: the state is of another schedule, or lacks an entry.
        """
        super().load_state_dict(state)
        missing = [key for key in self.state_dict() if key not in state]
        if missing:
            raise DamagedError(f"The saved schedule lacks {', '.join(missing)}.")
        self._scale, self._best = state["scale"], state["best"]
        self._num_bad = state["num_bad"]

    def _is_better(self, metric: float) -> bool:
        if not math.isfinite(metric):
            return False
        if self._best is None:
            return True
        margin = self._settings.threshold * abs(self._best)
        if self._settings.greater_is_better:
            return metric > self._best + margin
        return metric < self._best - margin


def constant_factor(step: int, total_steps: int, warmup_steps: int) -> float:
    """Warm-up, then 1."""
    return _warmup(step, warmup_steps)


def linear_factor(
    step: int, total_steps: int, warmup_steps: int, final_factor: float = 0.0
) -> float:
    """Warm-up, then a straight line from 1 to ``final_factor`` (Devlin et al. 2019, for one)."""
    if step < warmup_steps:
        return _warmup(step, warmup_steps)
    return _toward(final_factor, 1 - _progress(step, warmup_steps, total_steps))


def cosine_factor(
    step: int, total_steps: int, warmup_steps: int, final_factor: float = 0.0
) -> float:
    """Warm-up, then half a cosine from 1 to ``final_factor`` (Loshchilov & Hutter 2017)."""
    if step < warmup_steps:
        return _warmup(step, warmup_steps)
    progress = _progress(step, warmup_steps, total_steps)
    return _toward(final_factor, 0.5 * (1 + math.cos(math.pi * progress)))


def wsd_factor(
    step: int,
    total_steps: int,
    warmup_steps: int,
    final_factor: float = 0.0,
    decay_fraction: float = _DECAY_FRACTION,
) -> float:
    """Warm-up, 1, then ``1 - sqrt(progress)`` over the last ``decay_fraction`` of all steps.

    Warmup-stable-decay: Hu et al. 2024 (MiniCPM); the shape of the decay: Hägele et al. 2024,
    section 3.2. A decay that would begin inside the warm-up begins at its end.
    """
    decay_start = max(warmup_steps, total_steps - max(1, round(decay_fraction * total_steps)))
    if step < decay_start:
        return _warmup(step, warmup_steps)
    return _toward(final_factor, 1 - math.sqrt(_progress(step, decay_start, total_steps)))


def inverse_sqrt_factor(step: int, total_steps: int, warmup_steps: int) -> float:
    """Warm-up, then ``sqrt((w + 1) / (step + 1))`` (Vaswani et al. 2017, equation 3)."""
    if step < warmup_steps:
        return _warmup(step, warmup_steps)
    return math.sqrt((warmup_steps + 1) / (step + 1))


_FACTORS: Mapping[str, Callable[..., float]] = {
    "linear": linear_factor,
    "cosine": cosine_factor,
    "wsd": wsd_factor,
    "inverse_sqrt": inverse_sqrt_factor,
    "constant": constant_factor,
}
_SETTINGS: Mapping[str, tuple[str, ...]] = {
    "linear": ("final_factor",),
    "cosine": ("final_factor",),
    "wsd": ("final_factor", "decay_fraction"),
    "inverse_sqrt": (),
    "constant": (),
    "plateau": ("plateau",),
}
SCHEDULE_NAMES: tuple[str, ...] = tuple(_SETTINGS)


def build_schedule(
    name: str,
    *,
    total_steps: int,
    warmup_steps: int = 0,
    final_factor: float | None = None,
    decay_fraction: float | None = None,
    plateau: PlateauSettings | None = None,
) -> Schedule:
    """Constructs a schedule.

    Args:
        name: one of ``SCHEDULE_NAMES``.
        total_steps: optimizer steps of the whole run; beyond them the final factor holds.
        warmup_steps: steps with a factor under 1 at the start, rising in a straight line.
        final_factor: what linear, cosine and wsd decay to, in [0, 1]; 0 by default.
        decay_fraction: the part of all steps that wsd decays over, in (0, 1]; 0.2 by default.
        plateau: settings of plateau.

    Raises:
        UsageError: an unknown name, a setting that the schedule does not use, a value out of range,
            or a warm-up longer than the run.
    """
    if name not in _SETTINGS:
        raise UsageError(
            f"Unknown schedule '{name}'.{nearest(name, _SETTINGS)} "
            f"Known: {', '.join(SCHEDULE_NAMES)}."
        )
    given = {"final_factor": final_factor, "decay_fraction": decay_fraction, "plateau": plateau}
    settings = {key: value for key, value in given.items() if value is not None}
    for key in settings:
        if key not in _SETTINGS[name]:
            raise UsageError(f"Schedule '{name}' does not use '{key}': leave it out.")
    _check(total_steps, warmup_steps, final_factor, decay_fraction)
    if name == "plateau":
        return PlateauSchedule(_checked(plateau or PlateauSettings()), warmup_steps=warmup_steps)
    function = _FACTORS[name]
    return Schedule(name, lambda step: function(step, total_steps, warmup_steps, **settings))


def _warmup(step: int, warmup_steps: int) -> float:
    return min(1.0, (step + 1) / (warmup_steps + 1))


def _progress(step: int, start: int, end: int) -> float:
    """How far ``step`` is on the way from ``start`` to ``end``, in [0, 1]; 1 from ``end`` on."""
    return 1.0 if step >= end else (step - start) / (end - start)


def _toward(final_factor: float, remaining: float) -> float:
    return final_factor + (1 - final_factor) * remaining


def _check(
    total_steps: int, warmup_steps: int, final_factor: float | None, decay_fraction: float | None
) -> None:
    if total_steps < 1:
        raise UsageError(f"The number of steps must be 1 or more, got {total_steps}.")
    if not 0 <= warmup_steps <= total_steps:
        raise UsageError(
            f"A warm-up of {warmup_steps} steps does not fit in a run of {total_steps} steps."
        )
    if final_factor is not None and not 0 <= final_factor <= 1:
        raise UsageError(f"final_factor must be in [0, 1], got {final_factor}.")
    if decay_fraction is not None and not 0 < decay_fraction <= 1:
        raise UsageError(f"decay_fraction must be in (0, 1], got {decay_fraction}.")


def _checked(settings: PlateauSettings) -> PlateauSettings:
    if not 0 < settings.factor < 1:
        raise UsageError(f"The factor of plateau must be in (0, 1), got {settings.factor}.")
    if settings.patience < 0:
        raise UsageError(f"The patience of plateau must be 0 or more, got {settings.patience}.")
    if settings.threshold < 0 or not 0 <= settings.minimum <= 1:
        raise UsageError(
            "The threshold of plateau must be 0 or more and its minimum in [0, 1], "
            f"got {settings.threshold} and {settings.minimum}."
        )
    return settings
