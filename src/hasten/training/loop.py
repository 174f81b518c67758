"""The one loop, for every task: read it from top to bottom.

    order of the epoch -> step -> report -> evaluate -> best model -> checkpoint -> stop?

Its state is ``TrainState`` plus tensors, its place in the data is the step number. Whatever kills
it, ``Loop.resume`` goes on from the newest checkpoint to the same final weights, bit for bit on
CPU.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor

from hasten.core.errors import DivergenceError
from hasten.core.ranks import Ranks
from hasten.core.shards import is_sharded
from hasten.data.examples import Examples
from hasten.data.order import plan_epoch, steps_per_epoch
from hasten.model.search import DecodingSettings
from hasten.optim.state import (
    flatten_optimizer_state,
    load_optimizer_state,
    merge_optimizer_scalars,
    restrict_optimizer_state,
)
from hasten.task.contract import Machine, Meter
from hasten.training.checkpoint import open_newest_checkpoint
from hasten.training.evaluate import evaluate
from hasten.training.observe import EvaluationInfo, MetricsLog, Observer, StepInfo
from hasten.training.precision import first_loss_scale, next_loss_scale
from hasten.training.saving import CheckpointSaver
from hasten.training.state import TrainState
from hasten.training.step import Parts, StepResult, run_step


@dataclass(frozen=True)
class LoopSettings:
    """How long the loop runs and when it looks up.

    Attributes:
        total_steps: optimizer steps of the run.
        tokens_per_step: token budget of a global batch.
        evaluate_every: steps between evaluations; one also follows the last step.
        log_every: steps between reports.
        metric: validation metric that the best model is kept by.
        higher_is_better: of that metric.
        patience: evaluations without progress before the run stops; 0 for never.
        max_skipped_steps: non-finite steps in a row before the run fails.
        checkpoint_seconds: longest time between checkpoints.
        decode_examples: validation examples decoded at each evaluation, where a task decodes.
    """

    total_steps: int
    tokens_per_step: int
    evaluate_every: int
    log_every: int
    metric: str
    higher_is_better: bool
    patience: int
    max_skipped_steps: int
    checkpoint_seconds: float
    decode_examples: int = 0


class Interrupted(BaseException):
    """A signal ended the run after a checkpoint in ``folder``."""

    def __init__(self, signal_number: int, folder: Path) -> None:
        super().__init__(signal_number, folder)
        self.signal_number = signal_number
        self.folder = folder


@dataclass
class Loop:
    """A run in progress.

    Attributes:
        parts: what is trained, and with what.
        train: training examples.
        validation: examples that the best model is chosen by; None where there are none.
        settings: how long, how often.
        folder: the run's folder.
        observer: told what happens.
        state: where the run stands.
        best: weights of the best model so far.
        pace: what has happened since the last report.
        saver: writes checkpoints while training goes on.
    """

    parts: Parts
    train: Examples
    validation: Examples | None
    settings: LoopSettings
    folder: Path
    observer: Observer
    state: TrainState = field(default_factory=TrainState)
    best: dict[str, Tensor] = field(default_factory=dict)
    pace: Pace = field(init=False)
    saver: CheckpointSaver = field(init=False)

    def __post_init__(self) -> None:
        """Begins to count."""
        self.saver = CheckpointSaver(self.folder / "checkpoints", self.parts.parallel.ranks)
        self.pace = Pace(self.parts.task.new_meter())
        self.state.loss_scale = first_loss_scale(self.parts.settings.precision)

    def resume(self) -> int:
        """Puts the newest checkpoint back; returns the length metrics.jsonl had then.

        Each process reads what it has of the weights, into its own storage: where a matrix starts
        in memory changes the last bits of its products.
        """
        parts, ranks = self.parts, self.parts.parallel.ranks
        checkpoint = open_newest_checkpoint(self.folder / "checkpoints", ranks)
        if checkpoint is None:
            return 0
        tensors, scalars = checkpoint.tensors, checkpoint.scalars
        own = dict(parts.model.state_dict())
        checkpoint.read("model", own)
        load_optimizer_state(
            parts.optimizer,
            *restrict_optimizer_state(tensors.get("optimizer", {}), scalars["optimizer"], own),
            fill=partial(checkpoint.read, "optimizer"),
        )
        parts.schedule.load_state_dict(scalars["schedule"])
        if parts.average is not None:
            averages = {n: torch.empty_like(t) for n, t in parts.average.tensors().items()}
            checkpoint.read("average", averages)
            parts.average.load(averages, scalars["average"])
        if "best" in tensors:
            self.best = {
                n: torch.empty_like(t, device=None if is_sharded(t) else "cpu")
                for n, t in own.items()
            }
            checkpoint.read("best", self.best)
        self.state = TrainState.from_dict(scalars["state"])
        pace = {n: torch.empty_like(t, device="cpu") for n, t in tensors["pace"].items()}
        checkpoint.read("pace", pace)
        self.pace.load(pace, with_meter=ranks.speaks_for_share and ranks.of_batch.rank == 0)
        return int(scalars["metrics_bytes"])

    def run(self, log: MetricsLog) -> None:
        """Trains to the end.

        Raises:
            DivergenceError: several steps in a row were not finite.
            Interrupted: a signal arrived; a checkpoint was written first.
            MachineError: a checkpoint cannot be written; it is said at the end of a later step.
        """
        state, settings, ranks = self.state, self.settings, self.parts.parallel.ranks
        per_epoch = steps_per_epoch(self.train.lengths, settings.tokens_per_step)
        saved_at, epoch, batches, train = time.monotonic(), -1, [], self.train
        with _signals() as received, self.saver:
            while state.step < settings.total_steps and not state.stopped_early:
                if epoch != state.step // per_epoch:
                    epoch = state.step // per_epoch
                    train = self.train.in_epoch(epoch)
                    batches = plan_epoch(
                        train.lengths,
                        seed=self.parts.settings.seed,
                        epoch=epoch,
                        num_batches=min(per_epoch, len(train)),
                    )
                # Augmentation can leave fewer examples than the run has steps for an epoch.
                examples = batches[state.step % per_epoch % len(batches)]
                started = time.perf_counter()
                scale = state.loss_scale
                result = run_step(self.parts, train, examples, state.step, self.pace.meter, scale)
                state.step += 1
                state.num_tokens += result.num_tokens
                state.num_positions += result.num_positions
                state.num_attention_positions += result.num_attention_positions
                if result.is_finite:
                    state.skipped_in_a_row = 0
                elif scale > 1:
                    self._lower_scale(log)
                else:
                    self._skip(train.lines(examples.tolist()), log)
                if scale > 1:
                    state.loss_scale, state.loss_scale_steps = next_loss_scale(
                        scale, state.loss_scale_steps, result.is_finite
                    )
                self.pace.add(result, time.perf_counter() - started)
                state.train_seconds += time.perf_counter() - started
                if state.step % settings.log_every == 0 or state.step == settings.total_steps:
                    self._report(result, per_epoch, log)
                due = (
                    state.step % settings.evaluate_every == 0 or state.step == settings.total_steps
                )
                if due:
                    self._evaluate(per_epoch, log)
                late = time.monotonic() - saved_at > settings.checkpoint_seconds
                # Clocks and signals differ among processes: what one has seen, all have.
                late, stops, terminates, are_writing = ranks.any(
                    [late, bool(received), signal.SIGTERM in received, self.saver.is_writing]
                )
                if not are_writing:
                    self.saver.commit()
                if due or late or stops:
                    self.save(log)
                    saved_at = time.monotonic()
                if stops:
                    self.saver.finish()
                    number = signal.SIGTERM if terminates else signal.SIGINT
                    raise Interrupted(number, self.folder)

    def save(self, log: MetricsLog) -> None:
        """Begins a checkpoint of everything that ``resume`` puts back, whatever the layout then."""
        ranks, average = self.parts.parallel.ranks, self.parts.average
        optimizer_tensors, optimizer_scalars = flatten_optimizer_state(self.parts.optimizer)
        tensors = {
            "model": dict(self.parts.model.state_dict()),
            "optimizer": optimizer_tensors,
            "pace": self.pace.tensors(ranks),
            "average": average.tensors() if average is not None else {},
            "best": self.best,
        }
        scalars = {
            "state": self.state.as_dict(),
            "optimizer": merge_optimizer_scalars(
                ranks.gather((list(optimizer_tensors), optimizer_scalars))
            ),
            "schedule": self.parts.schedule.state_dict(),
            "average": average.scalars() if average is not None else None,
            "metrics_bytes": log.length(),
        }
        self.saver.begin(self.state.step, tensors, scalars)

    def _lower_scale(self, log: MetricsLog) -> None:
        """Counts a step that was skipped because it overflowed in float16; the next tries less."""
        self.state.num_skipped += 1
        log.write({"step": self.state.step, "skipped": True, "loss_scale": self.state.loss_scale})

    def _skip(self, lines: dict[str, list[int]], log: MetricsLog) -> None:
        """Counts a step that was not finite, and stops where it was one too many."""
        state = self.state
        state.num_skipped += 1
        state.skipped_in_a_row += 1
        log.write({"step": state.step, "skipped": True, "lines": lines})
        where = f"step {state.step}, {_shortened(lines)}"
        self.observer.warn(f"loss or gradient not finite: the step was skipped ({where})")
        if state.skipped_in_a_row >= self.settings.max_skipped_steps:
            raise DivergenceError(
                f"loss or gradient was not finite in {state.skipped_in_a_row} steps in a row; the "
                f"last: {where}. Try a lower --train.learning_rate."
            )

    def _report(self, last: StepResult, per_epoch: int, log: MetricsLog) -> None:
        state, settings, pace = self.state, self.settings, self.pace
        counted = pace.merged_meter(self.parts.parallel.ranks)
        self.pace = Pace(self.parts.task.new_meter())
        info = StepInfo(
            step=state.step,
            total_steps=settings.total_steps,
            epoch=state.step / per_epoch,
            loss=pace.loss / pace.steps if pace.steps else math.nan,
            accuracy=counted.compute().get("accuracy"),
            learning_rate=last.learning_rate,
            gradient_norm=last.gradient_norm,
            num_tokens=state.num_tokens,
            tokens_per_second=pace.tokens / max(pace.seconds, 1e-9),
            seconds_left=(settings.total_steps - state.step) * state.train_seconds / state.step,
            num_skipped=state.num_skipped,
        )
        entry = {
            "step": info.step,
            "epoch": round(info.epoch, 4),
            "split": "train",
            "loss": info.loss,
            "accuracy": info.accuracy,
            "learning_rate": info.learning_rate,
            "gradient_norm": info.gradient_norm,
            "num_tokens": info.num_tokens,
            "tokens_per_second": round(info.tokens_per_second, 1),
        }
        if state.loss_scale != 1:
            entry["loss_scale"] = state.loss_scale
        log.write(entry)
        self.observer.step(info)

    def _evaluate(self, per_epoch: int, log: MetricsLog) -> None:
        """Measures the validation split; keeps the best weights; counts patience."""
        if self.validation is None:
            return
        state, settings, parts = self.state, self.settings, self.parts
        found = evaluate(
            parts.model,
            parts.task,
            self.validation,
            Machine(parts.device, parts.settings.micro_batch_tokens, parts.parallel.ranks),
            decoding=DecodingSettings(),
            limit=settings.decode_examples,
            average=parts.average,
            parallel=parts.parallel,
        )
        metrics = found.metrics
        is_best = state.record(
            metrics[settings.metric], settings.higher_is_better, loss=metrics["loss"]
        )
        if is_best:
            self.best = self._weights()
        state.evaluations.append({"step": state.step, **metrics})
        is_stuck = state.evaluations_since_best >= settings.patience > 0
        state.stopped_early = is_stuck and state.step < settings.total_steps
        parts.schedule.observe(metrics[settings.metric])
        entry = {"step": state.step, "split": "validation", **metrics, "is_best": is_best}
        log.write({**entry, "train_seconds": round(state.train_seconds, 2)})
        epoch = state.step / per_epoch
        self.observer.evaluation(
            EvaluationInfo(state.step, epoch, "validation", metrics, is_best, found.samples)
        )

    def _weights(self) -> dict[str, Tensor]:
        """Returns copies of the weights that were evaluated: on the host, unless sharded."""
        weights = dict(self.parts.model.state_dict())
        if self.parts.average is not None:
            weights |= self.parts.average.tensors()
        return {
            name: (tensor if is_sharded(tensor) else tensor.cpu()).detach().clone()
            for name, tensor in weights.items()
        }


def _shortened(lines: dict[str, list[int]]) -> str:
    """Writes where examples stand: train.csv lines 3, 8, 12 ..."""
    parts = []
    for name, numbers in lines.items():
        some = ", ".join(map(str, numbers[:8])) + " ..." * (len(numbers) > 8)
        parts.append(f"{name} lines {some}")
    return "; ".join(parts)


class Pace:
    """Sums since the last report."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self.loss = self.seconds = 0.0
        self.tokens = self.steps = 0

    def add(self, result: StepResult, seconds: float) -> None:
        """Adds one step; a skipped one counts in time but not in the loss."""
        self.seconds += seconds
        self.tokens += result.num_tokens
        if result.is_finite:
            self.loss += result.loss
            self.steps += 1

    def merged_meter(self, ranks: Ranks) -> Meter:
        """Returns a meter of what all processes counted; this one's own is used up."""
        if ranks.size == 1:
            return self.meter
        return self.meter.merged(ranks.of_batch.gather(self.meter.state()))

    def tensors(self, ranks: Ranks) -> dict[str, Tensor]:
        """Returns everything as tensors, of all processes together."""
        sums = torch.tensor([self.loss, self.seconds, self.tokens, self.steps], dtype=torch.float64)
        own = self.meter.state()
        counted = self.merged_meter(ranks).state()
        self.meter.load(own)
        return {"sums": sums, **{f"meter.{n}": t for n, t in counted.items()}}

    def load(self, tensors: Mapping[str, Tensor], *, with_meter: bool) -> None:
        """Goes on from ``tensors``; what all processes counted goes on with one of them."""
        self.loss, self.seconds, tokens, steps = tensors["sums"].tolist()
        self.tokens, self.steps = int(tokens), int(steps)
        if with_meter:
            meter = {n.removeprefix("meter."): t for n, t in tensors.items() if n != "sums"}
            self.meter.load(meter)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM instead of dying; a second one ends the process at once."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def remember(number: int, frame: FrameType | None) -> None:
        if received:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        received.append(number)

    numbers = (signal.SIGINT, signal.SIGTERM)
    old = [signal.signal(number, remember) for number in numbers]
    try:
        yield received
    finally:
        for number, handler in zip(numbers, old, strict=True):
            signal.signal(number, handler)
