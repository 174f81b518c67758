"""Runs a case, alone or with other processes: the same code for both.

Case + processes --prepare--> Loop --run_step--> Found: steps, metrics, whole tensors
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial, partialmethod
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from layout_cases import Case
from safetensors.torch import load_file
from torch import Tensor, nn

from builders import Recorder, default_dtype
from hasten.config.load import build_config
from hasten.core.ranks import ALONE, Ranks
from hasten.core.shards import local_part
from hasten.data.examples import Examples
from hasten.data.order import deal_micro_batches, plan_epoch, steps_per_epoch
from hasten.model.config import TransformerConfig
from hasten.model.search import DecodingSettings
from hasten.model.transformer import Transformer
from hasten.optim.state import flatten_optimizer_state
from hasten.parallel.layout import Layout, choose_layout
from hasten.parallel.world import World
from hasten.task.contract import Machine
from hasten.training import build
from hasten.training.build import build_loop, plan_run
from hasten.training.checkpoint import copy_into, gather_tensors
from hasten.training.evaluate import evaluate
from hasten.training.loop import Loop
from hasten.training.observe import NoLog
from hasten.training.precision import convert_matrices
from hasten.training.step import run_step

TIMING = ("seconds", "tokens_per_second")
DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass
class Found:
    """What came of a case.

    Attributes:
        steps: of each step what can be compared.
        extra_positions: of each step, positions that passed only because all have to take part,
            or to fill a stream up.
        masks: of each step and share of a batch, where dropout was on, what it dropped: shape and
            hash.
        metrics: of the validation split.
        samples: decoded texts.
        trained: what was counted in training.
        problems: what is not the same in all processes, or has changed and must not.
        tensors: whole weights, averages and optimizer state.
    """

    steps: list[dict[str, Any]] = field(default_factory=list)
    extra_positions: list[int] = field(default_factory=list)
    masks: list[list[Any]] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    samples: list[str] = field(default_factory=list)
    trained: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)


def run_case(case: Case, data: Path, folder: Path, world: Ranks = ALONE) -> Found:
    """Trains and measures; all processes of ``world`` have to take part.

    Args:
        case: what to run.
        data: where ``write_data`` has written.
        folder: for a checkpoint.
        world: the processes.
    """
    found = Found()
    with default_dtype(DTYPES[case.dtype]):
        loop = prepare(case, data, folder, in_layout(world, case.layout))
        for step in range(case.num_steps):
            if case.goes_on_with is not None and step == case.num_steps // 2:
                loop.state.step = step
                ranks = in_layout(world, case.goes_on_with)
                loop = saved_and_resumed(loop, prepare(case, data, folder, ranks), found, world)
            take_step(case, loop, step, found)
        found.trained = loop.pace.merged_meter(loop.parts.parallel.ranks).compute()
        measure(loop, found)
        note_tensors(loop, found)
    return found


_WORLDS: dict[str, World] = {}


def in_layout(world: Ranks, layout: str) -> Ranks:
    """Returns the processes of ``world`` in a layout."""
    if layout == "alone":
        return ALONE
    assert isinstance(world, World)
    if layout not in _WORLDS:  # each opens connections of its own
        chosen = choose_layout(layout, world.size)
        _WORLDS[layout] = World(world.place, chosen, "cpu", world.hosts)
    return _WORLDS[layout]


@contextmanager
def tracing_only() -> Iterator[None]:
    """Compiles without making code, for which a machine may have nothing, and every case anew."""
    torch._dynamo.reset()
    plain = nn.Module.compile
    with (
        mock.patch.object(nn.Module, "compile", partialmethod(plain, backend="aot_eager")),
        mock.patch("shutil.which", return_value="traced"),
    ):
        yield


@contextmanager
def rounding_only() -> Iterator[None]:
    """Rounds to 8 bits and multiplies in float32, for devices without such units."""
    emulated = partial(convert_matrices, emulates=True)
    with (
        mock.patch.object(build, "convert_matrices", emulated),
        mock.patch.object(build, "choose_precision", lambda wanted, *_: (wanted, "", None)),
    ):
        yield


def prepare(case: Case, data: Path, folder: Path, ranks: Ranks) -> Loop:
    """Plans and builds a case's run."""
    compiling = tracing_only() if case.settings.get("train.compile") else nullcontext()
    rounding = rounding_only() if case.precision == "fp8" else nullcontext()
    with compiling, rounding, other_models(case.options):
        return _prepare(case, data, folder, ranks)


@contextmanager
def other_models(options: dict[str, Any]) -> Iterator[None]:
    """Builds models with other options, and with a bias of tokens that is not 0."""
    build = Transformer.from_config

    def build_other(config: TransformerConfig) -> Transformer:
        model = build(dataclasses.replace(config, **options))
        bias = dict(model.named_buffers()).get("head.bias")
        if bias is not None:
            bias.copy_(torch.linspace(-2, 2, len(bias)))
        return model

    with mock.patch.object(Transformer, "from_config", build_other):
        yield


def _prepare(case: Case, data: Path, folder: Path, ranks: Ranks) -> Loop:
    overrides = {"data.train": f"{case.task}.csv", **case.overrides}
    for key in ("data.train", "data.validation"):
        if key in overrides:
            overrides[key] = str(data / overrides[key])
    loop = build_loop(
        plan_run(build_config(overrides=overrides), Recorder()), folder, Recorder(), ranks
    )
    if case.weights is not None:
        weights, own = load_file(data / case.weights), loop.parts.model.state_dict()
        copy_into(loop.parts.model, {n: weights[n] for n in own}, case.weights)
    return loop


def saved_and_resumed(loop: Loop, new: Loop, found: Found, world: Ranks) -> Loop:
    """Goes on with another loop by way of a checkpoint, and notes what is not the same there.

    Args:
        loop: that has trained.
        new: that goes on, of the same folder.
        found: where problems are noted.
        world: the processes; in the layout ``alone`` one of them saves.
    """
    ranks, before = loop.parts.parallel.ranks, whole_tensors(loop)
    before = {name: tensor.clone() for name, tensor in before.items()}
    if ranks.size > 1 or world.is_main:
        loop.save(NoLog())
        loop.saver.finish()
    world.gather(None)
    new.resume()
    assert new.state.step == loop.state.step
    after = whole_tensors(new)
    if not world.is_main:
        return new
    found.problems += [
        f"{name} is not what was saved"
        for name in before.keys() | after.keys()
        if name not in before
        or name not in after
        or before[name].dtype != after[name].dtype
        or not before[name].equal(after[name])
    ]
    files = sorted((loop.folder / "checkpoints").glob(f"step-{loop.state.step:08d}/*.safetensors"))
    for group in {name.partition("/")[0] for name in before}:
        own = [load_file(file) for file in files if file.name.startswith(group)]
        num_written = sum(tensor.numel() for some in own for tensor in some.values())
        num_held = sum(t.numel() for name, t in before.items() if name.startswith(group))
        if len(own) != ranks.size or num_written != num_held:
            found.problems.append(f"{len(own)} files hold {num_written} of {num_held} in {group}")
    return new


def take_step(case: Case, loop: Loop, step: int, found: Found) -> None:
    """Takes the step that the loop itself would take, and notes what came of it."""
    train, examples = batch_of(loop, step)
    ranks, parts = loop.parts.parallel.ranks, loop.parts
    is_poisoned = step == case.poisoned_step
    if is_poisoned:
        second_longest = examples[np.lexsort((examples, train.lengths[examples]))][-2]
        # The longest goes to rank 0 and this one to rank 1.
        overflows = case.precision == "fp16"
        poisoned: Any = Poisoned(parts.task, int(second_longest), overflows=overflows)
        parts = dataclasses.replace(parts, task=poisoned)
    masks: list[Any] = []
    dropout = parts.model.stacks[0].dropout
    hook = dropout.register_forward_hook(lambda *seen: masks.append(seen[-1]))
    before = digest(loop)
    scale = loop.state.loss_scale
    result = run_step(parts, train, examples, step, loop.pace.meter, scale)
    hook.remove()
    if case.has_dropout:
        masks = [mask_of(output) for output in masks]
        of_shares: dict[int, list[Any]] = {}
        everyone = ranks.gather((ranks.of_batch.rank, masks))[: ranks.stage_size]
        for rank, (share, dropped) in enumerate(everyone):
            if of_shares.setdefault(share, dropped) != dropped:
                found.problems.append(f"step {step}: rank {rank} drops other units")
        found.masks.append(list(of_shares.values()))
    facts = {
        "loss": result.loss,
        "gradient_norm": result.gradient_norm,
        "num_tokens": result.num_tokens,
        "num_positions": result.num_positions,
        "is_finite": result.is_finite,
    }
    found.steps.append(facts)
    found.extra_positions.append(extra_positions(loop, train, examples))
    for rank, (others, changed) in enumerate(ranks.gather((facts, digest(loop) != before))):
        if repr(others) != repr(facts):
            found.problems.append(f"step {step}: rank {rank} says {others}, rank 0 {facts}")
        if changed is is_poisoned:
            found.problems.append(f"step {step}: weights of rank {rank}: changed is {changed}")


def extra_positions(loop: Loop, train: Examples, examples: np.ndarray) -> int:
    """Returns the positions of a step that pass for no example."""
    parts = loop.parts
    rounds = deal_micro_batches(
        examples,
        train.lengths,
        parts.settings.micro_batch_tokens,
        parts.parallel.ranks.of_batch.size,
    )
    extra = 0
    for pieces in zip(*rounds, strict=True):
        batches = [train.pack(piece if len(piece) else examples[:1]) for piece in pieces]
        extra += sum(batch.num_positions for batch in parts.parallel.filled(batches))
        real = [train.pack(piece) for piece in pieces if len(piece)]
        extra -= sum(batch.num_positions for batch in real)
    return extra


def batch_of(loop: Loop, step: int) -> tuple[Examples, np.ndarray]:
    """Returns the examples of a step's epoch, and the numbers of those of its batch."""
    per_epoch = steps_per_epoch(loop.train.lengths, loop.settings.tokens_per_step)
    epoch = step // per_epoch
    train = loop.train.in_epoch(epoch)
    batches = plan_epoch(train.lengths, seed=0, epoch=epoch, num_batches=min(per_epoch, len(train)))
    return train, batches[step % per_epoch % len(batches)]


def mask_of(output: Tensor) -> tuple[list[int], str]:
    """Returns the shape of an output and a hash of where it is zero."""
    zeros = (output == 0).numpy()
    assert 0.3 < zeros.mean() < 0.7
    return list(zeros.shape), hashlib.sha256(zeros.tobytes()).hexdigest()


def measure(loop: Loop, found: Found) -> None:
    """Notes the metrics of the validation split."""
    parts, ranks = loop.parts, loop.parts.parallel.ranks
    assert loop.validation is not None
    ended = evaluate(
        parts.model,
        parts.task,
        loop.validation,
        Machine(parts.device, parts.settings.micro_batch_tokens, ranks),
        decoding=DecodingSettings(max_new_tokens=40),
        average=parts.average,
        parallel=parts.parallel,
    )
    found.metrics = {k: v for k, v in ended.metrics.items() if k not in TIMING}
    found.samples = list(ended.samples)


def note_tensors(loop: Loop, found: Found) -> None:
    """Notes the whole tensors; processes that hold the same part must hold the same values."""
    ranks = loop.parts.parallel.ranks
    found.tensors = whole_tensors(loop)
    if isinstance(ranks, World):
        held: dict[tuple[int, ...], str] = {}
        for rank, one in enumerate(ranks.gather(digest(loop))):
            if held.setdefault(part_of(rank, ranks.layout), one) != one:
                found.problems.append(f"rank {rank} holds other values than those of its part")


def whole_tensors(loop: Loop) -> dict[str, Tensor]:
    """Returns everything that a step changes, whole; of several processes on rank 0 only."""
    found: dict[str, Tensor] = {}
    for group, tensors in trained_tensors(loop).items():
        whole = gather_tensors(tensors, loop.parts.parallel.ranks)
        found |= {f"{group}/{name}": tensor for name, tensor in whole.items()}
    return found


def part_of(rank: int, layout: Layout) -> tuple[int, ...]:
    """Returns which part of the weights a process holds."""
    stage, place = divmod(rank, layout.size // layout.pipeline)
    if layout.has_whole_weights:
        return (stage,)
    is_sharded = layout.shard > 1 or layout.pipeline == 1
    shards = layout.shard * layout.context if is_sharded else 1
    return stage, place % layout.tensor, place // layout.tensor % shards


def trained_tensors(loop: Loop) -> dict[str, dict[str, Tensor]]:
    """Returns everything that a step changes, as this process holds it."""
    optimizer, _ = flatten_optimizer_state(loop.parts.optimizer)
    average = loop.parts.average
    return {
        "model": dict(loop.parts.model.state_dict()),
        "optimizer": optimizer,
        "average": {} if average is None else average.tensors(),
    }


def digest(loop: Loop) -> str:
    """Returns a hash of what a step changes, of the parts that this process holds."""
    found = hashlib.sha256()
    for tensors in trained_tensors(loop).values():
        for tensor in tensors.values():
            found.update(local_part(tensor).detach().contiguous().numpy().tobytes())
    return found.hexdigest()


class Poisoned:
    """A task in which the loss of one example is NaN, or its gradient too large for 16 bits."""

    def __init__(self, task: Any, example: int, *, overflows: bool) -> None:
        self.task, self.example, self.overflows = task, example, overflows

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)

    def loss_sum(self, outputs: Any, batch: Any) -> Tensor:
        """Returns the loss of the task."""
        loss = self.task.loss_sum(outputs, batch)
        if self.example not in batch.example_ids.tolist():
            return loss
        if not self.overflows:
            return loss * float("nan")
        if loss.requires_grad:
            loss.register_hook(lambda gradient: gradient * 2.0**20)
        return loss
