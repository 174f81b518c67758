"""Attention of short sequences beside the formula as it stands, both differentiated."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hasten.model.attention import AttentionSpec, attend_dense
from hasten.model.layers import drop_elements
from hasten.model.short_attention import attend_short, is_short


def formula(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, dropout: float
) -> Tensor:
    shared = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    scores = scale * (q @ k.transpose(-1, -2))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return drop_elements(scores.softmax(-1), dropout) @ v


def draw(
    count: int, heads: int, kv_heads: int, lengths: tuple[int, int], size: int
) -> tuple[Tensor, Tensor, Tensor]:
    def one(num_heads: int, length: int) -> Tensor:
        # As they come from a stream: heads stand next to each other in a token.
        x = torch.randn(count, length, num_heads, size, dtype=torch.float64)
        return x.transpose(1, 2).requires_grad_()

    return one(heads, lengths[0]), one(kv_heads, lengths[1]), one(kv_heads, lengths[1])


@settings(max_examples=60)
@given(
    count=st.integers(1, 4),
    shared=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    lengths=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    size=st.integers(1, 5),
    scale=st.sampled_from([None, 0.3]),
    masks=st.sampled_from(["none", "padding", "causal"]),
    dropout=st.sampled_from([0.0, 0.4]),
    seed=st.integers(0, 2**16),
)
def test_it_is_the_formula_and_its_gradient(
    count: int,
    shared: int,
    kv_heads: int,
    lengths: tuple[int, int],
    size: int,
    scale: float | None,
    masks: str,
    dropout: float,
    seed: int,
):
    torch.manual_seed(seed)
    tensors = draw(count, shared * kv_heads, kv_heads, lengths, size)
    asking, looked_at = lengths
    mask = None
    if masks == "padding":
        sizes = torch.randint(1, looked_at + 1, (count, 1, 1, 1))
        mask = torch.arange(looked_at) < sizes
    elif masks == "causal":
        mask = torch.ones(asking, looked_at, dtype=torch.bool).tril()
    torch.manual_seed(seed)
    found = attend_short(*tensors, mask, scale, dropout)
    torch.manual_seed(seed)
    wanted = formula(*tensors, mask, size**-0.5 if scale is None else scale, dropout)
    torch.testing.assert_close(found, wanted)
    weights = torch.randn_like(found)
    for own, other in zip(
        torch.autograd.grad(found, tensors, weights),
        torch.autograd.grad(wanted, tensors, weights),
        strict=True,
    ):
        torch.testing.assert_close(own, other)


def test_long_sequences_and_decoding_do_not_come_this_way():
    q, k, _ = draw(2, 2, 1, (256, 256), 4)
    longer = draw(2, 2, 1, (256, 257), 4)[1]
    one, short = draw(2, 2, 1, (1, 64), 4)[:2]
    assert is_short(q, k) and not is_short(q, longer)
    assert is_short(one, short)  # the one token that a head asks for
    assert not is_short(q.bfloat16(), k.bfloat16())
    with torch.no_grad():
        assert not is_short(q, k)
        assert is_short(short, short)
        assert not is_short(one, short)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_it_computes_in_float32(dtype: torch.dtype):
    narrow = [t.detach().to(dtype).requires_grad_() for t in draw(3, 4, 2, (7, 7), 8)]
    wide = [t.detach().float().requires_grad_() for t in narrow]
    with torch.autocast("cpu", dtype=dtype):
        assert is_short(*narrow[:2])
        found = attend_dense(*narrow, None, AttentionSpec())  # pyright: ignore
    wanted = attend_dense(*wide, None, AttentionSpec())  # pyright: ignore
    assert torch.equal(found, wanted.to(dtype))
    weights = torch.randn_like(found)
    for own, other in zip(
        torch.autograd.grad(found, narrow, weights),
        torch.autograd.grad(wanted, wide, weights.float()),
        strict=True,
    ):
        assert torch.equal(own, other.to(dtype))


@pytest.mark.parametrize("causal", [False, True])
def test_training_and_use_give_the_same(causal: bool):
    tensors = draw(3, 4, 2, (7, 7), 8)
    spec = AttentionSpec(causal=causal)
    trained = attend_dense(*tensors, None, spec)
    with torch.no_grad():
        used = attend_dense(*tensors, None, spec)
    assert "ShortAttention" in str(trained.grad_fn)
    torch.testing.assert_close(trained.detach(), used)
