"""What a step sends is what the formulas say: against every collective that it issues."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from traffic_worker import MODELS, NARROW, SANDWICH, UNLIKE, TrafficCase

from hasten.model.config import TransformerConfig
from hasten.model.stages import StageCosts
from hasten.model.transformer import Transformer
from hasten.parallel.launch import launch
from hasten.parallel.layout import Layout
from hasten.parallel.traffic import (
    KINDS,
    Message,
    StepShape,
    Traffic,
    describe_traffic,
    largest_traffic,
    step_traffic,
)
from hasten.parallel.traffic_weights import held_model

HERE = Path(__file__).parent
_POST = {"norm": "layernorm", "norm_placement": "post", "bias": True}
_OF_TWO = [
    *(
        TrafficCase(model, f"{axis}=2")
        for axis in ("replicate", "shard", "context", "tensor")
        for model in MODELS
    ),
    *(
        TrafficCase("tied decoder", layout, UNLIKE, optimizer="muon", recompute=True)
        for layout in ("replicate=2", "shard=2", "context=2", "tensor=2")
    ),
    TrafficCase("encoder_decoder", "tensor=2", _POST, recompute=True, num_micro_batches=1),
    TrafficCase("encoder_decoder", "context=2", _POST, recompute=True),
    TrafficCase("tied decoder", "tensor=2", bf16=True),
    TrafficCase("tied decoder", "context=2", bf16=True),
    TrafficCase("untied decoder", "tensor=2", {"dropout": 0.1}, recompute=True),
    TrafficCase("tied decoder", "tensor=2", label_smoothing=0.1),
    TrafficCase("tied decoder", "pipeline=2"),
    TrafficCase("classifier", "pipeline=2", {"num_layers": 3}, num_micro_batches=3),
    *(
        TrafficCase(
            model, "pipeline=2", {"num_layers": 5}, num_micro_batches=count, schedule=schedule
        )
        for model, schedule, count in (
            ("tied decoder", "interleaved", 3),
            ("classifier", "interleaved", 1),
            ("untied decoder", "zero-bubble", 3),
            ("classifier", "gpipe", 1),
        )
    ),
    # Shorter than a micro-batch may be, and examples that are longer.
    TrafficCase("tied decoder", "pipeline=2", num_micro_batches=1, micro_batch_tokens=100),
    TrafficCase("classifier", "pipeline=2", num_micro_batches=2, micro_batch_tokens=5),
    *(
        TrafficCase(model, layout, options)
        for model, options in (("classifier", NARROW), ("tied decoder", SANDWICH))
        for layout in ("tensor=2", "context=2", "pipeline=2")
    ),
    TrafficCase("encoder_decoder", "shard=2", {"positions": "relative"}),
    *(
        TrafficCase("classifier", layout, frozen=("embedding", "*.blocks.0.attention", "*.value"))
        for layout in ("replicate=2", "shard=2")
    ),
]
_OF_FOUR = [
    *(
        TrafficCase(model, layout)
        for layout in ("shard=2,tensor=2", "replicate=2,shard=2")
        for model in MODELS
    ),
    TrafficCase("tied decoder", "shard=2,tensor=2", {**UNLIKE, **_POST}, optimizer="muon"),
    TrafficCase("untied decoder", "context=2,tensor=2", UNLIKE, optimizer="muon"),
    TrafficCase("encoder_decoder", "context=2,tensor=2", label_smoothing=0.1),
    TrafficCase("tied decoder", "replicate=2,tensor=2", {"vocab_size": 40}),
    TrafficCase("tied decoder", "shard=2,context=2"),
    TrafficCase("classifier", "replicate=2,context=2"),
    TrafficCase("untied decoder", "pipeline=4", {"num_layers": 5}, num_micro_batches=5),
    TrafficCase("tied decoder", "pipeline=2,shard=2", {"vocab_size": 40}),
    TrafficCase("untied decoder", "pipeline=2,tensor=2"),
    TrafficCase("classifier", "pipeline=2,context=2"),
    TrafficCase("classifier", "pipeline=2,replicate=2"),
    TrafficCase(
        "untied decoder",
        "pipeline=4",
        {"num_layers": 5},
        num_micro_batches=5,
        schedule="zero-bubble",
    ),
    TrafficCase(
        "tied decoder",
        "pipeline=2,shard=2",
        {"vocab_size": 40, "num_layers": 4},
        schedule="interleaved",
    ),
    TrafficCase(
        "untied decoder",
        "pipeline=2,tensor=2",
        label_smoothing=0.1,
        num_micro_batches=1,
        micro_batch_tokens=100,
    ),
    TrafficCase(
        "classifier",
        "pipeline=2,replicate=2",
        num_micro_batches=1,
        micro_batch_tokens=100,
        schedule="zero-bubble",
    ),
    TrafficCase("classifier", "pipeline=2,context=2", num_micro_batches=1, micro_batch_tokens=100),
]


@pytest.mark.slow
@pytest.mark.parametrize(("num_processes", "cases"), [(2, _OF_TWO), (4, _OF_FOUR)])
def test_formulas_are_what_a_step_issues(
    num_processes: int, cases: list[TrafficCase], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "cases.json").write_text(json.dumps([dataclasses.asdict(c) for c in cases]))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (*sys.path, HERE, HERE.parent))))
    command = [sys.executable, str(HERE / "traffic_worker.py"), str(tmp_path)]
    assert launch(command, num_processes, num_threads=1) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    problems = []
    for case, ranks in zip(cases, found, strict=True):
        for rank, issued in enumerate(ranks):
            problems += differences(case, rank, num_processes, issued)
    assert not problems, "\n".join(problems)


def differences(
    case: TrafficCase, rank: int, num_processes: int, issued: dict[str, list[int]]
) -> list[str]:
    """Says where a rank has issued something else than the formulas say."""
    layout, config = case.places(num_processes), case.config
    stage_rank = rank // (num_processes // layout.pipeline)
    shape = case.shape(layout)
    most = step_traffic(config, layout, shape, stage_rank)
    assert most.messages
    # Of a vocabulary that does not go round the first process of a tensor axis has most, and no
    # other less than if the entries left over were not there.
    source, number = config.source_vocab_size, layout.tensor
    smaller = dataclasses.replace(
        config,
        vocab_size=config.vocab_size // number * number,
        source_vocab_size=None if source is None else source // number * number,
    )
    least = step_traffic(smaller, layout, shape, stage_rank) if rank % number else most
    # Nothing has escaped the mode; gloo does not number what is sent between two.
    noted = sum(len(issued[kind]) for kind in KINDS)
    if layout.pipeline == 1 and issued["told by gloo"] != [noted]:
        return [f"{case}, rank {rank}: {noted} noted, and gloo tells of {issued['told by gloo']}"]
    ends = {kind: (least.payload_bytes(kind), most.payload_bytes(kind)) for kind in KINDS}
    return [
        f"{case}, rank {rank}: {kind} {sum(issued[kind])}, not {low} to {high}"
        for kind, (low, high) in ends.items()
        if not low <= sum(issued[kind]) <= high
    ]


def test_what_is_sent_follows_from_payloads():
    config = TransformerConfig(vocab_size=100, num_layers=1, hidden_size=8, num_heads=2)
    size = sum(p.numel() for p in Transformer.from_config(config).parameters())
    (summed, *_) = step_traffic(config, Layout(replicate=4), StepShape(10)).messages
    assert (summed.kind, summed.payload) == ("all_reduce", 4 * size)
    assert summed.sent_bytes == 2 * 4 * size * 3 / 4
    for kind in ("all_gather", "reduce_scatter", "all_to_all"):
        assert Message(kind, "shard", "weights", 4, 100, 3).sent_bytes == 3 * 100 * 3 / 4
    assert Message("send_recv", "pipeline", "hidden states", 4, 100, 3).sent_bytes == 300


def test_one_process_sends_nothing():
    config = TransformerConfig(vocab_size=100, num_layers=1, hidden_size=8, num_heads=2)
    traffic = step_traffic(config, Layout(), StepShape(10))
    assert traffic.messages == () and traffic.sent_bytes() == 0
    assert describe_traffic(traffic) == "nothing is sent"


def test_a_line_says_what_is_sent():
    traffic = Traffic(
        (
            Message("all_gather", "shard", "weights", 2, 4_000_000, 2),
            Message("all_reduce", "replicate", "gradients", 4, 5_000_000, 1),
            Message("all_reduce", "all", "loss and counts", 8, 24, 1),
        )
    )
    expected = "each process sends about 11.5 MB a step: 7.5 MB all-reduce, 4.0 MB all-gather"
    assert describe_traffic(traffic) == expected
    small = Traffic((Message("all_reduce", "all", "loss and counts", 2, 24_000, 1),))
    assert describe_traffic(small) == "each process sends about 24.0 kB a step: mostly all-reduce"
    assert describe_traffic(small, "the first stage").startswith("the first stage sends about 24.0")


def test_the_plan_tells_of_the_stage_that_sends_most():
    config = TransformerConfig(vocab_size=100, num_layers=4, hidden_size=8, num_heads=2)
    layout, shape = Layout(pipeline=4), StepShape(10, num_micro_batches=4)
    sent = [step_traffic(config, layout, shape, rank).sent_bytes() for rank in range(4)]
    # Those in the middle have two neighbours.
    assert sent[0] < sent[1] == largest_traffic(config, layout, shape).sent_bytes()
    assert largest_traffic(config, Layout(shard=2), shape) == step_traffic(
        config, Layout(shard=2), shape
    )


def test_a_pipeline_is_cut_as_its_costs_say():
    config = TransformerConfig(vocab_size=100, num_layers=4, hidden_size=8, num_heads=2)
    layout, even = Layout(pipeline=2), StepShape(10)
    dear_head = dataclasses.replace(even, costs=StageCosts(embedding=0, block=1, head=2))
    blocks = [
        [
            held_model(config, layout, "1f1b", rank, costs=shape.costs).num_blocks[0]
            for rank in (0, 1)
        ]
        for shape in (even, dear_head)
    ]
    assert blocks == [[2, 2], [3, 1]]
    layout = Layout(pipeline=2, replicate=2)
    gradients = [
        step_traffic(config, layout, shape).payload_bytes("all_reduce")
        for shape in (even, dear_head)
    ]
    assert gradients[1] > gradients[0]


def test_bytes_by_hand():
    config = TransformerConfig(
        vocab_size=50,
        num_layers=2,
        hidden_size=24,
        num_heads=4,
        num_kv_heads=2,
        feed_forward_size=20,
        norm="rmsnorm",
        bias=False,
        architecture="decoder",
        head="language_modelling",
    )
    block = 2 * 24 * 24 + 2 * 24 * 12 + 2 * 24 * 20 + 2 * 24
    rest = 50 * 24 + 24
    shape = StepShape(7, num_micro_batches=3)
    traffic = step_traffic(config, Layout(shard=2), shape)
    assert traffic.payload_bytes("all_gather") == 4 * 3 * (2 * 2 * block + rest)
    assert traffic.payload_bytes("reduce_scatter") == 4 * (2 * block + rest)
    # Filler makes 8 rows of 7; a block has two inputs and two outputs, and both ways.
    traffic = step_traffic(config, Layout(tensor=2), shape)
    assert traffic.payload_bytes("reduce_scatter") == 4 * 3 * 8 * 24 * (2 * 2 * 2)
    assert traffic.payload_bytes("all_gather") == 4 * 3 * 8 * 24 * (2 * 2 * 2 + 2)
    loss, embeddings, norms = 3 * 7 * (24 + 3), 3 * 8 * 24, 5 * 24
    assert traffic.payload_bytes("all_reduce") == 4 * (loss + embeddings + norms + 1) + 3 * 8
    # 4 rows of 8; queries and outputs have 4 heads, keys and values 2, of 6 elements each.
    traffic = step_traffic(config, Layout(context=2), shape)
    assert traffic.payload_bytes("all_to_all") == 4 * 3 * 4 * 6 * (2 * 4 + 2 * 2) * 2 * 2
    # One border, forward and backward; the head and the embedding are tied.
    traffic = step_traffic(config, Layout(pipeline=2), shape)
    assert traffic.payload_bytes("send_recv") == 4 * 3 * 7 * 24
    assert traffic.payload_bytes("all_reduce") == 4 * (50 * 24 + 1) + 3 * 8


def test_counting_draws_no_random_numbers():
    before = torch.get_rng_state()
    config = TransformerConfig(vocab_size=100, num_layers=1, hidden_size=8, num_heads=2)
    step_traffic(config, Layout(shard=2), StepShape(10))
    assert torch.equal(before, torch.get_rng_state())
