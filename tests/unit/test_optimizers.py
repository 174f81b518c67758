"""Optimizers against formulas written out in numpy, and their state through a save and a load."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from torch import nn

from hasten.core.errors import DamagedError, UsageError
from hasten.optim import optimizers as optimizers_module
from hasten.optim.muon import orthogonalise
from hasten.optim.optimizers import (
    OPTIMIZER_NAMES,
    build_optimizer,
    default_learning_rate,
    default_settings,
    parameter_groups,
    set_learning_rate,
    split_parameters,
)
from hasten.optim.state import flatten_optimizer_state, load_optimizer_state

DECAY = 0.1
EPSILON_64 = float(np.finfo(np.float64).eps)
NUM_STEPS = 8  # RAdam's rectification begins at the sixth or so


# ---------------------------------------------------------------- reference formulas, in float64


def adam(w, grads, lr, b1=0.9, b2=0.9, eps=1e-8):
    m = v = np.zeros_like(w)
    for t, g in enumerate(grads, 1):
        w = w * (1 - lr * DECAY)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        w = w - lr * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
    return w


def sgd(w, grads, lr, momentum=0.9, nesterov=False):
    buffer = np.zeros_like(w)
    for g in grads:
        w = w * (1 - lr * DECAY)
        buffer = momentum * buffer + g
        w = w - lr * (g + momentum * buffer if nesterov else buffer)
    return w


def nesterov_sgd(w, grads, lr):
    return sgd(w, grads, lr, nesterov=True)


def adagrad(w, grads, lr, eps=1e-10):
    total = np.zeros_like(w)
    for g in grads:
        w = w * (1 - lr * DECAY)
        total = total + g * g
        w = w - lr * g / (np.sqrt(total) + eps)
    return w


def adadelta(w, grads, lr, rho=0.9, eps=1e-6):
    squares = deltas = np.zeros_like(w)
    for g in grads:
        w = w * (1 - lr * DECAY)
        squares = rho * squares + (1 - rho) * g * g
        delta = np.sqrt(deltas + eps) / np.sqrt(squares + eps) * g
        deltas = rho * deltas + (1 - rho) * delta * delta
        w = w - lr * delta
    return w


def rmsprop(w, grads, lr, alpha=0.99, eps=1e-8, momentum=0.5):
    squares = buffer = np.zeros_like(w)
    for g in grads:
        w = w * (1 - lr * DECAY)
        squares = alpha * squares + (1 - alpha) * g * g
        buffer = momentum * buffer + g / (np.sqrt(squares) + eps)
        w = w - lr * buffer
    return w


def nadam(w, grads, lr, b1=0.9, b2=0.9, eps=1e-8, psi=0.004):
    m = v = np.zeros_like(w)
    product = 1.0
    for t, g in enumerate(grads, 1):
        w = w * (1 - lr * DECAY)
        mu, next_mu = (b1 * (1 - 0.5 * 0.96 ** (k * psi)) for k in (t, t + 1))
        product *= mu
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        m_hat = next_mu * m / (1 - product * next_mu) + (1 - mu) * g / (1 - product)
        w = w - lr * m_hat / (np.sqrt(v / (1 - b2**t)) + eps)
    return w


def radam(w, grads, lr, b1=0.9, b2=0.9, eps=1e-8):
    m = v = np.zeros_like(w)
    rho_inf = 2 / (1 - b2) - 1
    rectified = []
    for t, g in enumerate(grads, 1):
        w = w * (1 - lr * DECAY)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        rho = rho_inf - 2 * t * b2**t / (1 - b2**t)
        step = m / (1 - b1**t)
        rectified.append(rho > 5)
        if rho > 5:
            r = (rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)
            step = step * math.sqrt(r) * math.sqrt(1 - b2**t) / (np.sqrt(v) + eps)
        w = w - lr * step
    assert True in rectified and False in rectified  # both branches are seen
    return w


def adafactor(w, grads, lr, beta2_decay=-0.8, eps1=EPSILON_64, eps2=1e-3):
    rows, columns, full = np.zeros((w.shape[0], 1)), np.zeros((1, w.shape[-1])), np.zeros_like(w)
    for t, g in enumerate(grads, 1):
        keep = 1 - t**beta2_decay
        alpha = max(eps2, np.sqrt(np.mean(w * w))) * min(lr, 1 / math.sqrt(t))
        w = w * (1 - lr * DECAY)
        if w.ndim == 2:
            rows = keep * rows + (1 - keep) * (g * g).mean(axis=1, keepdims=True)
            columns = keep * columns + (1 - keep) * (g * g).mean(axis=0, keepdims=True)
            estimate = rows @ columns / max(rows.mean(), eps1)
        else:
            full = keep * full + (1 - keep) * g * g
            estimate = full
        update = g / np.sqrt(np.maximum(estimate, eps1**2))
        w = w - alpha * update / max(1.0, np.sqrt(np.mean(update**2)))
    return w


def newton_schulz(x):
    """Jordan et al. 2024, for one matrix that is no taller than wide."""
    x = x / (np.linalg.norm(x) + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def muon(w, grads, lr, momentum=0.95):
    buffer = np.zeros_like(w)
    for g in grads:
        w = w * (1 - lr * DECAY)
        buffer = momentum * buffer + (1 - momentum) * g
        ahead = momentum * buffer + (1 - momentum) * g
        is_tall = w.shape[0] > w.shape[1]
        step = newton_schulz(ahead.T).T if is_tall else newton_schulz(ahead)
        w = w - lr * 0.2 * math.sqrt(max(w.shape)) * step
    return w


REFERENCES = [
    ("adam", adam, {"betas": (0.9, 0.9)}),
    ("adamw", adam, {"betas": (0.9, 0.9)}),
    ("sgd", sgd, {}),
    ("sgd", nesterov_sgd, {"nesterov": True}),
    ("adagrad", adagrad, {}),
    ("adadelta", adadelta, {}),
    ("rmsprop", rmsprop, {"momentum": 0.5}),
    ("nadam", nadam, {"betas": (0.9, 0.9)}),
    ("radam", radam, {"betas": (0.9, 0.9)}),
    ("adafactor", adafactor, {}),
    ("muon", adam, {"betas": (0.9, 0.9)}),  # what is no matrix of a block; see below
]


@pytest.mark.parametrize(("name", "reference", "options"), REFERENCES)
@pytest.mark.parametrize("shape", [(3, 5), (4,)])
def test_steps_equal_the_formula(name, reference, options, shape):
    random = np.random.default_rng(0)
    start = random.normal(size=shape)
    grads = [random.normal(size=shape) for _ in range(NUM_STEPS)]
    weight = nn.Parameter(torch.from_numpy(start.copy()))
    groups = [{"params": [("w", weight)]}]
    optimizer = build_optimizer(name, groups, learning_rate=0.03, weight_decay=DECAY, **options)
    for grad in grads:
        weight.grad = torch.from_numpy(grad.copy())
        optimizer.step()
    # NAdam's product of momenta is float32 in torch.
    tolerance = 1e-6 if name == "nadam" else 1e-12
    expected = reference(start, grads, 0.03)
    np.testing.assert_allclose(weight.detach().numpy(), expected, rtol=tolerance, atol=tolerance)


def test_every_optimizer_has_a_reference():
    assert {name for name, _, _ in REFERENCES} == set(OPTIMIZER_NAMES)
    assert len(OPTIMIZER_NAMES) == 10


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4)])
@pytest.mark.parametrize("momentum", [0.95, 0.5])
def test_the_matrices_of_blocks_take_muons_steps(shape, momentum):
    random = np.random.default_rng(0)
    starts = [random.normal(size=size) for size in (shape, shape, (7, 2), (4,), shape)]
    names = ["a.blocks.0.up.weight", "a.blocks.1.up.weight", "a.blocks.0.down.weight"]
    names += ["a.blocks.0.up.bias", "embedding.weight"]
    weights = [nn.Parameter(torch.from_numpy(start.copy())) for start in starts]
    groups = [{"params": list(zip(names, weights, strict=True))}]
    options = {"momentum": momentum, "betas": (0.9, 0.9), "weight_decay": DECAY}
    optimizer = build_optimizer("muon", groups, learning_rate=0.03, **options)
    grads = [[random.normal(size=start.shape) for start in starts] for _ in range(NUM_STEPS)]
    for step in grads:
        for weight, grad in zip(weights, step, strict=True):
            weight.grad = torch.from_numpy(grad.copy())
        optimizer.step()
    for i, (weight, start) in enumerate(zip(weights, starts, strict=True)):
        own = [step[i] for step in grads]
        expected = muon(start, own, 0.03, momentum) if i < 3 else adam(start, own, 0.03)
        np.testing.assert_allclose(weight.detach().numpy(), expected, rtol=1e-11, atol=1e-11)


def test_muons_steps_are_torchs_to_the_precision_of_its_bfloat16():
    random = torch.Generator().manual_seed(0)
    start = torch.randn(24, 16, generator=random)
    grads = [torch.randn(24, 16, generator=random) for _ in range(4)]
    ours, theirs = (nn.Parameter(start.clone()) for _ in range(2))
    groups = [{"params": [("blocks.0.weight", ours)]}]
    optimizers = [
        build_optimizer("muon", groups, learning_rate=0.02, weight_decay=DECAY),
        torch.optim.Muon([theirs], lr=0.02, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw"),
    ]
    for grad in grads:
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = grad.clone()
            optimizer.step()
    moved, expected = ours.detach() - start, theirs.detach() - start
    assert float((moved - expected).norm() / expected.norm()) < 0.02


@settings(max_examples=50, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    seed=st.integers(0, 999),
)
def test_orthogonalising_keeps_the_directions_and_evens_their_sizes(shape, scale, seed):
    random = torch.Generator().manual_seed(seed)
    left, _ = torch.linalg.qr(torch.randn(shape[0], shape[0], generator=random, dtype=torch.double))
    right, _ = torch.linalg.qr(
        torch.randn(shape[1], shape[1], generator=random, dtype=torch.double)
    )
    sizes = torch.linspace(1.0, 0.1, min(shape), dtype=torch.double)
    left, right = left[:, : len(sizes)], right[:, : len(sizes)]
    matrix = scale * (left * sizes) @ right.T
    found = orthogonalise(torch.stack([matrix, torch.zeros_like(matrix), -matrix]))
    evened = left.T @ found[0] @ right
    assert float((evened - evened.diag().diag()).abs().max()) < 1e-9
    assert float(evened.diag().min()) > 0.6 and float(evened.diag().max()) < 1.25
    assert torch.equal(found[1], torch.zeros_like(matrix))
    torch.testing.assert_close(found[2], -found[0])


@pytest.mark.parametrize("name", OPTIMIZER_NAMES)
def test_defaults_are_torchs_where_we_do_not_say_otherwise(name):
    """Our literal defaults are those of the torch class, except the ones named here."""
    on_purpose = {"lr", "weight_decay", "foreach", "fused", "momentum", "decoupled_weight_decay"}
    optimizer = build_optimizer(name, [{"params": [_named_weight()]}], learning_rate=0.1)
    theirs = type(optimizer)([_named_weight()[1]], lr=0.1).defaults
    assert set(theirs) == set(optimizer.defaults)
    for key in set(theirs) - on_purpose:
        assert optimizer.defaults[key] == theirs[key], key


# ------------------------------------------------------------------------------ names and settings


def _named_weight(name="w", shape=(2, 2), **options):
    return name, nn.Parameter(torch.ones(shape, **options))


@pytest.mark.parametrize("name", OPTIMIZER_NAMES)
@pytest.mark.parametrize(
    ("setting", "value"),
    [("betas", (0.8, 0.9)), ("momentum", 0.7), ("nesterov", True), ("epsilon", 1e-5)],
)
def test_a_setting_is_used_or_refused(name, setting, value):
    def build(**options):
        groups = [{"params": [_named_weight()]}]
        return build_optimizer(name, groups, learning_rate=0.1, **options)

    if setting in default_settings(name):
        assert build(**{setting: value}).defaults != build().defaults
    else:
        with pytest.raises(UsageError, match=f"'{name}' does not use '{setting}'"):
            build(**{setting: value})


def test_unknown_optimizer_names_the_nearest():
    with pytest.raises(UsageError, match="Did you mean 'adamw'"):
        build_optimizer("adamww", [{"params": [_named_weight()]}], learning_rate=0.1)
    with pytest.raises(UsageError, match="Unknown optimizer"):
        default_learning_rate("lion", 64)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("adamw", {"betas": (0.9, 1.0)}),
        ("adamw", {"betas": (-0.1, 0.9)}),
        ("adamw", {"epsilon": 0.0}),
        ("adamw", {"weight_decay": -1.0}),
        ("adamw", {"learning_rate": -0.1}),
        ("adamw", {"learning_rate": math.nan}),
        ("adamw", {"learning_rate": math.inf}),
        ("sgd", {"momentum": 1.0}),
        ("sgd", {"momentum": 0.0, "nesterov": True}),
    ],
)
def test_values_out_of_range_are_refused(name, options):
    with pytest.raises(UsageError):
        build_optimizer(name, [{"params": [_named_weight()]}], **{"learning_rate": 0.1, **options})


def test_default_learning_rates():
    assert default_learning_rate("adamw", 512) == pytest.approx(7.0e-4, rel=0.01)
    assert default_learning_rate("adamw", 16) == 2e-3
    assert default_learning_rate("adadelta", 512) == 1.0
    for name in OPTIMIZER_NAMES:
        assert 0 < default_learning_rate(name, 128) <= 1


# ----------------------------------------------------------------------------------- weight decay


def _model(dtype=torch.float32):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3)).to(dtype)


def test_groups_exempt_biases_and_gains_in_order():
    model = _model()
    model[3].weight.requires_grad_(False)
    decayed, exempt = parameter_groups(model.named_parameters(), weight_decay=0.3)
    assert [name for name, _ in decayed["params"]] == ["0.weight"]
    assert [name for name, _ in exempt["params"]] == ["0.bias", "2.weight", "2.bias", "3.bias"]
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.3, 0.0)


def test_no_decay_patterns():
    model = _model()
    decayed, exempt = split_parameters(model.named_parameters(), no_decay=["3.*"])
    assert [name for name, _ in decayed] == ["0.weight"]
    assert "3.weight" in dict(exempt)
    with pytest.raises(UsageError, match="matches no parameter"):
        split_parameters(model.named_parameters(), no_decay=["embedding.*"])


def test_empty_groups_are_left_out_and_nothing_trainable_is_refused():
    model = nn.Linear(2, 2, bias=False)
    assert len(parameter_groups(model.named_parameters(), weight_decay=0.0)) == 1
    model.weight.requires_grad_(False)
    with pytest.raises(UsageError, match="frozen"):
        parameter_groups(model.named_parameters(), weight_decay=0.0)


@pytest.mark.parametrize("name", OPTIMIZER_NAMES)
def test_weight_decay_is_decoupled(name):
    """With a gradient of zero, weights shrink by exactly 1 - rate * decay; exempt ones stay."""
    model = _model(torch.float64)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    groups = parameter_groups(model.named_parameters(), weight_decay=0.5)
    optimizer = build_optimizer(name, groups, learning_rate=0.3)
    set_learning_rate(optimizer, 0.1)
    assert "param_names" not in groups[0] and isinstance(groups[0]["params"][0], tuple)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for key, parameter in model.named_parameters():
        shrink = 1 - 0.1 * 0.5 if parameter.ndim == 2 else 1.0
        torch.testing.assert_close(parameter.detach(), before[key] * shrink, rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", OPTIMIZER_NAMES)
def test_a_weight_without_a_gradient_is_not_decayed(name):
    named = [_named_weight("used"), _named_weight("unused")]
    optimizer = build_optimizer(name, parameter_groups(named, weight_decay=0.5), learning_rate=0.1)
    named[0][1].grad = torch.ones(2, 2)
    optimizer.step()
    assert torch.equal(named[1][1], torch.ones(2, 2))
    assert not torch.equal(named[0][1], torch.ones(2, 2))


# ---------------------------------------------------------------------------------- implementation


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_fused_where_supported_else_foreach(name, monkeypatch):
    groups = [{"params": [_named_weight()]}]
    fused = build_optimizer(name, groups, learning_rate=0.1)
    assert fused.defaults["fused"] is True
    complex_groups = [{"params": [_named_weight(dtype=torch.complex64)]}]
    assert not build_optimizer(name, complex_groups, learning_rate=0.1).defaults["fused"]
    monkeypatch.setattr(optimizers_module, "_fused_step_works", lambda device, dtype: False)
    plain = build_optimizer(name, groups, learning_rate=0.1)
    assert (plain.defaults["fused"], plain.defaults["foreach"]) == (None, True)


def test_the_trial_of_the_fused_step_can_fail():
    works = optimizers_module._fused_step_works
    assert works("cpu", torch.float32)
    assert not works("cpu", torch.complex64)
    assert not works("meta", torch.float32)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", OPTIMIZER_NAMES)
def test_cuda_continues_exactly_and_agrees_with_the_cpu(name):
    _check_continuing(name, 2, 3, device="cuda")
    on_cpu, on_cuda = _model(), _model().cuda()
    for model in (on_cpu, on_cuda):
        _train(model, _optimizer(name, model), range(3))
    for ours, theirs in zip(on_cpu.parameters(), on_cuda.cpu().parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------------------------------- state


def _optimizer(name, model, **options):
    groups = parameter_groups(model.named_parameters(), weight_decay=0.1)
    return build_optimizer(name, groups, learning_rate=0.01, **options)


def _train(model, optimizer, steps, skip="3.bias"):
    """Trains; the parameter ``skip`` gets a gradient on every third step only."""
    weight = next(model.parameters())
    for step in steps:
        set_learning_rate(optimizer, 0.01 / (step + 1))
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(7, 6, generator=generator).to(weight)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        if step % 3 != 1:
            model.get_parameter(skip).grad = None
        optimizer.step()


def _through_files(tensors, scalars):
    """What a checkpoint does: tensors as safetensors, scalars as strict JSON."""
    cpu = {name: value.cpu().contiguous() for name, value in tensors.items()}
    return load_bytes(save_bytes(cpu)), json.loads(json.dumps(scalars, allow_nan=False))


def _check_continuing(name, before, after, *, dtype=torch.float32, device="cpu", options=None):
    straight = _model(dtype).to(device)
    straight_optimizer = _optimizer(name, straight, **(options or {}))
    _train(straight, straight_optimizer, range(before + after))

    stopped = _model(dtype).to(device)
    optimizer = _optimizer(name, stopped, **(options or {}))
    _train(stopped, optimizer, range(before))
    tensors, scalars = _through_files(*flatten_optimizer_state(optimizer))
    resumed = copy.deepcopy(stopped)
    resumed_optimizer = _optimizer(name, resumed, **(options or {}))
    load_optimizer_state(resumed_optimizer, tensors, scalars)
    again, scalars_again = _through_files(*flatten_optimizer_state(resumed_optimizer))
    assert scalars_again == scalars
    assert list(flatten_optimizer_state(resumed_optimizer)[0]) == sorted(tensors)
    assert set(again) == set(tensors)
    assert all(torch.equal(again[key], tensors[key]) for key in tensors)
    assert all(again[key].dtype == tensors[key].dtype for key in tensors)
    _train(resumed, resumed_optimizer, range(before, before + after))

    for ours, theirs in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    states = [
        {key: value.device for key, value in flatten_optimizer_state(o)[0].items()}
        for o in (straight_optimizer, resumed_optimizer)
    ]
    assert states[0] == states[1]  # what torch keeps on the host is on the host again


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(OPTIMIZER_NAMES),
    before=st.integers(0, 8),
    after=st.integers(1, 4),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_continuing_is_bit_identical(name, before, after, dtype):
    _check_continuing(name, before, after, dtype=dtype)


@pytest.mark.parametrize("name", OPTIMIZER_NAMES)
def test_continuing_is_bit_identical_for_each(name):
    _check_continuing(name, 3, 3)


@pytest.mark.parametrize(
    ("name", "options"),
    [("sgd", {"nesterov": True}), ("sgd", {"momentum": 0.0}), ("rmsprop", {"momentum": 0.9})],
)
def test_continuing_with_settings(name, options):
    _check_continuing(name, 4, 2, options=options)


def test_names_are_key_slash_parameter_and_settings_are_restored():
    model = _model()
    optimizer = _optimizer("adamw", model, betas=(0.8, 0.95))
    _train(model, optimizer, range(3))
    tensors, scalars = flatten_optimizer_state(optimizer)
    assert {"exp_avg/0.weight", "exp_avg_sq/0.weight", "step/0.weight"} <= set(tensors)
    assert tensors["exp_avg/0.weight"].shape == (5, 6)
    other = _optimizer("adamw", _model())
    load_optimizer_state(other, *_through_files(tensors, scalars))
    assert [group["lr"] for group in other.param_groups] == [0.01 / 3] * 2
    assert other.param_groups[0]["betas"] == (0.8, 0.95)


def test_loaded_tensors_are_copied_not_kept():
    model = _model()
    optimizer = _optimizer("adamw", model)
    _train(model, optimizer, range(2))
    tensors, scalars = flatten_optimizer_state(optimizer)
    other = _optimizer("adamw", _model())
    load_optimizer_state(other, tensors, scalars)
    held = {value.data_ptr() for value in tensors.values()}
    loaded = {value.data_ptr() for state in other.state.values() for value in state.values()}
    assert not held & loaded


def test_loading_replaces_what_the_optimizer_held():
    model = _model()
    fresh = flatten_optimizer_state(_optimizer("adamw", model))
    optimizer = _optimizer("adamw", model)
    _train(model, optimizer, range(2))
    assert len(flatten_optimizer_state(optimizer)[0]) > 0
    load_optimizer_state(optimizer, *fresh)
    assert flatten_optimizer_state(optimizer) == fresh == ({}, fresh[1])


def test_transposed_weights_keep_their_layout():
    weight = nn.Parameter(torch.randn(4, 3).t())
    optimizer = build_optimizer("adamw", [{"params": [("w", weight)]}], learning_rate=0.1)
    weight.grad = torch.randn(4, 3).t()
    optimizer.step()
    other = build_optimizer("adamw", [{"params": [("w", weight)]}], learning_rate=0.1)
    load_optimizer_state(other, *_through_files(*flatten_optimizer_state(optimizer)))
    assert other.state[weight]["exp_avg"].stride() == optimizer.state[weight]["exp_avg"].stride()


def _damage(change):
    model = _model()
    optimizer = _optimizer("adamw", model)
    _train(model, optimizer, range(2))
    tensors, scalars = flatten_optimizer_state(optimizer)
    tensors, scalars = dict(tensors), json.loads(json.dumps(scalars))
    change(tensors, scalars)
    return tensors, scalars


def _rename(tensors, scalars):
    tensors["exp_avg/9.weight"] = tensors.pop("exp_avg/0.weight")


def _reshape(tensors, scalars):
    tensors["exp_avg/0.weight"] = torch.zeros(1, 6)


def _regroup(tensors, scalars):
    scalars["groups"][1]["parameters"].append(scalars["groups"][0]["parameters"].pop())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, scalars: tensors.popitem(), "tensors of"),
        (_rename, "fits no parameter"),
        (_reshape, "has shape"),
        (lambda tensors, scalars: scalars.update(optimizer="SGD"), "is SGD"),
        (lambda tensors, scalars: scalars.pop("groups"), "lacks 'groups'"),
        (lambda tensors, scalars: scalars["groups"][0]["parameters"].pop(), "other parameters"),
        (_regroup, "grouping differs"),
        (lambda tensors, scalars: scalars["groups"][0]["settings"].update(x=1), "setting 'x'"),
    ],
)
def test_a_damaged_state_is_refused_and_changes_nothing(change, message):
    tensors, scalars = _damage(change)
    model = _model()
    optimizer = _optimizer("adamw", model)
    _train(model, optimizer, range(1))
    before, settings_before = copy.deepcopy(flatten_optimizer_state(optimizer))
    with pytest.raises(DamagedError, match=message):
        load_optimizer_state(optimizer, tensors, scalars)
    after, settings_after = flatten_optimizer_state(optimizer)
    assert settings_after == settings_before
    assert all(torch.equal(after[key], before[key]) for key in before)
