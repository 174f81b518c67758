"""A model cut into stages learns what the whole one does; stages are as even as can be."""

# pyright: reportPrivateImportUsage=false
# The stores have no other public name as of torch 2.13.

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pipeline_cases import CASES, PipelineCase, PipelineFound, run_alone
from safetensors.torch import load_file

from builders import gradients, pack, random_sequences, small_model
from hasten.core.batch import PackedBatch
from hasten.core.errors import UsageError
from hasten.model.config import TransformerConfig
from hasten.model.stages import StageCosts, keep_stages, stage_costs
from hasten.parallel.launch import launch
from hasten.parallel.pipeline import Pipeline
from hasten.parallel.pipeline_plan import SCHEDULES, cut_blocks, find_schedule, num_stages
from hasten.parallel.pipeline_stage import cut_model

HERE = Path(__file__).parent
# Of losses, relative; of tensors, relative to the largest value.
TOLERANCE = 1e-10
# A softmax over its scores takes no notice of what all of them have in common.
WITHOUT_EFFECT = ("head.scorer.bias", "key.bias")


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [2, 4])
def test_a_pipeline_learns_what_one_process_does(num_processes: int, tmp_path: Path, monkeypatch):
    together = run_together(num_processes, tmp_path, monkeypatch)
    problems = []
    of_dropout: dict[PipelineCase, PipelineFound] = {}
    for case, found in zip(CASES[num_processes], together, strict=True):
        problems += [f"{case}: {problem}" for problem in found.problems]
        if not case.dropout:
            problems += [f"{case}: {one}" for one in differences(run_alone(case), found)]
        elif case in of_dropout:
            first = of_dropout[case]
            same = all(first.tensors[name].equal(found.tensors[name]) for name in first.tensors)
            if first.losses != found.losses or not same:
                problems.append(f"{case}: a second run is not the first")
        else:
            of_dropout[case] = found
    assert not problems, "\n".join(problems)
    assert all(len(set(found.losses)) > 1 for found in of_dropout.values())


def run_together(
    num_processes: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> list[PipelineFound]:
    """Runs cases in processes of their own; returns what each came to."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (*sys.path, HERE, HERE.parent))))
    worker = str(HERE / "pipeline_worker.py")
    command = [sys.executable, worker, str(folder), str(num_processes)]
    assert launch(command, num_processes, num_threads=1) == 0
    found = [PipelineFound(**one) for one in json.loads((folder / "found.json").read_text())]
    for full_name, tensor in load_file(folder / "found.safetensors").items():
        number, _, name = full_name.partition("/")
        found[int(number)].tensors[name] = tensor
    return found


def differences(alone: PipelineFound, together: PipelineFound) -> list[str]:
    """Says what differs by more than rounding."""
    problems = [
        f"step {step}: the loss is {other!r}, alone {one!r}"
        for step, (one, other) in enumerate(zip(alone.losses, together.losses, strict=True))
        if not math.isclose(one, other, rel_tol=TOLERANCE)
        and not (math.isnan(one) and math.isnan(other))
    ]
    if names := alone.tensors.keys() ^ together.tensors.keys():
        return [*problems, f"tensors that only one has: {sorted(names)}"]
    for name, tensor in alone.tensors.items():
        other = together.tensors[name]
        if not torch.equal(tensor.isnan(), other.isnan()):
            problems.append(f"{name}: not a number in other places")
        tensor, other = tensor.nan_to_num(0.0), other.nan_to_num(0.0)
        difference, largest = float((other - tensor).abs().max()), float(tensor.abs().max())
        if difference > TOLERANCE * largest and not name.endswith(WITHOUT_EFFECT):
            problems.append(f"{name}: differs by {difference:.2g}, where {largest:.2g} is largest")
    return problems


prices = st.floats(0.0, 10.0)


@given(costs=st.lists(prices, min_size=1, max_size=9), data=st.data(), before=prices, after=prices)
def test_the_dearest_stage_is_as_cheap_as_can_be(costs, data, before, after):
    count = data.draw(st.integers(1, len(costs)))
    spans = cut_blocks(costs, count, before=before, after=after)
    assert len(spans) == count and all(spans)
    assert [block for span in spans for block in span] == list(range(len(costs)))

    def dearest(bounds) -> float:
        stages = [sum(costs[a:b]) for a, b in pairwise(bounds)]
        stages[0] += before
        stages[-1] += after
        return max(stages)

    inner = combinations(range(1, len(costs)), count - 1)
    best = min(dearest((0, *cuts, len(costs))) for cuts in inner)
    found = dearest((0, *(span.stop for span in spans)))
    assert found == pytest.approx(best, rel=1e-9, abs=1e-9)


def test_a_dear_head_has_fewer_blocks_before_it():
    shape = {"num_layers": 12, "hidden_size": 64, "num_heads": 4, "head": "language_modelling"}
    blocks = {}
    for vocab_size in (10, 5000):
        costs = stage_costs(TransformerConfig(vocab_size=vocab_size, **shape))
        spans = cut_blocks([costs.block] * 12, 2, before=costs.embedding, after=costs.head)
        blocks[vocab_size] = [len(span) for span in spans]
    assert blocks == {10: [6, 6], 5000: [9, 3]}
    model = small_model(num_layers=4)
    (stage,) = cut_model(model, SCHEDULES["1f1b"], 0, 2, costs=StageCosts(0.0, 1.0, 2.0))
    assert len(stage.blocks) == 3


def test_what_blocks_cost_is_what_their_matrices_have():
    model = small_model(num_kv_heads=2, activation="swiglu", bias=False, num_layers=1)
    entries = sum(p.numel() for p in model.blocks[0].parameters() if p.ndim == 2)
    assert stage_costs(model.config).block == 2 * entries
    assert stage_costs(model.config, length=10).block == 2 * entries + 4 * 32 * 10
    options = {"head_dim": 12, "activation": "geglu", "embedding_size": 20, "positions": "none"}
    model = small_model(num_layers=1, bias=False, **options)
    entries = sum(p.numel() for p in model.blocks[0].parameters() if p.ndim == 2)
    costs = stage_costs(model.config, length=10)
    assert costs.block == 2 * entries + 4 * (4 * 12) * 10
    assert costs.embedding == 20 + 2 * 20 * 32


def test_stages_have_each_parameter_of_the_whole_model_once():
    decoder: dict[str, Any] = {"architecture": "decoder", "head": "language_modelling"}
    positions = {"positions": "learned", "position_offset": 2, "embedding_norm": True}
    narrow = {**positions, "embedding_size": 20, "head_activation": "tanh", "head_norm": True}
    sandwich = {**decoder, **positions, "norm_placement": "sandwich", "logit_bias": True}
    for options in ({}, decoder, narrow, sandwich):
        whole = small_model(num_layers=7, **options)
        wanted = dict(whole.named_parameters())
        found: list[str] = []
        for rank in range(3):
            model = small_model(num_layers=7, **options)
            stages = cut_model(model, SCHEDULES["interleaved"], rank, 3)
            assert [stage.number for stage in stages] == [rank, rank + 3]
            for name, parameter in model.named_parameters():
                assert torch.equal(parameter, wanted[name])
            found += [name for name, _ in model.named_parameters()]
            held = {id(p) for stage in stages for p in stage.parameters()}
            assert held == {id(p) for p in model.parameters()}
        tied = ["embedding.tokens.weight"] if "head" in options else []
        assert sorted(found) == sorted([*wanted, *tied])


def test_what_cannot_be_cut_is_refused():
    with pytest.raises(UsageError, match=r"no pipeline schedule '1f1d'.*Did you mean '1f1b'\?"):
        find_schedule("1f1d")
    with pytest.raises(UsageError, match=r"4 .*need as many blocks.* has 3: --model.num_layers 4"):
        cut_blocks([1.0] * 3, 4)
    with pytest.raises(UsageError, match=r"interleaved or zero-bubble\.$"):
        num_stages(find_schedule("1f1b"), 2, stages_per_rank=2)
    both = small_model(architecture="encoder_decoder", head="language_modelling")
    with pytest.raises(UsageError, match="encoder_decoder cannot be cut"):
        cut_model(both, SCHEDULES["gpipe"], 0, 2)


def test_a_model_keeps_the_blocks_it_is_told_to():
    model = small_model(num_layers=4, norm_placement="post")
    keep_stages(model, [1, 2], has_first=False, has_last=False)
    names = {name.split(".")[2] for name, _ in model.named_parameters()}
    assert names == {"1", "2"} and len(model.blocks) == 2


@pytest.fixture
def alone() -> Iterator[Any]:
    """A process group of this process alone."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


def test_a_pipeline_of_one_says_what_is_wrong_as_a_model_does(alone: Any, double_precision):
    schedule = find_schedule("gpipe")
    model = small_model(max_positions=16)
    pipeline = Pipeline(
        model,
        cut_model(model, schedule, 0, 1),
        schedule,
        alone,
        num_tokens=[20, 40],
        device=torch.device("cpu"),
    )
    good, long, large = (pack(random_sequences(n)) for n in ([3, 9, 5], [4, 17], [16, 16, 9]))
    found = pipeline.forward([good, good])
    assert found is not None
    for scores in found:
        torch.testing.assert_close(scores, model(good))
    given = [], [good], [good, long], [good, large]
    assert [pipeline.num_tokens_for(some) for some in given] == [20, 20, 40, 80]
    found = pipeline.forward([large, good])
    assert found is not None
    torch.testing.assert_close(found[0], model(large))
    with pytest.raises(UsageError, match="17 tokens is longer than the model's 16 positions"):
        pipeline.forward([good, long])

    def loss(scores: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        return scores.square().sum()

    with pytest.raises(UsageError, match="17 tokens is longer than the model's 16 positions"):
        pipeline.step([good, long], loss)
    model.zero_grad()
    # What has failed leaves nothing behind.
    total = pipeline.step([good, good], loss)
    assert total is not None
    torch.testing.assert_close(total, 2 * loss(model(good), good))
    found_gradients = gradients(model)
    (2 * loss(model(good), good)).backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(found_gradients[name], gradient)


@given(count=st.integers(0, 40), size=st.integers(2, 8), name=st.sampled_from(sorted(SCHEDULES)))
def test_no_micro_batch_is_left_out(count: int, size: int, name: str):
    fitting = SCHEDULES[name].num_fitting(count, size)
    assert max(count, 1) <= fitting <= max(count, size) + size
