"""Positions: tables, rotations and biases, each against its formula or against transformers."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.m2m_100.modeling_m2m_100 import M2M100SinusoidalPositionalEmbedding
from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding
from transformers.models.t5.modeling_t5 import T5Attention

from builders import default_dtype, pack, small_model
from hasten.core.batch import PackedBatch
from hasten.model.config import RotaryScaling, TransformerConfig
from hasten.model.positions import (
    RelativeBias,
    RotaryTable,
    SinusoidalPositions,
    apply_rotary,
    distance_buckets,
    rotary_factor,
    scaled_frequencies,
    sinusoidal_table,
)
from hasten.model.transformer import Transformer


def config(**options: Any) -> TransformerConfig:
    settings: dict[str, Any] = {
        "vocab_size": 30,
        "num_layers": 2,
        "hidden_size": 16,
        "num_heads": 2,
        **options,
    }
    return TransformerConfig(**settings)


@pytest.mark.parametrize("size", [6, 16, 7])
def test_sinusoids_follow_vaswani_et_al(size: int):
    table = sinusoidal_table(50, size)
    assert table.shape == (50, size)
    for position in (0, 1, 17, 49):
        for column in range(size):
            angle = position / 10000 ** (2 * (column // 2) / size)
            expected = math.cos(angle) if column % 2 else math.sin(angle)
            assert float(table[position, column]) == pytest.approx(expected, abs=2e-5)


def slowly(sinusoids: str, position: int, column: int, size: int) -> float:
    """One element of the other tables."""
    half = size - size // 2
    number = column if column < half else column - half
    share = number / (half - 1) if sinusoids == "tensor2tensor" else 2 * number / size
    angle = position / 10000**share
    return math.sin(angle) if column < half else math.cos(angle)


@pytest.mark.parametrize(
    ("sinusoids", "size"), [("halves", 16), ("halves", 7), ("tensor2tensor", 6)]
)
def test_sinusoids_in_halves(sinusoids: str, size: int):
    table = sinusoidal_table(50, size, sinusoids)
    assert table.shape == (50, size)
    for position in (0, 1, 17, 49):
        for column in range(size):
            expected = slowly(sinusoids, position, column, size)
            assert float(table[position, column]) == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("num_tokens", [1, 9])
def test_sinusoids_are_those_of_other_models(num_tokens: int):
    """Marian begins with the table's first row, M2M100 with its third."""
    ids = torch.full((1, num_tokens), 7)
    places = torch.arange(num_tokens, dtype=torch.int32)
    theirs = MarianSinusoidalPositionalEmbedding(20, 16)
    theirs.weight.data = theirs.create_weight()
    own = SinusoidalPositions(config(positions="sinusoidal", sinusoids="halves"))
    torch.testing.assert_close(own(places), theirs(ids.shape), rtol=1e-5, atol=1e-6)
    theirs = M2M100SinusoidalPositionalEmbedding(20, 16, padding_idx=1)
    own = SinusoidalPositions(
        config(positions="sinusoidal", sinusoids="tensor2tensor", position_offset=2)
    )
    torch.testing.assert_close(own(places), theirs(ids)[0], rtol=1e-5, atol=1e-6)


def entered(model: Transformer, batch: PackedBatch) -> Tensor:
    """What goes into the first block."""
    return model.encoder.enter(model.embed(batch), batch.positions)


BATCH = pack([torch.tensor([3, 4, 3]), torch.tensor([7])])


@pytest.mark.parametrize("scale", [None, 2.5])
def test_sinusoids_are_added_to_the_scaled_tokens(scale: float | None):
    model = small_model(positions="sinusoidal", embedding_scale=scale)
    rows = model.embedding.tokens.weight[[3, 4, 3, 7]] * (math.sqrt(32) if scale is None else scale)
    expected = rows + sinusoidal_table(700, 32)[[0, 1, 2, 0]]
    torch.testing.assert_close(entered(model, BATCH), expected)


@pytest.mark.parametrize("offset", [0, 2])
def test_learned_positions_and_segments_are_added(offset: int):
    model = small_model(
        positions="learned", position_offset=offset, num_token_types=2, max_positions=3
    )
    types = torch.tensor([0, 1, 1, 0])
    table = model.encoder.positions.weight
    assert table.shape == (3 + offset, 32)
    expected = (
        model.embedding.tokens.weight[[3, 4, 3, 7]]
        + table[[offset, 1 + offset, 2 + offset, offset]]
        + model.embedding.token_types.weight[types]
    )
    batch = dataclasses.replace(BATCH, token_types=types)
    torch.testing.assert_close(entered(model, batch), expected)
    # Without segments all tokens are of the first.
    zeros = dataclasses.replace(BATCH, token_types=torch.zeros_like(types))
    torch.testing.assert_close(entered(model, BATCH), entered(model, zeros))


def test_narrow_embeddings_are_normalised_and_then_mapped():
    model = small_model(positions="learned", embedding_size=12, embedding_norm=True)
    stack = model.encoder
    assert [p.shape for p in stack.projection.parameters()] == [(32, 12), (32,)]
    rows = model.embedding.tokens.weight[[3, 4, 3, 7]] + stack.positions.weight[[0, 1, 2, 0]]
    expected = F.linear(stack.embedding_norm(rows), *stack.projection.parameters())
    torch.testing.assert_close(entered(model, BATCH), expected)
    assert small_model(embedding_size=32).encoder.projection is None


def test_each_stack_has_positions_of_its_own():
    model = small_model(architecture="encoder_decoder", positions="learned", max_positions=9)
    assert model.encoder.positions.weight.shape == model.decoder.positions.weight.shape == (9, 32)
    assert not torch.equal(model.encoder.positions.weight, model.decoder.positions.weight)


def test_rotary_positions_are_a_complex_product(double_precision):
    table = RotaryTable(config(rotary_base=100.0, max_positions=40))
    positions = torch.tensor([0, 3, 39, 1], dtype=torch.int32)
    x = torch.randn(4, 2, 8)
    found = apply_rotary(x, *table(positions))
    pairs = torch.complex(x[..., :4], x[..., 4:])
    frequencies = 100.0 ** (-torch.arange(4) / 4)
    turned = pairs * torch.exp(1j * positions[:, None, None] * frequencies)
    torch.testing.assert_close(found, torch.cat([turned.real, turned.imag], -1))


@settings(max_examples=60)
@given(
    first=st.integers(0, 200),
    second=st.integers(0, 200),
    shift=st.integers(0, 300),
    seed=st.integers(0, 99),
)
def test_rotary_scores_depend_on_the_distance_only(first: int, second: int, shift: int, seed: int):
    with default_dtype(torch.float64):
        table = RotaryTable(config())
        q, k = torch.randn(2, 1, 1, 8, generator=torch.Generator().manual_seed(seed))

        def score(a: int, b: int) -> float:
            at_a, at_b = (table(torch.tensor([p], dtype=torch.int32)) for p in (a, b))
            return float((apply_rotary(q, *at_a) * apply_rotary(k, *at_b)).sum())

        assert score(first, second) == pytest.approx(score(first + shift, second + shift), abs=1e-9)
        assert float(apply_rotary(q, *table(torch.tensor([first]))).norm()) == pytest.approx(
            float(q.norm())
        )


def test_rotary_scores_do_depend_on_the_distance():
    table = RotaryTable(config())
    q = torch.ones(2, 1, 8)
    turned = apply_rotary(q, *table(torch.tensor([0, 5])))
    assert not torch.allclose(turned[0], turned[1])


SCALINGS: dict[str, tuple[RotaryScaling, dict[str, Any]]] = {
    "linear": (RotaryScaling("linear", 8.0), {"rope_type": "linear", "factor": 8.0}),
    "llama3": (
        RotaryScaling("llama3", 8.0, 64, 1.0, 4.0),
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "original_max_position_embeddings": 64,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
    ),
    "yarn": (
        RotaryScaling("yarn", 4.0, 64),
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    ),
    "yarn, other bounds": (
        RotaryScaling("yarn", 4.0, 64, beta_fast=8.0, beta_slow=0.5, attention_factor=0.9),
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 8.0,
            "beta_slow": 0.5,
            "attention_factor": 0.9,
        },
    ),
}


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("base", [10000.0, 500.0])
def test_stretched_frequencies_are_those_of_transformers(name: str, base: float):
    scaling, theirs = SCALINGS[name]
    other = LlamaConfig(
        hidden_size=64,
        num_attention_heads=2,
        max_position_embeddings=256,
        rope_parameters={"rope_theta": base, **theirs},
    )
    wanted, factor = ROPE_INIT_FUNCTIONS[theirs["rope_type"]](other, torch.device("cpu"))
    plain = base ** (-torch.arange(16, dtype=torch.float64) / 16)
    found = scaled_frequencies(plain, scaling, base)
    torch.testing.assert_close(found, wanted.double(), rtol=1e-6, atol=0)
    assert not torch.allclose(found, plain)
    assert rotary_factor(scaling) == pytest.approx(factor)


@pytest.mark.parametrize("name", SCALINGS)
def test_a_scaled_table_is_that_of_transformers(name: str):
    scaling, theirs = SCALINGS[name]
    other = LlamaConfig(
        hidden_size=64,
        num_attention_heads=2,
        max_position_embeddings=256,
        rope_parameters={"rope_theta": 10000.0, **theirs},
    )
    places = torch.arange(256)
    cos, sin = LlamaRotaryEmbedding(other)(torch.zeros(1), places[None])
    table = RotaryTable(config(hidden_size=64, rotary_scaling=scaling))
    for found, wanted in zip(table(places), (cos, sin), strict=True):
        torch.testing.assert_close(found[:, 0], wanted[0, :, :16], rtol=0, atol=3e-5)


def test_blocks_with_a_window_have_rotations_of_their_own():
    scaling = RotaryScaling("linear", 8.0)
    options = {"local_rotary_base": 50.0, "rotary_base": 9000.0, "rotary_scaling": scaling}
    model = small_model(sliding_window=4, global_layers=(1,), **options)
    stack, places = model.encoder, torch.tensor([0, 3, 9])
    rotations = stack.rotate(places)
    local, everywhere = stack.blocks
    wanted = RotaryTable(model.config, 50.0)(places)
    torch.testing.assert_close(local.rotary(rotations), wanted)
    angles = places[:, None] * 9000.0 ** (-torch.arange(4) / 4) / 8
    torch.testing.assert_close(everywhere.rotary(rotations)[0][:, 0], angles.cos())
    # Without a base of their own they share the one table, scaled.
    model = small_model(sliding_window=4, rotary_scaling=scaling)
    rotations = model.encoder.rotate(places)
    first, second = (block.rotary(rotations) for block in model.encoder.blocks)
    assert first is second and first is not None


@settings(max_examples=60)
@given(
    num_buckets=st.integers(4, 64),
    max_distance=st.integers(40, 300),
    causal=st.booleans(),
)
def test_buckets_of_distances_are_those_of_t5(num_buckets: int, max_distance: int, causal: bool):
    distances = torch.arange(-400, 401)
    wanted = T5Attention._relative_position_bucket(distances, not causal, num_buckets, max_distance)
    found = distance_buckets(distances, num_buckets, max_distance, causal)
    assert torch.equal(found, wanted)
    assert int(found.min()) >= 0 and int(found.max()) < num_buckets


@pytest.mark.parametrize("causal", [False, True])
def test_biases_of_all_pairs_and_their_gradients(causal: bool, double_precision):
    bias = RelativeBias(config(positions="relative", relative_buckets=8), causal=causal)
    at = torch.arange(150)
    wanted = bias.weight[distance_buckets(at[None] - at[:, None], 8, 128, causal)].permute(2, 0, 1)
    found, weight = bias.between(150), torch.randn(2, 150, 150)
    torch.testing.assert_close(found, wanted)
    gradients = [torch.autograd.grad((x * weight).sum(), bias.weight)[0] for x in (found, wanted)]
    torch.testing.assert_close(*gradients)
