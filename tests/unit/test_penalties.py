"""Penalties against autograd, and clipping against torch."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hasten.core.errors import UsageError
from hasten.optim.clipping import clip_gradients_, gradient_norm, scale_gradients_
from hasten.optim.optimizers import split_parameters
from hasten.optim.penalties import add_penalty_gradients_


def _model(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)).to(dtype)


def _penalised(model):
    return [parameter for _, parameter in split_parameters(model.named_parameters())[0]]


def _batch(dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(12, 4, generator=generator, dtype=dtype)


def _gradients(model):
    return [p.grad.clone() for p in model.parameters()]


@settings(max_examples=40, deadline=None)
@given(l1=st.floats(0, 10), l2=st.floats(0, 10))
def test_equals_autograd_of_the_penalised_loss(l1, l2):
    model, x = _model(), _batch()
    model[0].weight.data[0, 0] = 0.0  # sign(0) = 0, as autograd has it
    model(x).square().sum().backward()
    value = add_penalty_gradients_(_penalised(model), l1=l1, l2=l2)
    ours = _gradients(model)

    model.zero_grad()
    weights = (model[0].weight, model[2].weight)  # biases and norms are exempt
    penalty = sum(l1 * w.abs().sum() + l2 * w.square().sum() for w in weights)
    (model(x).square().sum() + penalty).backward()
    assert not value.requires_grad
    torch.testing.assert_close(value, penalty.detach(), rtol=1e-12, atol=1e-300)
    for mine, theirs in zip(ours, _gradients(model), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("num_micro_batches", [1, 2, 3, 12])
def test_accumulation_does_not_multiply_the_penalty(num_micro_batches):
    """Gradient minus the data's gradient is the same penalty however the batch is cut."""
    model, x = _model(), _batch()
    for micro_batch in x.chunk(num_micro_batches):
        (model(micro_batch).square().sum() / len(x)).backward()
    before = _gradients(model)
    value = add_penalty_gradients_(_penalised(model), l1=0.3, l2=0.2)
    weights = {id(p) for p in _penalised(model)}
    expected_value = 0.0
    for parameter, old in zip(model.parameters(), before, strict=True):
        if id(parameter) in weights:
            w = parameter.detach()
            added = 0.3 * w.sign() + 0.4 * w
            expected_value += float(0.3 * w.abs().sum() + 0.2 * w.square().sum())
        else:
            added = torch.zeros_like(old)
        torch.testing.assert_close(parameter.grad - old, added, rtol=1e-12, atol=1e-14)
    assert float(value) == pytest.approx(expected_value, rel=1e-12)


def test_a_weight_without_a_gradient_gets_one():
    weight = nn.Parameter(torch.tensor([[2.0, -3.0]]))
    value = add_penalty_gradients_([weight], l1=1.0, l2=0.5)
    assert weight.grad is not None and weight.grad.tolist() == [[3.0, -4.0]]
    assert value.item() == pytest.approx(5 + 6.5)


def test_no_penalty_touches_nothing():
    weight = nn.Parameter(torch.ones(2, 2))
    assert add_penalty_gradients_([weight]).item() == 0.0
    assert weight.grad is None
    assert add_penalty_gradients_([], l1=1.0).item() == 0.0


@pytest.mark.parametrize("options", [{"l1": -1.0}, {"l2": math.nan}, {"l2": math.inf}])
def test_bad_coefficients_are_refused(options):
    with pytest.raises(UsageError):
        add_penalty_gradients_([nn.Parameter(torch.ones(1, 1))], **options)


# ---------------------------------------------------------------------------------------- clipping


@settings(max_examples=50, deadline=None)
@given(
    max_norm=st.floats(1e-3, 1e3),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 100),
)
def test_clipping_equals_torch_bit_for_bit(max_norm, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 4), (5,), (), (2, 3, 4)]
    grads = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
    ours = [nn.Parameter(torch.zeros_like(grad)) for grad in grads]
    theirs = [nn.Parameter(torch.zeros_like(grad)) for grad in grads]
    for mine, their, grad in zip(ours, theirs, grads, strict=True):
        mine.grad, their.grad = grad.clone(), grad.clone()
    ours.append(nn.Parameter(torch.zeros(3)))  # has no gradient
    norm = gradient_norm(ours)
    clip_gradients_(ours, max_norm=max_norm, norm=norm)
    expected = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    assert torch.equal(norm, expected)
    for mine, their in zip(ours, theirs, strict=False):
        assert torch.equal(mine.grad, their.grad)
    assert ours[-1].grad is None
    assert gradient_norm(ours).item() <= max_norm * (1 + 1e-5)


def test_norm_by_hand_and_of_nothing():
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))]
    parameters[0].grad, parameters[1].grad = torch.tensor([1.0, 2.0]), torch.tensor([2.0])
    assert gradient_norm(iter(parameters)).item() == 3.0
    assert gradient_norm([]).item() == 0.0
    scale_gradients_(iter(parameters), 0.5)
    assert parameters[0].grad.tolist() == [0.5, 1.0]
    scale_gradients_(parameters, torch.tensor(2.0))
    assert parameters[1].grad.tolist() == [2.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_norm_shows_a_gradient_that_is_not_finite(bad):
    parameter = nn.Parameter(torch.zeros(3))
    parameter.grad = torch.tensor([0.0, bad, 1.0])
    assert not gradient_norm([parameter]).isfinite()


@pytest.mark.parametrize("max_norm", [0.0, -1.0, math.inf, math.nan])
def test_a_bad_limit_is_refused(max_norm):
    with pytest.raises(UsageError):
        clip_gradients_([], max_norm=max_norm, norm=torch.tensor(1.0))
