"""What a pipeline is cut by: measured before the first step, saved, the same for all processes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from builders import write_labelled
from hasten.config.load import build_config
from hasten.model.config import TransformerConfig
from hasten.model.stages import StageCosts
from hasten.plan.memory import Load
from hasten.training import build, stage_times
from hasten.training.build import _parallel_settings, plan_run
from hasten.training.observe import Silent
from hasten.training.planned import Plan
from hasten.training.stage_times import measure_stage_costs

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {"vocab_size": 60, "num_layers": 3, "hidden_size": 32, "num_heads": 4}
DECODER: dict[str, Any] = {"architecture": "decoder", "head": "language_modelling"}
TINY = {
    "model.num_layers": 4,
    "model.hidden_size": 32,
    "tokenizer.vocab_size": 60,
    "train.precision": "float32",
    "train.matrix_library": "default",
}


@pytest.mark.parametrize(
    ("options", "load"),
    [
        ({"num_token_types": 2, "positions": "learned", "norm_placement": "post"}, {}),
        ({"head": "span", "embedding_size": 20}, {"precision": "bf16"}),
        ({"sliding_window": 4, "global_layers": (0, 2)}, {"recompute": True}),
        (DECODER, {"label_smoothing": 0.1}),
        ({**DECODER, "tie_embeddings": False, "num_kv_heads": 2}, {"precision": "bf16"}),
        ({"max_positions": 5}, {"micro_batch_tokens": 3}),
    ],
)
def test_every_model_that_can_be_cut_is_measured(
    options: dict[str, Any], load: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(stage_times, "_SECONDS", 0)
    before = torch.get_rng_state()
    wanted = Load(**{"tokens_per_step": 500, "micro_batch_tokens": 100, "lengths": (7, 9), **load})
    with torch.inference_mode(False), torch.no_grad():
        found = measure_stage_costs(TransformerConfig(**{**SIZES, **options}), wanted, CPU)
    assert found.block == 1
    assert all(math.isfinite(cost) and cost >= 0 for cost in (found.embedding, found.head))
    assert torch.equal(before, torch.get_rng_state())


def test_each_part_is_timed_by_itself(monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    monkeypatch.setattr(stage_times.time, "perf_counter", lambda: now[0])
    took = {"embedding": [9, 2, 3], "block": [9, 5, 4], "head": [9, 8, 9]}

    def part(name: str) -> Any:
        def run() -> None:
            now[0] += took[name].pop(0)

        return run

    # The first time of each does not count, and of the others the shortest.
    assert stage_times._least_seconds([part(name) for name in took], CPU) == [2, 4, 8]


def planned(folder: Path, **settings: Any) -> Plan:
    """Returns the plan of a run with other settings."""
    write_labelled(folder / "tiny.csv", 60, noise=0.1)
    values = {"data.train": (str(folder / "tiny.csv"),), **TINY, **settings}
    return plan_run(build_config(overrides=values), Silent())


def test_a_pipeline_is_cut_by_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found = StageCosts(0.0, 1.0, 2.0)
    monkeypatch.setattr(build, "measure_stage_costs", lambda *given: found)
    layout = {"parallel.layout": "pipeline=2"}
    plan = planned(tmp_path, **layout)
    # In the configuration, which is saved and which all processes read.
    assert plan.config.parallel.stage_costs == (0.0, 1.0, 2.0)
    assert [c.value for c in plan.choices if c.key == "parallel.stage_costs"] == [(0.0, 1.0, 2.0)]
    assert _parallel_settings(plan).costs == found
    asked = planned(tmp_path, **layout, **{"parallel.stage_costs": (0.5, 1.0, 0.25)})
    assert _parallel_settings(asked).costs == StageCosts(0.5, 1.0, 0.25)
    assert planned(tmp_path).config.parallel.stage_costs is None
