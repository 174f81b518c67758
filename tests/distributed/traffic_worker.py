"""One of several processes: takes steps and notes every collective that they issue.

python traffic_worker.py FOLDER      cases.json -> found.json: for each case what each rank issued
"""

from __future__ import annotations

import faulthandler
import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from builders import pack
from hasten.core.batch import PackedBatch
from hasten.model.adapters import TrainedPart
from hasten.model.config import TransformerConfig
from hasten.model.transformer import Transformer
from hasten.optim.optimizers import build_optimizer, parameter_groups
from hasten.parallel.apply import ParallelSettings, apply_parallel
from hasten.parallel.layout import Layout, choose_layout
from hasten.parallel.traffic import KINDS, Kind, StepShape
from hasten.parallel.world import World, joined
from hasten.plan.memory import Load
from hasten.task.generating import token_loss_sum
from hasten.training.step import Parts, StepSettings, run_step

_SECONDS = 300
LENGTH, SOURCE_LENGTH = 7, 5
CLASSIFIER = {"head": "classification", "num_labels": 3}
GENERATOR = {"head": "language_modelling", "architecture": "decoder"}
MODELS: dict[str, dict[str, Any]] = {
    "classifier": CLASSIFIER,
    "tied decoder": GENERATOR,
    "untied decoder": {**GENERATOR, "tie_embeddings": False},
    "encoder_decoder": {**GENERATOR, "architecture": "encoder_decoder", "source_vocab_size": 31},
}
# Sizes that four processes cannot share evenly, and weights of every kind.
UNLIKE = {"qk_norm": True, "num_kv_heads": 2, "activation": "swiglu", "positions": "learned"}
NARROW: dict[str, Any] = {
    "embedding_size": 20,
    "embedding_norm": True,
    "head_dim": 12,
    "first_norm": False,
    "sliding_window": 4,
    "activation": "geglu",
    "qkv_bias": False,
    "head_activation": "tanh",
    "head_norm": True,
}
SANDWICH: dict[str, Any] = {
    "norm_placement": "sandwich",
    "positions": "learned",
    "position_offset": 2,
    "logit_bias": True,
    "logit_scale": 0.5,
}


@dataclass(frozen=True)
class TrafficCase:
    """One step in one layout.

    Attributes:
        model: a name of ours above.
        layout: as a person writes it.
        options: of the model besides.
        optimizer: its name.
        bf16: whether matrices are multiplied in 16 bits.
        recompute: whether blocks are computed again in the backward pass.
        label_smoothing: of token scores.
        per_micro_batch: examples of a micro-batch.
        num_micro_batches: of each share of a batch.
        frozen: patterns of weights that are not trained.
        schedule: of a pipeline.
        micro_batch_tokens: most tokens of a micro-batch; 0 for those of ``per_micro_batch``.
    """

    model: str
    layout: str
    options: dict[str, Any] = field(default_factory=dict)
    optimizer: str = "sgd"
    bf16: bool = False
    recompute: bool = False
    label_smoothing: float = 0.0
    per_micro_batch: int = 2
    num_micro_batches: int = 2
    frozen: tuple[str, ...] = ()
    schedule: str = "1f1b"
    micro_batch_tokens: int = 0

    @property
    def config(self) -> TransformerConfig:
        """The model."""
        sizes: dict[str, Any] = {"vocab_size": 41, "num_layers": 2, "hidden_size": 32}
        sizes |= {"num_heads": 4, "dropout": 0.0, "max_positions": 16}
        return TransformerConfig(**sizes | MODELS[self.model] | self.options)

    def places(self, num_processes: int) -> Layout:
        """Returns the layout."""
        return choose_layout(self.layout, num_processes)

    def load(self, layout: Layout) -> Load:
        """Returns what a step asks of the processes, as the plan of a run has it."""
        tokens = self.per_micro_batch * LENGTH
        return Load(
            tokens_per_step=tokens * self.num_micro_batches * layout.num_batch_shares,
            micro_batch_tokens=self.micro_batch_tokens or tokens,
            lengths=(LENGTH,),
            precision="bf16" if self.bf16 else "float32",
            recompute=self.recompute,
            label_smoothing=self.label_smoothing,
            optimizer=self.optimizer,
            schedule=self.schedule,
            part=TrainedPart(tuple(self.frozen)),
        )

    def shape(self, layout: Layout) -> StepShape:
        """Returns what a step works on; that of a pipeline is the plan's."""
        if layout.pipeline > 1:
            return self.load(layout).step_shape(self.config, layout)
        reads = self.config.architecture == "encoder_decoder"
        return StepShape(
            tokens=self.per_micro_batch * LENGTH,
            num_micro_batches=self.num_micro_batches,
            source_tokens=self.per_micro_batch * SOURCE_LENGTH * reads,
            product_bytes=2 if self.bf16 else 4,
            recompute=self.recompute,
            smooths_labels=self.label_smoothing > 0,
            optimizer=self.optimizer,
            part=TrainedPart(tuple(self.frozen)),
        )


class Collectives(TorchDispatchMode):
    """Notes kind and payload of every collective; one that it does not know is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, list[int]] = {kind: [] for kind in KINDS}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # A sharded tensor's operation is taken apart first, into those that come here again.
        if any(hasattr(kind, "full_tensor") for kind in types):
            return NotImplemented
        if func.namespace in ("c10d", "_c10d_functional", "_dtensor"):
            name = f"{func.namespace}.{func._opname}"
            if name not in _SILENT:
                kind, payload = _PAYLOADS[name]
                self.found[kind].append(payload(args))
        return func(*args, **(kwargs or {}))


def size(tensors: Any) -> int:
    """Returns the bytes of a tensor, or of tensors in lists."""
    return tensors.nbytes if isinstance(tensors, Tensor) else sum(map(size, tensors))


def of_argument(number: int, args: Any) -> int:
    return size(args[number])


def gathered(args: Any) -> int:
    return size(args[0]) * args[1]


_SILENT = {"_c10d_functional.wait_tensor", "_c10d_functional._wrap_tensor_autograd", "c10d.recv_"}
_FIRST, _SECOND = partial(of_argument, 0), partial(of_argument, 1)
# The whole of what is gathered or scattered, as traffic.py defines payloads.
_PAYLOADS: dict[str, tuple[Kind, Callable[[Any], int]]] = {
    "c10d.allreduce_": ("all_reduce", _FIRST),
    "c10d._allgather_base_": ("all_gather", _FIRST),
    "c10d._reduce_scatter_base_": ("reduce_scatter", _SECOND),
    "c10d.alltoall_base_": ("all_to_all", _SECOND),
    "c10d.send": ("send_recv", _FIRST),
    "_c10d_functional.all_reduce": ("all_reduce", _FIRST),
    "_c10d_functional.all_gather_into_tensor": ("all_gather", gathered),
    "_c10d_functional.reduce_scatter_tensor": ("reduce_scatter", _FIRST),
}


def num_told_by_gloo() -> int:
    """Returns how many collectives this process has issued in all its groups, by gloo's count."""
    groups = torch.distributed.distributed_c10d._world.pg_map
    backends = [group._get_backend(torch.device("cpu")) for group in groups]
    return sum(backend._get_sequence_number_for_group() for backend in backends)


class EvenExamples:
    """Examples of one length, so that each process has the same amount of work."""

    def __init__(self, config: TransformerConfig, count: int) -> None:
        self.config = config
        self.lengths = np.full(count, LENGTH)
        self.weights = np.ones(count)

    def pack(self, piece: np.ndarray, weight: float) -> PackedBatch:
        """Returns a batch of examples."""
        draw = np.random.default_rng(int(piece.sum()))

        def texts(length: int) -> list[Tensor]:
            return [torch.from_numpy(draw.integers(0, 31, length)) for _ in piece]

        reads = self.config.architecture == "encoder_decoder"
        own = texts(LENGTH)
        scores_tokens = self.config.head == "language_modelling"
        targets = torch.cat(own).tolist() if scores_tokens else [0] * len(piece)
        sources = texts(SOURCE_LENGTH) if reads else None
        return pack(own, targets=targets, weight=weight, sources=sources)


def loss_sum(outputs: Any, batch: PackedBatch, label_smoothing: float) -> Tensor:
    """Returns the loss of a task."""
    if isinstance(outputs, Tensor):
        return nn.functional.cross_entropy(outputs, batch.targets, reduction="sum")
    return token_loss_sum(outputs, batch, label_smoothing)


def run_case(case: TrafficCase, world: World) -> dict[str, list[int]]:
    """Takes steps; returns payloads of the last one's collectives by kind, and gloo's own count."""
    ranks, device = (
        World(world.place, case.places(world.size), "cpu", world.hosts),
        torch.device("cpu"),
    )
    torch.manual_seed(0)
    model = Transformer.from_config(case.config)
    load = case.load(ranks.layout)
    load.part.apply(model)
    for stack in model.stacks:
        stack.recompute = case.recompute
    computing: Any = nullcontext
    if case.bf16:
        computing = partial(torch.autocast, "cpu", dtype=torch.bfloat16)
    tokens = load.micro_batch_tokens
    settings = ParallelSettings(device, computing, case.schedule, load.num_tokens(ranks.layout))
    parallel = apply_parallel(model, ranks, settings)
    per_round = case.per_micro_batch * ranks.layout.num_batch_shares
    examples: Any = EvenExamples(case.config, per_round * case.num_micro_batches)
    loss = partial(loss_sum, label_smoothing=case.label_smoothing)
    task: Any = SimpleNamespace(loss_sum=loss)
    schedule: Any = SimpleNamespace(factor=lambda step: 1.0)
    groups = parameter_groups(list(model.named_parameters()), weight_decay=0.0)
    parts = Parts(
        model=model,
        parallel=parallel,
        task=task,
        optimizer=build_optimizer(case.optimizer, groups, learning_rate=0.01),
        schedule=schedule,
        penalised=(),
        average=None,
        device=device,
        settings=StepSettings(0, 0.01, tokens, gradient_clip=1.0),
    )
    every = np.arange(len(examples.lengths))
    # In the first two steps DistributedDataParallel settles its buckets; in the first a pipeline's
    # stages find out whether they reach each other.
    num_before = 2 if ranks.layout.has_whole_weights else int(ranks.layout.pipeline > 1)
    for step in range(num_before):
        run_step(parts, examples, every, step)
    before = num_told_by_gloo()
    with Collectives() as collectives:
        run_step(parts, examples, every, num_before)
    return {**collectives.found, "told by gloo": [num_told_by_gloo() - before]}


def main(folder: Path) -> None:
    """Runs every case; rank 0 writes."""
    faulthandler.dump_traceback_later(_SECONDS, exit=True)
    torch.set_num_threads(1)
    cases = [TrafficCase(**case) for case in json.loads((folder / "cases.json").read_text())]
    found = []
    with joined("auto", None, "cpu") as world:
        assert isinstance(world, World)
        for case in cases:
            try:
                found.append(world.gather(run_case(case, world)))
            except Exception as error:
                error.add_note(f"in {case}, rank {world.rank}")
                raise
        if world.is_main:
            (folder / "found.json").write_text(json.dumps(found))
        world.gather(None)  # none leaves before the others are done


if __name__ == "__main__":
    main(Path(sys.argv[1]))
