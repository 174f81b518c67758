"""The average of the weights: its formula, the exact swap, and its state."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hasten.core.errors import DamagedError, UsageError
from hasten.optim.averaging import WeightAverage


def _model(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)).to(dtype)


def _wander(model, step):
    """Changes the weights as a training step would."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(noise)


def _values(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def _same_bits(left, right):
    return all(a.numpy().tobytes() == b.numpy().tobytes() for a, b in zip(left, right, strict=True))


@settings(max_examples=20, deadline=None)
@given(decay=st.floats(0, 0.9999), num_steps=st.integers(0, 30))
def test_equals_the_formula(decay, num_steps):
    model = _model(torch.float64)
    average = WeightAverage(model.named_parameters(), decay=decay)
    expected = [value.numpy() for value in _values(model)]
    for step in range(num_steps):
        _wander(model, step)
        average.update()
        d = min(decay, (1 + step) / (10 + step))
        now = [value.numpy() for value in _values(model)]
        expected = [d * old + (1 - d) * new for old, new in zip(expected, now, strict=True)]
    assert list(average.tensors()) == [name for name, _ in model.named_parameters()]
    for ours, theirs in zip(average.tensors().values(), expected, strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-12, atol=1e-12)


def test_decay_of_zero_follows_the_weights():
    model = _model()
    average = WeightAverage(model.named_parameters(), decay=0.0)
    _wander(model, 0)
    average.update()
    assert _same_bits(average.tensors().values(), _values(model))


def test_swapped_is_exact_and_keeps_the_storage():
    model = _model()
    with torch.no_grad():
        model[0].bias[0] = -0.0
        model[0].bias[1] = float("nan")
    average = WeightAverage(model.named_parameters(), decay=0.9)
    _wander(model, 1)
    average.update()
    weights, averages = _values(model), [t.clone() for t in average.tensors().values()]
    pointers = [p.data_ptr() for p in model.parameters()]
    with average.swapped():
        assert _same_bits(_values(model), averages)
        assert [p.data_ptr() for p in model.parameters()] == pointers
    assert _same_bits(_values(model), weights)
    assert _same_bits(average.tensors().values(), averages)
    assert [p.data_ptr() for p in model.parameters()] == pointers


def test_swapped_comes_back_after_an_error():
    model = _model()
    average = WeightAverage(model.named_parameters(), decay=0.9)
    _wander(model, 1)
    weights = _values(model)
    with pytest.raises(KeyError), average.swapped():
        raise KeyError
    assert _same_bits(_values(model), weights)
    with average.swapped():
        pass  # and may be used again


def test_misuse_inside_swapped_is_caught():
    average = WeightAverage(_model().named_parameters(), decay=0.9)
    with average.swapped():
        for misuse in (average.update, average.tensors, lambda: average.swapped().__enter__()):
            with pytest.raises(AssertionError):
                misuse()


def test_averaging_does_not_change_training():
    model = _model()
    average = WeightAverage(model.named_parameters(), decay=0.9)
    weights = _values(model)
    average.update()
    assert _same_bits(_values(model), weights)
    assert not any(value.requires_grad for value in average.tensors().values())


@settings(max_examples=15, deadline=None)
@given(before=st.integers(0, 6), after=st.integers(1, 6))
def test_continuing_is_bit_identical(before, after):
    straight, stopped = _model(), _model()
    averages = [WeightAverage(m.named_parameters(), decay=0.9) for m in (straight, stopped)]
    for step in range(before + after):
        _wander(straight, step)
        averages[0].update()
    for step in range(before):
        _wander(stopped, step)
        averages[1].update()
    tensors = {name: value.clone() for name, value in averages[1].tensors().items()}
    scalars = json.loads(json.dumps(averages[1].scalars()))
    resumed = WeightAverage(stopped.named_parameters(), decay=0.9)
    resumed.load(tensors, scalars)
    pointers = {value.data_ptr() for value in resumed.tensors().values()}
    assert not pointers & {value.data_ptr() for value in tensors.values()}
    for step in range(before, before + after):
        _wander(stopped, step)
        resumed.update()
    assert _same_bits(resumed.tensors().values(), averages[0].tensors().values())
    assert resumed.scalars() == averages[0].scalars()


def test_a_damaged_state_is_refused():
    average = WeightAverage(_model().named_parameters(), decay=0.9)
    good = {name: value.clone() for name, value in average.tensors().items()}
    scalars = average.scalars()
    with pytest.raises(DamagedError, match=r"'0\.weight' has shape|of '0\.weight'"):
        average.load({**good, "0.weight": torch.zeros(1)}, scalars)
    with pytest.raises(DamagedError, match="x differs"):
        average.load({**good, "x": torch.zeros(1)}, scalars)
    with pytest.raises(DamagedError, match="scalars"):
        average.load(good, {})


def test_frozen_weights_are_skipped_and_bad_settings_refused():
    model = _model()
    model[0].weight.requires_grad_(False)
    average = WeightAverage(model.named_parameters(), decay=0.9)
    assert "0.weight" not in average.tensors()
    for decay in (1.0, -0.1, float("nan")):
        with pytest.raises(UsageError):
            WeightAverage(model.named_parameters(), decay=decay)
    with pytest.raises(UsageError, match="bfloat16"):
        WeightAverage(_model(torch.bfloat16).named_parameters(), decay=0.9)
