"""What hundreds of GPUs would make of a run: predicted by formulas, measured nowhere.

    model, layout, batch --hasten.parallel.traffic--> bytes by axis --bandwidths--> seconds
                         --floating-point operations--> seconds     --> tokens/s, efficiency

Nothing here has been run on GPUs. The formulas of bytes are those that a test compares with what
processes really issue; bandwidths and arithmetic are assumptions, which stand in the output. Two
step times are given, between which a real one lies unless the assumptions are wrong: communication
hidden behind arithmetic wherever that can be done, and none of it hidden.

    python benchmarks/predicted_scaling.py [--output FILE]
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

from machine import keep

from hasten.model.config import TransformerConfig
from hasten.model.stages import stage_costs
from hasten.parallel.layout import Layout
from hasten.parallel.traffic import (
    KINDS,
    Message,
    StepShape,
    Traffic,
    describe_traffic,
    step_traffic,
)
from hasten.parallel.traffic_weights import held_model

_ALSO_ASSUMED = (
    "AdamW, bf16 products with weights, gradients and residual stream in float32, recomputed "
    "blocks, a fixed global batch, one sequence a GPU at once; activations, the optimizer's time "
    "and reading data are left out"
)
# Of communication on these axes the rest of a block has to wait for; gradients and weights of one
# block travel while another computes.
_WAITED_FOR = ("tensor", "context", "all")


@dataclass(frozen=True)
class Assumptions:
    """The machine that is imagined.

    Attributes:
        gpus_per_host: GPUs of a host.
        peak_flops: of a GPU a second, in bf16.
        achieved_fraction: of them, by matrix products as they come.
        bytes_per_second_inside: that a GPU sends to others of its host.
        bytes_per_second_between: that a GPU sends to other hosts.
        seconds_per_collective: before the first byte is there.
    """

    gpus_per_host: int = 8
    peak_flops: float = 400e12
    achieved_fraction: float = 0.4
    bytes_per_second_inside: float = 450e9
    bytes_per_second_between: float = 50e9
    seconds_per_collective: float = 20e-6


@dataclass(frozen=True)
class Model:
    """A decoder, and what a step gives each GPU of it.

    Attributes:
        name: how it is called here.
        config: of the model.
        length: tokens of a sequence.
        tokens_per_step: of a global batch, the same for any number of GPUs.
        layouts: by number of GPUs, as a person writes them but for what is replicated.
    """

    name: str
    config: TransformerConfig
    length: int
    tokens_per_step: int
    layouts: dict[int, tuple[Layout, ...]]


def decoder(
    num_layers: int, hidden_size: int, num_heads: int, vocab_size: int
) -> TransformerConfig:
    return TransformerConfig(
        vocab_size=vocab_size,
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        max_positions=8192,
        architecture="decoder",
        head="language_modelling",
        activation="swiglu",
        norm="rmsnorm",
        tie_embeddings=False,
    )


MODELS = (
    Model(
        "0.4 billion",
        decoder(24, 1024, 16, 32768),
        2048,
        2**20,
        {
            8: (Layout(replicate=8), Layout(shard=8)),
            64: (Layout(replicate=64), Layout(replicate=8, shard=8)),
            512: (Layout(replicate=512), Layout(replicate=64, shard=8)),
        },
    ),
    Model(
        "7 billion",
        decoder(32, 4096, 32, 32768),
        4096,
        2**22,
        {
            8: (Layout(shard=8), Layout(shard=4, tensor=2)),
            64: (Layout(shard=64), Layout(replicate=8, shard=8), Layout(shard=16, tensor=4)),
            512: (
                Layout(shard=512),
                Layout(replicate=64, shard=8),
                Layout(replicate=16, shard=8, tensor=4),
            ),
        },
    ),
    Model(
        "70 billion",
        decoder(80, 8192, 64, 65536),
        8192,
        2**22,
        {
            64: (Layout(shard=64), Layout(shard=8, tensor=8)),
            512: (
                Layout(shard=512),
                Layout(replicate=8, shard=64),
                Layout(replicate=2, shard=32, tensor=8),
                Layout(replicate=8, shard=8, context=8),
            ),
        },
    ),
)


@dataclass(frozen=True)
class Prediction:
    """One row of the table.

    Attributes:
        gpus: how many.
        model: its name.
        layout: of the processes.
        micro_batches: of each GPU in a step.
        gb_per_gpu: of weights, gradients and AdamW's state that stay on a GPU.
        gb_sent: by a GPU in a step.
        gb_by_kind: the same by kind of collective.
        line: as ``hasten train`` would print it.
        compute_seconds: of a step.
        waiting_seconds: of communication that the next operation needs.
        hideable_seconds: of communication that can go on beside arithmetic.
        hidden_step_seconds: where that is hidden as far as there is arithmetic.
        exposed_step_seconds: where none of it is.
        efficiency: part of a step's time that is arithmetic: with hiding, and without.
        tokens_per_second: with hiding.
    """

    gpus: int
    model: str
    layout: str
    micro_batches: int
    gb_per_gpu: float
    gb_sent: float
    gb_by_kind: dict[str, float]
    line: str
    compute_seconds: float
    waiting_seconds: float
    hideable_seconds: float
    hidden_step_seconds: float
    exposed_step_seconds: float
    efficiency: tuple[float, float]
    tokens_per_second: float


def predict(model: Model, layout: Layout, assumed: Assumptions) -> Prediction:
    """Returns what the formulas say of one model in one layout."""
    sharing = layout.context * layout.tensor
    per_share = model.tokens_per_step // layout.num_batch_shares
    # One sequence a process that shares its rows, so that a GPU always has as many tokens at once.
    tokens = min(per_share, model.length * sharing)
    shape = StepShape(
        tokens=tokens, num_micro_batches=per_share // tokens, product_bytes=2, recompute=True
    )
    traffic = step_traffic(model.config, layout, shape)
    costs = stage_costs(model.config, model.length)
    # Backward costs twice as much as forward, which recomputed blocks run once more.
    flops = model.tokens_per_step * (4 * costs.block * model.config.num_layers + 3 * costs.head)
    compute = flops / layout.size / (assumed.peak_flops * assumed.achieved_fraction)
    waiting = seconds_of(traffic, layout, assumed, waited_for=True)
    hideable = seconds_of(traffic, layout, assumed, waited_for=False)
    hidden, exposed = max(compute + waiting, hideable), compute + waiting + hideable
    num_weights = weights_of(model.config)
    spread = layout.tensor * layout.shard * (1 if layout.has_whole_weights else layout.context)
    return Prediction(
        gpus=layout.size,
        model=model.name,
        layout=str(layout),
        micro_batches=shape.num_micro_batches,
        gb_per_gpu=round(16 * num_weights / spread / 1e9, 2),
        gb_sent=round(traffic.sent_bytes() / 1e9, 3),
        gb_by_kind={kind: round(traffic.sent_bytes(kind) / 1e9, 3) for kind in KINDS},
        line=describe_traffic(traffic),
        compute_seconds=round(compute, 4),
        waiting_seconds=round(waiting, 4),
        hideable_seconds=round(hideable, 4),
        hidden_step_seconds=round(hidden, 4),
        exposed_step_seconds=round(exposed, 4),
        efficiency=(round(compute / hidden, 3), round(compute / exposed, 3)),
        tokens_per_second=round(model.tokens_per_step / hidden),
    )


def weights_of(config: TransformerConfig) -> int:
    """Returns the number of a model's weights."""
    return sum(math.prod(w.shape) for w in held_model(config, Layout()).weights)


def seconds_of(
    traffic: Traffic, layout: Layout, assumed: Assumptions, *, waited_for: bool
) -> float:
    """Returns the time of messages that are waited for, or of the others."""
    return sum(
        message.sent_bytes / bandwidth(message, layout, assumed)
        + message.count * assumed.seconds_per_collective
        for message in traffic.messages
        if (message.axis in _WAITED_FOR) is waited_for
    )


def bandwidth(message: Message, layout: Layout, assumed: Assumptions) -> float:
    """Returns the bytes a second that a GPU sends in a collective.

    Ranks that follow each other share matrices, then rows, then shards, then copies, and hosts
    have ranks that follow each other. Where several of a group are on one host, each link between
    hosts carries a part of what the group sends.
    """
    shards = layout.shard * layout.context
    between = {
        "tensor": 1,
        "context": layout.tensor,
        "shard": layout.tensor,
        "replicate": layout.tensor * (1 if layout.has_whole_weights else shards),
        "all": 1,
    }[message.axis]
    if between * message.num_processes <= assumed.gpus_per_host:
        return assumed.bytes_per_second_inside
    on_host = max(1, assumed.gpus_per_host // between)
    return min(assumed.bytes_per_second_inside, on_host * assumed.bytes_per_second_between)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    for field in dataclasses.fields(Assumptions):
        flag = f"--{field.name.replace('_', '-')}"
        parser.add_argument(flag, type=type(field.default), default=field.default)
    parser.add_argument("--output", type=Path, help="file to keep the result in")
    return parser.parse_args()


def main() -> None:
    arguments = vars(parse_arguments())
    output = arguments.pop("output")
    assumed = Assumptions(**arguments)
    rows = [
        predict(model, layout, assumed)
        for model in MODELS
        for layouts in model.layouts.values()
        for layout in layouts
    ]
    print("Predicted by formulas; nothing of this was measured.")
    for name, value in dataclasses.asdict(assumed).items():
        print(f"  {name}: {value:g}")
    print(f"  {_ALSO_ASSUMED}")
    print()
    print("| model | GPUs | layout | GB on a GPU | GB sent a step | s a step | efficiency |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row.model} | {row.gpus} | `{row.layout}` | {row.gb_per_gpu:,.1f} "
            f"| {row.gb_sent:,.1f} | {row.hidden_step_seconds:,.2f} to "
            f"{row.exposed_step_seconds:,.2f} "
            f"| {100 * row.efficiency[1]:.0f} to {100 * row.efficiency[0]:.0f}% |"
        )
    keep(
        {
            "benchmark": "predicted_scaling",
            "kind": "predicted by formulas, not measured",
            "assumptions": {**dataclasses.asdict(assumed), "also": _ALSO_ASSUMED},
            "models": {
                model.name: {
                    "weights": weights_of(model.config),
                    "length": model.length,
                    "tokens_per_step": model.tokens_per_step,
                }
                for model in MODELS
            },
            "rows": [dataclasses.asdict(row) for row in rows],
        },
        output,
    )


if __name__ == "__main__":
    main()
