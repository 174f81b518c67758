"""Packed attention against the formula written out, in every way the groups can form."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hasten.core.batch import SequenceLayout
from hasten.model.attention import Attention, AttentionSpec, attend
from hasten.model.config import TransformerConfig

LENGTHS = st.one_of(
    st.lists(st.integers(1, 9), min_size=1, max_size=10),
    st.lists(st.sampled_from([1, 5, 64, 65, 200, 330]), min_size=1, max_size=6),
)


def naive(
    q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float | None = None
) -> Tensor:
    """softmax(scale * q k) v, one sequence, one head and one query at a time."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    share = q.shape[1] // k.shape[1]
    rows = []
    start = 0
    for length in lengths:
        for i in range(start, start + length):
            heads = []
            for h in range(q.shape[1]):
                keys, values = (x[start : start + length, h // share] for x in (k, v))
                weight = torch.exp(scale * (keys @ q[i, h]))
                heads.append((weight / weight.sum()) @ values)
            rows.append(torch.stack(heads))
        start += length
    return torch.stack(rows)


def block_diagonal(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """The same with one mask over the whole stream: fast, and differentiable by autograd."""
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    share = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
    scores = torch.einsum("nhc,mhc->hnm", q, k) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(ids[:, None] != ids[None, :], -math.inf)
    return torch.einsum("hnm,mhc->nhc", scores.softmax(-1), v)


def draw(lengths: list[int], heads: int, kv_heads: int, size: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(lengths))
    total = sum(lengths)
    return [
        torch.randn(total, h, size, dtype=torch.float64, generator=generator)
        for h in (heads, kv_heads, kv_heads)
    ]


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("lengths", [[1], [3, 3, 3], [5, 1, 4, 1], [2, 30, 2, 31]])
def test_attention_equals_the_formula(lengths: list[int], kv_heads: int, scale: float | None):
    q, k, v = draw(lengths, 4, kv_heads)
    found = attend(q, k, v, SequenceLayout.from_lengths(lengths), AttentionSpec(scale=scale))
    torch.testing.assert_close(found, naive(q, k, v, lengths, scale), rtol=1e-12, atol=1e-12)


@settings(max_examples=80)
@given(lengths=LENGTHS, kv_heads=st.sampled_from([1, 2]))
def test_outputs_and_gradients_equal_one_masked_softmax(lengths: list[int], kv_heads: int):
    tensors = draw(lengths, 2, kv_heads)
    weight = torch.randn_like(tensors[0])
    results = []
    for function in (
        lambda q, k, v: attend(q, k, v, SequenceLayout.from_lengths(lengths), AttentionSpec()),
        lambda q, k, v: block_diagonal(q, k, v, lengths),
    ):
        leaves = [t.clone().requires_grad_() for t in tensors]
        out = function(*leaves)
        results.append((out, *torch.autograd.grad((out * weight).sum(), leaves)))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


@settings(max_examples=150)
@given(lengths=LENGTHS)
def test_the_groups_hold_every_token_once(lengths: list[int]):
    layout = SequenceLayout.from_lengths(lengths)
    plan, total = layout.group_plan, sum(lengths)
    assert sum(group.count for group in plan.groups) == len(lengths)
    rows = []
    for group in plan.groups:
        positions = group.count * group.length
        if group.rows is None:
            assert group.start is not None and group.mask is None
            assert group.start + positions <= total
            rows += range(group.start, group.start + positions)
            continue
        assert group.start is None and group.rows.shape == (positions,)
        real = [True] * positions
        if group.mask is not None:
            assert group.mask.shape == (group.count, 1, 1, group.length)
            real = group.mask.flatten().tolist()
        rows += [row if keep else -1 for row, keep in zip(group.rows.tolist(), real, strict=True)]
    if plan.restore is None:
        assert rows == list(range(total))
    else:
        assert [rows[i] for i in plan.restore.tolist()] == list(range(total))
    assert sorted(row for row in rows if row >= 0) == list(range(total))


def test_equal_lengths_are_one_view_without_a_copy():
    plan = SequenceLayout.from_lengths([64] * 12).group_plan
    (group,) = plan.groups
    assert (group.start, group.rows, group.mask, plan.restore) == (0, None, None, None)


def test_sorted_lengths_are_views_where_they_are_far_apart():
    plan = SequenceLayout.from_lengths([8] * 40 + [300] * 4 + [500] * 4).group_plan
    assert [(g.count, g.length, g.start) for g in plan.groups] == [
        (40, 8, 0),
        (4, 300, 320),
        (4, 500, 1520),
    ]
    assert plan.restore is None


def test_very_different_lengths_are_not_padded_to_one_another():
    lengths = [3] * 50 + [510]
    groups = SequenceLayout.from_lengths(lengths[::-1]).group_plan.groups
    assert sum(group.count * group.length for group in groups) == sum(lengths)


def test_few_short_lengths_share_one_padded_group():
    (group,) = SequenceLayout.from_lengths([9, 4, 7, 5]).group_plan.groups
    assert group.mask is not None
    assert group.count * group.length == 36


@settings(max_examples=100)
@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=40))
def test_padding_inside_attention_is_bounded(lengths: list[int]):
    groups = SequenceLayout.from_lengths(lengths).group_plan.groups
    exact = sum(n * n for n in lengths)
    padded = sum(g.count * g.length**2 for g in groups)
    assert exact <= padded <= exact + 16384 * len(groups)


def test_attention_dropout_is_on_in_training_only_and_keeps_the_mean():
    config = TransformerConfig(10, 1, 8, 2, attention_dropout=0.5, dropout=0.0)
    torch.manual_seed(0)
    module, layout = Attention(config), SequenceLayout.from_lengths([6])
    x = torch.randn(6, 8)
    with torch.no_grad():
        plain = module.eval()(x, layout, None)
        assert torch.equal(plain, module(x, layout, None))
        module.train()
        draws = torch.stack([module(x, layout, None) for _ in range(3000)])
    assert not torch.allclose(draws[0], draws[1])
    error = (draws.mean(0) - plain).abs()
    assert float((error / (draws.std(0) / 3000**0.5)).max()) < 5


def test_padding_points_at_a_row_that_need_not_be_finite_only_for_its_own_sequence():
    """Row 0 fills the padded places; its values must reach no other sequence."""
    lengths = [3, 9, 5]
    q, k, v = draw(lengths, 2, 2)
    layout = SequenceLayout.from_lengths(lengths)
    expected = attend(q, k, v, layout, AttentionSpec())[3:]
    for tensor in (q, k, v):
        tensor[0] = 1e200
    found = attend(q, k, v, layout, AttentionSpec())[3:]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
