"""Schedules against torch.optim.lr_scheduler and transformers, and what holds for all of them."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.core.errors import DamagedError, UsageError
from hasten.optim.schedules import SCHEDULE_NAMES, PlateauSettings, build_schedule

PURE = [name for name in SCHEDULE_NAMES if name != "plateau"]
CASES = [(50, 10), (50, 0), (7, 7), (1, 0), (20, 19)]


def _torch_factors(make, num_steps):
    """Factors that a torch scheduler gives to each step, starting with the first one taken."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make(optimizer)
    factors = []
    for _ in range(num_steps):
        factors.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return factors


@pytest.mark.parametrize(("total", "warmup"), CASES)
@pytest.mark.parametrize("name", PURE)
def test_equals_transformers(name, total, warmup):
    """ours(step; w, T) == theirs(step + 1; w + 1, T + 1), as the module's docstring says."""
    hf = pytest.importorskip("transformers.optimization")
    decay = min(max(1, round(0.2 * total)), total - warmup)
    make = {
        "linear": lambda o: hf.get_linear_schedule_with_warmup(o, warmup + 1, total + 1),
        "cosine": lambda o: hf.get_cosine_schedule_with_warmup(o, warmup + 1, total + 1),
        "wsd": lambda o: hf.get_wsd_schedule(
            o,
            warmup + 1,
            decay,
            num_stable_steps=total - warmup - decay,
            decay_type="1-sqrt",
        ),
        "inverse_sqrt": lambda o: hf.get_inverse_sqrt_schedule(o, warmup + 1),
        "constant": lambda o: hf.get_constant_schedule_with_warmup(o, warmup + 1),
    }[name]
    expected = _torch_factors(make, total + 1)[1:]
    ours = build_schedule(name, total_steps=total, warmup_steps=warmup)
    assert [ours.factor(step) for step in range(total)] == pytest.approx(expected, abs=1e-12)


def test_warmup_and_cosine_equal_torch():
    lr_scheduler = torch.optim.lr_scheduler
    warmup = build_schedule("constant", total_steps=30, warmup_steps=9)
    expected = _torch_factors(lambda o: lr_scheduler.LinearLR(o, 1 / 10, 1.0, 9), 30)
    assert [warmup.factor(step) for step in range(30)] == pytest.approx(expected, abs=1e-12)
    cosine = build_schedule("cosine", total_steps=30, final_factor=0.1)
    expected = _torch_factors(lambda o: lr_scheduler.CosineAnnealingLR(o, 30, 0.1), 31)
    assert [cosine.factor(step) for step in range(31)] == pytest.approx(expected, abs=1e-9)
    linear = build_schedule("linear", total_steps=30, final_factor=0.25)
    expected = _torch_factors(lambda o: lr_scheduler.LinearLR(o, 1.0, 0.25, 30), 31)
    assert [linear.factor(step) for step in range(31)] == pytest.approx(expected, abs=1e-9)


def test_values_by_hand():
    linear = build_schedule("linear", total_steps=10, warmup_steps=4)
    assert [linear.factor(step) for step in (0, 3, 4, 7, 9, 10, 99)] == pytest.approx(
        [1 / 5, 4 / 5, 1, 1 / 2, 1 / 6, 0, 0]
    )
    wsd = build_schedule("wsd", total_steps=100, warmup_steps=4, decay_fraction=0.4)
    assert [wsd.factor(step) for step in (4, 60, 61, 70, 100)] == pytest.approx(
        [1, 1, 1 - math.sqrt(1 / 40), 0.5, 0]
    )
    inverse = build_schedule("inverse_sqrt", total_steps=100, warmup_steps=3)
    assert [inverse.factor(step) for step in (0, 2, 3, 15)] == [0.25, 0.75, 1.0, 0.5]


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(SCHEDULE_NAMES),
    total=st.integers(1, 300),
    share=st.floats(0, 1),
    final=st.floats(0, 1),
    metrics=st.lists(st.floats(), max_size=8),
)
def test_properties_of_all(name, total, share, final, metrics):
    warmup = int(share * total)
    options = {"final_factor": final} if name in ("linear", "cosine", "wsd") else {}
    schedule = build_schedule(name, total_steps=total, warmup_steps=warmup, **options)
    for metric in metrics:
        schedule.observe(metric)
    factors = [schedule.factor(step) for step in range(total + 2)]
    assert all(0 <= factor <= 1 for factor in factors)
    assert all(factor > 0 for factor in factors[:total])  # no step is wasted on a rate of 0
    rising, falling = factors[: min(warmup + 1, total)], factors[warmup:]
    assert rising == sorted(rising)
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(falling))
    if name in ("linear", "cosine", "wsd"):
        assert factors[-1] == factors[total] == pytest.approx(final)


@pytest.mark.parametrize("greater_is_better", [False, True])
@pytest.mark.parametrize("patience", [0, 1, 2])
def test_plateau_equals_torch(greater_is_better, patience):
    generator = torch.Generator().manual_seed(patience)
    metrics = (1 + 0.1 * torch.rand(40, generator=generator)).cumsum(0).tolist()
    metrics = [m if i % 7 < 3 else 5.0 for i, m in enumerate(metrics)]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer,
        mode="max" if greater_is_better else "min",
        factor=0.5,
        patience=patience,
        threshold=0.01,
        min_lr=0.01,
        eps=0.0,
    )
    ours = build_schedule(
        "plateau",
        total_steps=100,
        plateau=PlateauSettings(
            factor=0.5,
            patience=patience,
            threshold=0.01,
            minimum=0.01,
            greater_is_better=greater_is_better,
        ),
    )
    seen = set()
    for metric in metrics:
        theirs.step(metric)
        ours.observe(metric)
        assert ours.factor(3) == optimizer.param_groups[0]["lr"]
        seen.add(ours.factor(3))
    assert len(seen) > 2


@pytest.mark.parametrize(
    ("greater_is_better", "metrics", "factors"),
    [
        (False, [10.0, 8.9, 8.1, 8.0], [1, 1, 0.5, 0.5]),  # 8.1 is not 10% under 8.9, 8.0 is
        (True, [10.0, 11.1, 12.0, 12.3], [1, 1, 0.5, 0.5]),
        (False, [-10.0, -10.5, -11.5], [1, 0.5, 0.5]),  # a negative best: still 10% of its size
    ],
)
def test_plateau_counts_only_improvements_beyond_the_threshold(greater_is_better, metrics, factors):
    plateau = PlateauSettings(patience=0, threshold=0.1, greater_is_better=greater_is_better)
    schedule = build_schedule("plateau", total_steps=9, plateau=plateau)
    seen = []
    for metric in metrics:
        schedule.observe(metric)
        seen.append(schedule.factor(0))
    assert seen == factors


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_plateau_warms_up_and_takes_what_is_not_finite_as_no_improvement(bad):
    settings_ = PlateauSettings(patience=0)
    schedule = build_schedule("plateau", total_steps=9, warmup_steps=3, plateau=settings_)
    schedule.observe(bad)
    assert [schedule.factor(step) for step in (0, 2, 3)] == [0.125, 0.375, 0.5]
    schedule.observe(3.0)
    schedule.observe(2.0)
    assert schedule.factor(3) == 0.5  # both were improvements
    json.dumps(schedule.state_dict(), allow_nan=False)


@pytest.mark.parametrize("name", SCHEDULE_NAMES)
@pytest.mark.parametrize("num_before", [0, 3])
def test_state_continues_through_json(name, num_before):
    metrics = [1.0, 2.0, 3.0, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    straight = build_schedule(name, total_steps=20, warmup_steps=2)
    stopped = build_schedule(name, total_steps=20, warmup_steps=2)
    for metric in metrics:
        straight.observe(metric)
    for metric in metrics[:num_before]:
        stopped.observe(metric)
    resumed = build_schedule(name, total_steps=20, warmup_steps=2)
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict(), allow_nan=False)))
    for metric in metrics[num_before:]:
        resumed.observe(metric)
    assert resumed.state_dict() == straight.state_dict()
    assert [resumed.factor(s) for s in range(20)] == [straight.factor(s) for s in range(20)]


def test_a_state_of_another_schedule_is_refused():
    plateau = build_schedule("plateau", total_steps=5)
    with pytest.raises(DamagedError, match="'linear'"):
        plateau.load_state_dict(build_schedule("linear", total_steps=5).state_dict())
    with pytest.raises(DamagedError, match="lacks scale"):
        plateau.load_state_dict({"name": "plateau", "best": None, "num_bad": 0})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cosin", {}, "Did you mean 'cosine'"),
        ("constant", {"final_factor": 0.1}, "does not use 'final_factor'"),
        ("linear", {"decay_fraction": 0.1}, "does not use 'decay_fraction'"),
        ("linear", {"plateau": PlateauSettings()}, "does not use 'plateau'"),
        ("linear", {"final_factor": 1.5}, "in \\[0, 1\\]"),
        ("wsd", {"decay_fraction": 0.0}, "in \\(0, 1\\]"),
        ("linear", {"warmup_steps": 11}, "does not fit"),
        ("linear", {"warmup_steps": -1}, "does not fit"),
        ("linear", {"total_steps": 0}, "1 or more"),
        ("plateau", {"plateau": PlateauSettings(factor=1.0)}, "factor"),
        ("plateau", {"plateau": PlateauSettings(patience=-1)}, "patience"),
        ("plateau", {"plateau": PlateauSettings(minimum=2.0)}, "minimum"),
    ],
)
def test_mistakes_are_named(name, options, message):
    with pytest.raises(UsageError, match=message):
        build_schedule(name, **{"total_steps": 10, **options})
