"""Packed equals one by one, and no sequence ever sees another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from builders import default_dtype, gradients, pack, random_sequences, small_model
from hasten.model.transformer import Transformer

# Short lengths often repeat (views), long ones differ much (several groups, padding).
LENGTHS = st.one_of(
    st.lists(st.integers(1, 6), min_size=1, max_size=8),
    st.lists(st.sampled_from([1, 2, 3, 40, 41, 150, 400]), min_size=1, max_size=5),
)
OPTIONS = st.fixed_dictionaries(
    {
        "pooling": st.sampled_from(["first", "mean", "attention"]),
        "positions": st.sampled_from(["rotary", "learned", "sinusoidal"]),
        "norm": st.sampled_from(["layernorm", "rmsnorm"]),
        "norm_placement": st.sampled_from(["pre", "post"]),
        "activation": st.sampled_from(["gelu", "relu", "relu_squared", "swiglu"]),
        "qk_norm": st.booleans(),
        "num_kv_heads": st.sampled_from([None, 1, 2, 4]),
        "bias": st.booleans(),
        "num_token_types": st.sampled_from([0, 3]),
    }
)


def run_packed(
    model: Transformer, sequences: list[Tensor], types: list[Tensor] | None, weights: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    scores = model(pack(sequences, types))
    (scores * weights).sum().backward()
    return scores.detach(), gradients(model)


def run_singly(
    model: Transformer, sequences: list[Tensor], types: list[Tensor] | None, weights: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    scores = []
    for i, sequence in enumerate(sequences):
        score = model(pack([sequence], None if types is None else [types[i]]))
        (score * weights[i]).sum().backward()
        scores.append(score.detach())
    return torch.cat(scores), gradients(model)


def assert_same(packed: Any, single: Any, tolerance: float) -> None:
    torch.testing.assert_close(packed[0], single[0], rtol=tolerance, atol=tolerance)
    assert packed[1].keys() == single[1].keys()
    # Relative to the largest gradient of the tensor, and of all: sums over many tokens cancel.
    largest = max(float(g.abs().max()) for g in single[1].values())
    for name, expected in single[1].items():
        scale = max(float(expected.abs().max()), 1e-2 * largest, 1e-6)
        difference = float((packed[1][name] - expected).abs().max())
        assert difference <= tolerance * scale, (name, difference, scale)


def check(lengths: list[int], options: dict[str, Any], dtype: torch.dtype, tolerance: float):
    with default_dtype(dtype):
        model = small_model(**options)
        sequences = random_sequences(lengths)
        types = None
        if options["num_token_types"]:
            types = [torch.arange(len(s)) % 3 for s in sequences]
        weights = torch.randn(len(lengths), 3, generator=torch.Generator().manual_seed(1))
        assert_same(
            run_packed(model, sequences, types, weights),
            run_singly(model, sequences, types, weights),
            tolerance,
        )


@settings(max_examples=60)
@given(lengths=LENGTHS, options=OPTIONS)
def test_packed_equals_one_by_one_in_float64(lengths: list[int], options: dict[str, Any]):
    check(lengths, options, torch.float64, 1e-12)


@settings(max_examples=60)
@given(lengths=LENGTHS, options=OPTIONS)
def test_packed_equals_one_by_one_in_float32(lengths: list[int], options: dict[str, Any]):
    # Weights of the size that training begins with; 0.3 would amplify rounding itself.
    check(lengths, {**options, "initializer_std": 0.1}, torch.float32, 1e-5)


def test_the_order_of_the_sequences_only_permutes_the_scores():
    lengths = [5, 300, 2, 41, 5, 40, 1]
    model, sequences = small_model(), random_sequences(lengths)
    order = [3, 0, 6, 1, 5, 2, 4]
    expected = model(pack(sequences))[order]
    torch.testing.assert_close(
        model(pack([sequences[i] for i in order])), expected, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("pooling", ["first", "mean", "attention"])
@pytest.mark.parametrize("lengths", [[7, 7, 7], [3, 9, 5], [400, 5, 150, 41, 5]])
def test_changing_one_sequence_leaves_the_others_untouched(pooling: str, lengths: list[int]):
    model, sequences = small_model(pooling=pooling), random_sequences(lengths)
    before = model(pack(sequences))
    for changed in range(len(lengths)):
        others = [i for i in range(len(lengths)) if i != changed]
        sequences_after = list(sequences)
        sequences_after[changed] = (sequences[changed] + 1) % 40
        after = model(pack(sequences_after))
        assert torch.equal(before[others], after[others])
        assert not torch.allclose(before[changed], after[changed], atol=1e-3)


def test_no_gradient_flows_from_one_sequence_to_another():
    model = small_model()
    # Each sequence has token ids of its own, so embedding rows tell whom a gradient reached.
    sequences = [torch.arange(0, 9), torch.arange(10, 25), torch.arange(30, 33)]
    model(pack(sequences))[1].sum().backward()
    touched = model.encoder.embedding.tokens.weight.grad.abs().sum(1) > 0
    assert touched.nonzero().flatten().tolist() == list(range(10, 25))


def test_with_dropout_packed_training_outputs_differ_from_evaluation():
    model = small_model(dropout=0.5)
    batch = pack(random_sequences([4, 6]))
    evaluated = model(batch)
    model.train()
    assert not torch.allclose(model(batch), evaluated)


def test_filler_at_the_end_changes_no_score_and_no_gradient():
    with default_dtype(torch.float64):
        model, sequences = small_model(), random_sequences([5, 11, 3])
        weights = torch.randn(3, 3)
        plain = run_packed(model, sequences, None, weights)
        filled = [*sequences, torch.zeros(13, dtype=torch.int64)]
        scores = model(pack(filled))[:3]
        (scores * weights).sum().backward()
        assert_same((scores.detach(), gradients(model)), plain, 1e-12)
