"""Memory of a process that has all weights, and of one that has a share of them.

    replicate=4, shard=4 --3 steps of AdamW each--> peak above the level after joining --> ratio

The model has 50 million parameters. Predicted is, for P parameters of 4 bytes, R of them outside
blocks and B in a block, and n processes:

    replicate   weights, gradients and two moments = 4 P, and P again when torch orders the buckets
                of gradients anew, before its second step
    shard       4 P / n; R of weights or gradients, and two copies of R and one more that gloo's
                reduce-scatter makes; three of a block; but at least the P that each process
                begins with, since it builds the whole model

and the activations of a micro-batch, which are few here.

    python benchmarks/memory.py [--processes 4] [--output FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine, keep, say

from hasten.core.batch import PackedBatch, SequenceLayout, positions_from_lengths
from hasten.model.transformer import Transformer
from hasten.optim.optimizers import build_optimizer, parameter_groups
from hasten.parallel.apply import ParallelSettings, apply_parallel
from hasten.parallel.launch import launch
from hasten.parallel.world import World, joined
from hasten.training.machine import choose_allocation

_VOCAB, _LAYERS, _WIDTH, _HEADS = 24_000, 12, 512, 8
_OPTIONS: dict[str, Any] = {
    "dropout": 0.0,
    "architecture": "decoder",
    "head": "language_modelling",
    "tie_embeddings": True,
}
_LENGTHS = [64] * 4
_STEPS = 3


def main() -> None:
    """Runs each layout and compares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--output", type=Path, help="file to keep the result in")
    parser.add_argument("--child", nargs=2, metavar=("LAYOUT", "FILE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        measure(arguments.child[0], Path(arguments.child[1]))
        return
    count = arguments.processes
    found = {}
    for axis in ("replicate", "shard"):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "peaks.json"
            command = [sys.executable, __file__, "--child", f"{axis}={count}", str(file)]
            assert launch(command, count, num_threads=1) == 0
            found[axis] = json.loads(file.read_text())
        say(f"{axis}={count}: {found[axis]}")
    predicted = predict(build_model(), count)
    measured = found["shard"]["peak_bytes"] / found["replicate"]["peak_bytes"]
    wanted = predicted["shard"] / predicted["replicate"]
    result: dict[str, Any] = {
        "benchmark": "memory",
        "machine": describe_machine(1),
        "measured": found,
        "predicted_bytes": predicted,
        "measured_ratio": round(measured, 4),
        "predicted_ratio": round(wanted, 4),
        "off_by": round(measured / wanted - 1, 4),
    }
    say(f"shard / replicate: {measured:.3f}, predicted {wanted:.3f}")
    keep(result, arguments.output)


def build_model() -> Transformer:
    """Returns the model that is trained."""
    return Transformer(_VOCAB, _LAYERS, _WIDTH, _HEADS, **_OPTIONS)


def predict(model: Transformer, count: int) -> dict[str, float]:
    """Returns the peak of bytes of a process, by axis, without activations."""
    everything = sum(p.numel() for p in model.parameters())
    block = sum(p.numel() for p in model.blocks[0].parameters())
    rest = everything - block * len(model.blocks)
    return {
        "replicate": 4.0 * (4 * everything + everything),
        "shard": 4.0 * max(everything, 4 * everything / count + 4 * rest + 3 * block),
    }


def measure(layout: str, file: Path) -> None:
    """Trains for a few steps in one of several processes; rank 0 writes what they took."""
    choose_allocation(saves_memory="shard" in layout)
    torch.set_num_threads(1)
    with joined(layout, None, "cpu") as world:
        assert isinstance(world, World)
        train(Transformer(_VOCAB, 1, 8, 1, **_OPTIONS), world)  # loads the code
        before = _memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        built = train(build_model(), world) - before
        peaks = world.gather((_memory("VmHWM") - before, built))
        if world.is_main:
            most = max(peaks)
            file.write_text(json.dumps({"peak_bytes": most[0], "built_bytes": most[1]}))


def train(model: Transformer, world: World) -> int:
    """Takes some steps; returns the peak of memory before the first of them."""
    parallel = apply_parallel(model, world, ParallelSettings(torch.device("cpu")))
    groups = parameter_groups(model.named_parameters(), weight_decay=0.1)
    optimizer = build_optimizer("adamw", groups, learning_rate=1e-4)
    built = _memory("VmHWM")
    batch = PackedBatch(
        torch.randint(_VOCAB, (sum(_LENGTHS),)),
        torch.from_numpy(positions_from_lengths(_LENGTHS)),
        SequenceLayout.from_lengths(_LENGTHS),
        torch.arange(len(_LENGTHS)),
    )
    for _ in range(_STEPS):
        parallel.train_on([batch], _loss, lambda number, stage: None)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return built


def _loss(number: int, outputs: Any) -> torch.Tensor:
    return outputs.hidden_ND.square().mean()


def _memory(name: str) -> int:
    """Returns bytes of this process as the kernel counts them."""
    for line in Path(f"/proc/{os.getpid()}/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise OSError(name)


if __name__ == "__main__":
    main()
