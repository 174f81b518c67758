"""What a person sees while a run works: a live line on a terminal, plain lines elsewhere.

All of it goes to standard error; results alone go to standard output.
"""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

    from hasten.training.observe import EvaluationInfo, Observer, StepInfo

_PLAIN_SECONDS = 5.0
_SHOWN = (
    "loss",
    "accuracy",
    "macro_f1",
    "perplexity",
    "bits_per_byte",
    "bleu",
    "chrf",
    "exact_match",
    "f1",
)


def build_observer(*, quiet: bool) -> Observer:
    """Returns the observer that fits where standard error goes."""
    if quiet:
        return WarningsOnly()
    return LiveConsole() if sys.stderr.isatty() else PlainConsole()


def say(text: str) -> None:
    """Prints a message to standard error; a reader that has gone does not stop the work."""
    try:
        print(text, file=sys.stderr, flush=True)
    except BrokenPipeError:
        sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115


class WarningsOnly:
    """Prints warnings and nothing else."""

    def note(self, text: str) -> None:
        """Ignores a note."""

    def warn(self, text: str) -> None:
        """Prints a warning."""
        say(f"warning: {text}")

    def step(self, info: StepInfo) -> None:
        """Ignores progress."""

    def evaluation(self, info: EvaluationInfo) -> None:
        """Ignores a measurement."""


class PlainConsole(WarningsOnly):
    """Plain lines, one every few seconds."""

    def __init__(self) -> None:
        self._last = 0.0

    def note(self, text: str) -> None:
        """Prints a decision."""
        say(text)

    def step(self, info: StepInfo) -> None:
        """Prints a progress line, at most one every few seconds."""
        now = time.monotonic()
        if now - self._last >= _PLAIN_SECONDS or info.step == info.total_steps:
            self._last = now
            say(f"step {info.step}/{info.total_steps}  {_progress(info)}")

    def evaluation(self, info: EvaluationInfo) -> None:
        """Prints a measurement."""
        say(_evaluation(info))


class LiveConsole(WarningsOnly):
    """One line that updates itself, with notes and evaluations above it."""

    def __init__(self) -> None:
        from rich.console import Console  # here, since `hasten --help` need not wait for it

        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._progress: Progress | None = None

    def note(self, text: str) -> None:
        """Prints a decision."""
        self._console.print(text, markup=False)

    def warn(self, text: str) -> None:
        """Prints a warning."""
        self._console.print(f"warning: {text}", markup=False, style="yellow")

    def step(self, info: StepInfo) -> None:
        """Moves the line on; removes it after the last step."""
        if self._progress is None:
            from rich.progress import BarColumn, Progress, TextColumn

            self._progress = Progress(
                BarColumn(bar_width=20),
                TextColumn("{task.completed:.0f}/{task.total:.0f}  {task.description}"),
                console=self._console,
                transient=True,
            )
            self._progress.add_task("", total=info.total_steps)
            self._progress.start()
        task = self._progress.task_ids[0]
        self._progress.update(task, completed=info.step, description=_progress(info))
        if info.step == info.total_steps:
            self.close()

    def evaluation(self, info: EvaluationInfo) -> None:
        """Prints a measurement above the line."""
        self._console.print(_evaluation(info), markup=False)

    def close(self) -> None:
        """Removes the live line."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _progress(info: StepInfo) -> str:
    accuracy = "" if info.accuracy is None else f"accuracy {info.accuracy:.3f}  "
    skipped = f"  skipped {info.num_skipped}" if info.num_skipped else ""
    return (
        f"epoch {info.epoch:.1f}  loss {info.loss:.4f}  {accuracy}"
        f"{info.tokens_per_second:,.0f} tokens/s  {duration(info.seconds_left)} left{skipped}"
    )


def _evaluation(info: EvaluationInfo) -> str:
    values = "  ".join(f"{k} {info.metrics[k]:.4f}" for k in _SHOWN if k in info.metrics)
    best = "  best so far" if info.is_best else ""
    lines = [f"{info.split} after epoch {info.epoch:.1f} (step {info.step}): {values}{best}"]
    lines += [f"  {line}" for sample in info.samples for line in sample.split("\n")]
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """Returns a duration for people: 0.4 s, 42 s, 3 min 5 s, 2 h 10 min."""
    if 0 < seconds < 9.95:
        return f"{seconds:.1f} s" if seconds >= 0.05 else "under 0.1 s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def count(number: int, noun: str) -> str:
    """Returns a number and what it counts: 1 step, 1,200 steps."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
