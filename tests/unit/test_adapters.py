"""Adapters: the same outputs and gradients as peft's, and as the plain model they merge into."""

from __future__ import annotations

import copy
import warnings
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from builders import default_dtype, gradients, pack, random_sequences, small_model
from hasten.core.errors import UsageError
from hasten.model.adapters import (
    ADAPTER_PARTS,
    AdaptedLinear,
    AdapterSettings,
    add_adapters,
    merge_adapters,
)
from hasten.model.transformer import Transformer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft

Kind = Literal["lora", "dora"]
KINDS: tuple[Kind, ...] = ("lora", "dora")


def adapted(kind: Kind, seed: int = 0, dropout: float = 0.0, **options: Any) -> Transformer:
    """A small model whose adapters have learned something."""
    model = small_model(seed, **options)
    add_adapters(model, AdapterSettings(kind, rank=3, alpha=5.0, dropout=dropout))
    disturb(model)
    return model


def disturb(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.rpartition(".")[2] in ADAPTER_PARTS:
                parameter.add_(0.2 * torch.randn_like(parameter))


class _OfPeft(nn.Module):
    """One linear layer, as peft wants it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.one = base

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x)


def pair_of_layers(
    kind: Kind, sizes: tuple[int, int, int], scale: float, dropout: float, *, bias: bool
) -> tuple[AdaptedLinear, nn.Module, dict[str, nn.Parameter]]:
    """One layer of ours and of peft's with equal weights; peft's parameters by our names."""
    inner, outer, rank = sizes
    base = nn.Linear(inner, outer, bias=bias)
    ours = AdaptedLinear(copy.deepcopy(base), AdapterSettings(kind, rank, scale * rank, dropout))
    disturb(ours)
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=scale * rank,  # pyright: ignore[reportArgumentType]
        lora_dropout=dropout,
        target_modules=["one"],
        use_dora=kind == "dora",
    )
    theirs = peft.get_peft_model(_OfPeft(base), config)  # pyright: ignore[reportArgumentType]
    layer: Any = theirs.base_model.model.one
    named = {
        "adapter_down": layer.lora_A["default"].weight,
        "adapter_up": layer.lora_B["default"].weight,
    }
    if kind == "dora":
        named["magnitude"] = layer.lora_magnitude_vector["default"].weight
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(ours.get_parameter(name))
    return ours, theirs, named


@settings(deadline=None, max_examples=30)
@given(
    kind=st.sampled_from(KINDS),
    sizes=st.tuples(*[st.integers(1, 9)] * 3),
    scale=st.floats(0.1, 4),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_outputs_and_gradients_are_those_of_peft(kind, sizes, scale, bias, seed):
    torch.manual_seed(seed)
    with default_dtype(torch.float64):
        ours, theirs, named = pair_of_layers(kind, sizes, scale, 0.0, bias=bias)
        x = torch.randn(7, sizes[0], requires_grad=True)
        other = x.detach().clone().requires_grad_(True)
        down = torch.randn(7, sizes[1])
        for layer, inputs in ((ours, x), (theirs, other)):
            layer(inputs).backward(down)
    torch.testing.assert_close(ours(x), theirs(other))
    torch.testing.assert_close(x.grad, other.grad)
    found = gradients(ours)
    for name, parameter in named.items():
        torch.testing.assert_close(found[name], parameter.grad)
    assert ours.weight.grad is None and (ours.bias is None or ours.bias.grad is None)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_where_peft_has_it(kind: Kind, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    mask = torch.tensor([[2.0, 0, 2, 2], [0, 2, 0, 2]])
    monkeypatch.setattr("hasten.model.adapters.drop_elements", lambda x, rate: x * mask)
    ours, theirs, _ = pair_of_layers(kind, (4, 5, 2), 1.5, 0.5, bias=True)
    layer: Any = theirs.base_model.model.one

    class Masked(nn.Dropout):
        def forward(self, input: Tensor) -> Tensor:
            return input * mask if self.training else input

    layer.lora_dropout["default"] = Masked(0.5)
    x = torch.randn(2, 4)
    for training in (True, False):
        ours.train(training), theirs.train(training)
        torch.testing.assert_close(ours(x), theirs(x))
    assert not torch.equal(ours.train()(x), ours.eval()(x))


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_begins_as_it_was(kind: Kind):
    model, plain = small_model(), small_model()
    add_adapters(model, AdapterSettings(kind, 4, 8.0))
    batch = pack(random_sequences([5, 3]))
    torch.testing.assert_close(model(batch), plain(batch))
    for name, parameter in plain.named_parameters():  # and its names stay
        assert torch.equal(model.get_parameter(name), parameter)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"architecture": "decoder", "head": "language_modelling", "activation": "swiglu"},
        {"architecture": "encoder_decoder", "head": "language_modelling", "bias": False},
    ],
)
def test_merged_weights_compute_the_same(kind: Kind, options: dict[str, Any]):
    model = adapted(kind, **options)
    merged = merge_adapters(model.state_dict(), 5.0 / 3)
    plain = small_model(seed=1, **options)
    plain.load_state_dict(merged)  # no name too many, none missing
    lengths = [5, 3, 9]
    sources = random_sequences([4, 4, 6], seed=1) if model.encoder and model.decoder else None
    batch = pack(random_sequences(lengths), sources=sources)
    with torch.no_grad():
        found, wanted = (m(batch) for m in (plain, model))
    if not isinstance(found, Tensor):
        found, wanted = found.scores(), wanted.scores()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    before = small_model(**options)
    assert not torch.allclose(
        merged[name := next(n for n in merged if n.endswith("query.weight"))],
        before.get_parameter(name),
    )


def test_only_adapters_and_a_new_head_are_trained():
    for options, has_head in (
        ({}, True),
        ({"head": "span"}, True),
        ({"architecture": "decoder", "head": "language_modelling", "tie_embeddings": False}, False),
    ):
        model = adapted("dora", **options)
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        is_head = {n for n in trained if n.startswith("head.")}
        assert bool(is_head) == has_head
        assert all(n.rpartition(".")[2] in ADAPTER_PARTS for n in trained - is_head)


def test_frozen_weights_get_no_gradient_and_dropout_draws_are_used():
    model = adapted("lora", dropout=0.5).train()
    batch = pack(random_sequences([5, 3]))
    torch.manual_seed(3)
    one = model(batch)
    assert not torch.equal(one, model(batch))
    one.sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


@pytest.mark.parametrize(
    ("targets", "wanted"),
    [
        (("query",), {"attention.query"}),
        (("attention.*",), set()),
        (("*.attention.*",), {f"attention.{n}" for n in ("query", "key", "value", "output")}),
        (("down", "gate"), {"feed_forward.down"}),
        (("encoder.blocks.1.*.up",), {"feed_forward.up"}),
    ],
)
def test_targets_name_matrices(targets: tuple[str, ...], wanted: set[str]):
    model = small_model()
    settings = AdapterSettings("lora", 2, 2.0, targets=targets)
    if not wanted:
        with pytest.raises(UsageError, match="names no matrix of the blocks"):
            add_adapters(model, settings)
        return
    add_adapters(model, settings)
    found = [n for n, m in model.named_modules() if isinstance(m, AdaptedLinear)]
    assert {n.partition("blocks.")[2][2:] for n in found} == wanted


def test_a_target_that_is_not_there_is_refused_by_name():
    with pytest.raises(UsageError, match=r"'quary' names no matrix.*Did you mean 'query'"):
        add_adapters(small_model(), AdapterSettings("lora", 2, 2.0, targets=("query", "quary")))
    with pytest.raises(UsageError, match="names no matrix"):
        add_adapters(small_model(), AdapterSettings("lora", 2, 2.0, targets=("gate",)))
