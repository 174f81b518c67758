"""How long training waits for a checkpoint.

    alone, shard=N --steps of AdamW, a save every few of them--> seconds that the loop waits
                   --the same saves, waited for---------------> seconds that they take

The model has 50 million parameters; saved are its weights, two moments, the averaged and the best
weights: five numbers for each. The loop waits for the copies that it makes first and for the commit
at the end of a later step. Steps in between share processor and disk with the writing, so they are
timed too. Shares are of the default interval between checkpoints.

    python benchmarks/checkpoints.py [--processes 2] [--rounds 3] [--output FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from machine import available_threads, describe_machine, keep, say
from memory import build_model
from torch import Tensor

from hasten.config.schema import TrainConfig
from hasten.core.batch import PackedBatch, SequenceLayout, positions_from_lengths
from hasten.core.ranks import ALONE, Ranks
from hasten.optim.averaging import WeightAverage
from hasten.optim.optimizers import build_optimizer, parameter_groups
from hasten.optim.state import flatten_optimizer_state
from hasten.parallel.apply import ParallelSettings, apply_parallel
from hasten.parallel.launch import launch
from hasten.parallel.world import joined
from hasten.training.machine import choose_allocation
from hasten.training.saving import CheckpointSaver

_LENGTHS = [64] * 8
_STEPS = 6  # that are timed without a save


def main() -> None:
    """Runs each way and compares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="saves of each kind")
    parser.add_argument("--output", type=Path, help="file to keep the result in")
    parser.add_argument("--child", nargs=2, metavar=("LAYOUT", "FILE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        layout, file = arguments.child
        with joined(layout, None, "cpu") if layout != "alone" else nullcontext(ALONE) as ranks:
            measure(ranks, "shard" in layout, arguments.rounds, Path(file))
        return
    threads, interval = available_threads(), 60 * TrainConfig().checkpoint_minutes
    found: dict[str, Any] = {}
    for layout, count in (("alone", 1), (f"shard={arguments.processes}", arguments.processes)):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "found.json"
            command = [sys.executable, __file__, "--rounds", str(arguments.rounds)]
            command += ["--child", layout, str(file)]
            assert launch(command, count, num_threads=max(1, threads // count)) == 0
            one = json.loads(file.read_text())
        for name in ("waited", "lost", "waited_for"):
            one[f"{name}_share"] = round(one[f"{name}_seconds"] / interval, 5)
        found[layout] = one
        say(
            f"{layout}: the loop waits {one['waited_seconds']:.2f} s for a checkpoint "
            f"({one['waited_share']:.2%} of {interval:.0f} s), with slower steps it loses "
            f"{one['lost_seconds']:.2f} s; a save that is waited for takes "
            f"{one['waited_for_seconds']:.2f} s"
        )
    result = {
        "benchmark": "checkpoints",
        "machine": describe_machine(threads),
        "interval_seconds": interval,
        "measured": found,
    }
    keep(result, arguments.output)


def measure(ranks: Ranks, is_sharded: bool, rounds: int, file: Path) -> None:
    """Trains and saves in one of several processes; rank 0 writes what that took."""
    choose_allocation(saves_memory=is_sharded)
    take_step, tensors = _begin_training(ranks)
    plain = statistics.median(_seconds(take_step) for _ in range(_STEPS))
    saver = CheckpointSaver(file.parent / "checkpoints", ranks)
    waited, lost, waited_for = [], [], []
    numbers = iter(range(2 * rounds))

    def begin() -> None:
        saver.begin(next(numbers), tensors(), {})

    for _ in range(rounds):
        wait, slower, are_writing = _seconds(begin), 0.0, True
        while are_writing:
            slower += _seconds(take_step) - plain
            (are_writing,) = ranks.any([saver.is_writing])
        wait += _seconds(saver.commit)
        waited.append(wait)
        lost.append(wait + slower)
        waited_for.append(_seconds(begin) + _seconds(saver.finish))
    if ranks.is_main:
        checkpoint = sorted((file.parent / "checkpoints").iterdir())[-1]
        found = {
            "checkpoint_bytes": sum(path.stat().st_size for path in checkpoint.iterdir()),
            "step_seconds": round(plain, 4),
            "waited_seconds": round(statistics.median(waited), 4),
            "lost_seconds": round(statistics.median(lost), 4),
            "waited_for_seconds": round(statistics.median(waited_for), 4),
        }
        file.write_text(json.dumps(found))


def _begin_training(
    ranks: Ranks,
) -> tuple[Callable[[], None], Callable[[], dict[str, dict[str, Tensor]]]]:
    """Returns what takes a step, and what returns all that a checkpoint holds."""
    model = build_model()
    parallel = apply_parallel(model, ranks, ParallelSettings(torch.device("cpu")))
    groups = parameter_groups(model.named_parameters(), weight_decay=0.1)
    optimizer = build_optimizer("adamw", groups, learning_rate=1e-4)
    average = WeightAverage(model.named_parameters(), decay=0.99)
    batch = PackedBatch(
        torch.randint(model.config.vocab_size, (sum(_LENGTHS),)),
        torch.from_numpy(positions_from_lengths(_LENGTHS)),
        SequenceLayout.from_lengths(_LENGTHS),
        torch.arange(len(_LENGTHS)),
    )

    def take_step() -> None:
        parallel.train_on([batch], _loss, lambda number, stage: None)
        optimizer.step()
        average.update()
        optimizer.zero_grad(set_to_none=True)

    take_step()
    best = {name: tensor.detach().clone() for name, tensor in average.tensors().items()}

    def tensors() -> dict[str, dict[str, Tensor]]:
        return {
            "model": dict(model.state_dict()),
            "optimizer": flatten_optimizer_state(optimizer)[0],
            "average": average.tensors(),
            "best": best,
        }

    return take_step, tensors


def _loss(number: int, outputs: Any) -> Tensor:
    return outputs.hidden_ND.square().mean()


def _seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
