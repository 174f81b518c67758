"""Packed equals one by one, and no sequence ever sees another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from builders import VOCAB, default_dtype, gradients, merged, pack, random_sequences, small_model
from hasten.core.batch import PackedBatch
from hasten.model.config import RotaryScaling
from hasten.model.heads import TokenOutputs
from hasten.model.layers import Embedding
from hasten.model.transformer import Transformer

# Short lengths often repeat (views), long ones differ much (several groups, padding).
LENGTHS = st.one_of(
    st.lists(st.integers(1, 6), min_size=1, max_size=8),
    st.lists(st.sampled_from([1, 2, 3, 40, 41, 150, 400]), min_size=1, max_size=5),
)


WINDOWS = st.sampled_from(
    [
        {},
        {"sliding_window": 1},
        {"sliding_window": 3, "global_layers": (0,)},
        {"sliding_window": 64},
    ]
)
POSITIONS = st.sampled_from(
    [
        {"positions": "rotary"},
        {"positions": "rotary", "rotary_scaling": RotaryScaling("yarn", 4.0, 100)},
        {"sliding_window": 4, "global_layers": (0,), "local_rotary_base": 50.0},
        {"positions": "learned", "position_offset": 2},
        {"positions": "sinusoidal", "sinusoids": "halves"},
        {"positions": "relative", "relative_buckets": 8, "attention_scale": 1.0},
        {"positions": "none"},
    ]
)
SHARED = {
    "norm": st.sampled_from(["layernorm", "rmsnorm"]),
    "norm_placement": st.sampled_from(["pre", "post", "sandwich"]),
    "embedding_norm": st.sampled_from([None, True]),
    "embedding_scale": st.sampled_from([None, 2.0]),
    "qk_norm": st.booleans(),
    "num_kv_heads": st.sampled_from([None, 1, 2]),
    "head_dim": st.sampled_from([None, 6]),
    "bias": st.booleans(),
    "qkv_bias": st.sampled_from([None, True]),
    "output_bias": st.sampled_from([None, False]),
    "attention_softcap": st.sampled_from([0.0, 2.0]),
}
OPTIONS = merged(
    WINDOWS,
    POSITIONS,
    st.fixed_dictionaries(
        {
            **SHARED,
            "pooling": st.sampled_from(["first", "last", "mean", "attention"]),
            "activation": st.sampled_from(["gelu", "gelu_tanh", "relu_squared", "geglu"]),
            "num_token_types": st.sampled_from([0, 3]),
            "embedding_size": st.sampled_from([None, 12]),
            "head_activation": st.sampled_from(["none", "tanh"]),
        }
    ),
)
HEADS = st.one_of(
    st.sampled_from([{"head": "classification"}, {"head": "span", "head_activation": "gelu"}]),
    st.fixed_dictionaries(
        {
            "head": st.just("language_modelling"),
            "tie_embeddings": st.booleans(),
            "logit_softcap": st.sampled_from([0.0, 3.0]),
            "logit_scale": st.sampled_from([1.0, 0.3]),
            "logit_bias": st.booleans(),
        }
    ),
)
OF_DECODERS = {**SHARED, "architecture": st.just("decoder")}
DECODER_OPTIONS = merged(WINDOWS, POSITIONS, HEADS, st.fixed_dictionaries(OF_DECODERS))
OF_TRANSLATORS = {
    **SHARED,
    "architecture": st.just("encoder_decoder"),
    "num_decoder_layers": st.sampled_from([None, 1]),
    "source_vocab_size": st.sampled_from([None, VOCAB + 3]),
}
TRANSLATOR_OPTIONS = merged(WINDOWS, POSITIONS, HEADS, st.fixed_dictionaries(OF_TRANSLATORS))
PAIRS = st.one_of(
    st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=8),
    st.lists(
        st.tuples(st.sampled_from([1, 2, 40, 41, 150]), st.sampled_from([1, 3, 60, 200])),
        min_size=1,
        max_size=5,
    ),
)


def outputs_of(model: Transformer, batch: PackedBatch) -> Tensor:
    """Scores of sequences, of spans' ends or of all tokens: one row for each."""
    outputs = model(batch)
    return outputs.scores() if isinstance(outputs, TokenOutputs) else outputs


def run(
    model: Transformer, batches: list[PackedBatch], weights: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Outputs and gradients of ``(outputs * weights).sum()`` over all batches."""
    outputs, start = [], 0
    for batch in batches:
        found = outputs_of(model, batch)
        (found * weights[start : start + len(found), : found.shape[1]]).sum().backward()
        outputs.append(found.detach())
        start += len(found)
    return torch.cat(outputs), gradients(model)


def assert_same(packed: Any, single: Any, tolerance: float) -> None:
    torch.testing.assert_close(packed[0], single[0], rtol=tolerance, atol=tolerance)
    assert packed[1].keys() == single[1].keys()
    # Relative to the largest gradient of the tensor, and of all: sums over many tokens cancel.
    largest = max(float(g.abs().max()) for g in single[1].values())
    for name, expected in single[1].items():
        scale = max(float(expected.abs().max()), 1e-2 * largest, 1e-6)
        difference = float((packed[1][name] - expected).abs().max())
        assert difference <= tolerance * scale, (name, difference, scale)


def check(
    lengths: list[int],
    options: dict[str, Any],
    dtype: torch.dtype,
    tolerance: float,
    source_lengths: list[int] | None = None,
) -> None:
    with default_dtype(dtype):
        model = small_model(**options)
        sequences = random_sequences(lengths)
        types = None
        if options.get("num_token_types"):
            types = [torch.arange(len(s)) % 3 for s in sequences]
        sources = None
        if source_lengths is not None:
            sources = random_sequences(source_lengths, seed=1)
            if options["source_vocab_size"]:
                sources = [s + 3 for s in sources]  # ids that only the source's vocabulary has
        per_sequence = model.config.head == "classification"
        shape = (len(lengths), 3) if per_sequence else (sum(lengths), VOCAB)
        weights = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        together = pack(sequences, types, sources=sources)
        singly = [
            pack(
                [sequence],
                None if types is None else [types[i]],
                sources=None if sources is None else [sources[i]],
            )
            for i, sequence in enumerate(sequences)
        ]
        assert_same(run(model, [together], weights), run(model, singly, weights), tolerance)


@settings(max_examples=60)
@given(lengths=LENGTHS, options=OPTIONS)
def test_packed_equals_one_by_one_in_float64(lengths: list[int], options: dict[str, Any]):
    check(lengths, options, torch.float64, 1e-12)


@settings(max_examples=60)
@given(lengths=LENGTHS, options=OPTIONS)
def test_packed_equals_one_by_one_in_float32(lengths: list[int], options: dict[str, Any]):
    # Weights of the size that training begins with; 0.3 would amplify rounding itself.
    check(lengths, {**options, "initializer_std": 0.1}, torch.float32, 1e-5)


@settings(max_examples=60)
@given(lengths=LENGTHS, options=DECODER_OPTIONS)
def test_a_packed_decoder_equals_one_by_one_in_float64(lengths: list[int], options: dict[str, Any]):
    check(lengths, options, torch.float64, 1e-12)


@settings(max_examples=60)
@given(lengths=LENGTHS, options=DECODER_OPTIONS)
def test_a_packed_decoder_equals_one_by_one_in_float32(lengths: list[int], options: dict[str, Any]):
    check(lengths, {**options, "initializer_std": 0.1}, torch.float32, 1e-5)


@settings(max_examples=60)
@given(pairs=PAIRS, options=TRANSLATOR_OPTIONS)
def test_a_packed_encoder_decoder_equals_one_by_one_in_float64(
    pairs: list[tuple[int, int]], options: dict[str, Any]
):
    lengths, source_lengths = map(list, zip(*pairs, strict=True))
    check(lengths, options, torch.float64, 1e-12, source_lengths)


@settings(max_examples=60)
@given(pairs=PAIRS, options=TRANSLATOR_OPTIONS)
def test_a_packed_encoder_decoder_equals_one_by_one_in_float32(
    pairs: list[tuple[int, int]], options: dict[str, Any]
):
    lengths, source_lengths = map(list, zip(*pairs, strict=True))
    check(lengths, {**options, "initializer_std": 0.1}, torch.float32, 1e-5, source_lengths)


def test_the_order_of_the_sequences_only_permutes_the_scores():
    lengths = [5, 300, 2, 41, 5, 40, 1]
    model, sequences = small_model(), random_sequences(lengths)
    order = [3, 0, 6, 1, 5, 2, 4]
    expected = model(pack(sequences))[order]
    torch.testing.assert_close(
        model(pack([sequences[i] for i in order])), expected, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("pooling", ["first", "last", "mean", "attention"])
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


def rows_that_change(model: Transformer, lengths: list[int], changed: int) -> list[int]:
    """Rows of the outputs that notice another token at a row of the stream."""
    sequences = random_sequences(lengths)
    before = outputs_of(model, pack(sequences))
    stream = torch.cat(sequences)
    stream[changed] = (stream[changed] + 1) % VOCAB
    after = outputs_of(model, pack(list(stream.split(lengths))))
    differs = (after - before).detach().abs().amax(1)
    found = [row for row, d in enumerate(differs.tolist()) if d]
    assert float(differs[found].min()) > 1e-4
    return found


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("lengths", [[7, 7, 7], [12, 9, 5]])
def test_a_token_of_a_decoder_sees_only_what_it_may(lengths: list[int], window: int):
    """Two layers pass a change on by two steps of ``window - 1`` tokens, and never backwards."""
    model = small_model(architecture="decoder", head="language_modelling", sliding_window=window)
    place = lengths[0] + 1
    last = min(lengths[1] - 1, 1 + 2 * (window - 1)) if window else lengths[1] - 1
    found = rows_that_change(model, lengths, place)
    assert found == list(range(place, place + last))


@pytest.mark.parametrize("lengths", [[9, 9, 9], [12, 9, 5]])
def test_a_token_of_an_encoder_sees_only_what_it_may(lengths: list[int]):
    """A window of 3 passes a change on by one token to either side in each layer."""
    options = {"head": "span", "sliding_window": 3, "num_layers": 3}
    first, last = lengths[0], lengths[0] + lengths[1]
    place = first + 4
    found = rows_that_change(small_model(**options), lengths, place)
    assert found == list(range(place - 3, place + 4))
    found = rows_that_change(small_model(**options, global_layers=(1,)), lengths, place)
    assert found == list(range(first, last))


def test_changing_one_source_leaves_the_other_sequences_untouched():
    model = small_model(architecture="encoder_decoder", head="language_modelling")
    lengths, sequences = [3, 60, 3], random_sequences([3, 60, 3])
    sources = random_sequences([9, 2, 130], seed=1)
    before = outputs_of(model, pack(sequences, sources=sources)).split(lengths)
    for changed in range(3):
        others = list(sources)
        others[changed] = (sources[changed] + 1) % VOCAB
        after = outputs_of(model, pack(sequences, sources=others)).split(lengths)
        for i in range(3):
            if i != changed:
                assert torch.equal(before[i], after[i])
            else:  # every token of the sequence sees the whole of its source
                assert float((before[i] - after[i]).detach().abs().amax(1).min()) > 1e-3


def test_no_gradient_flows_from_one_sequence_to_another():
    model = small_model()
    # Each sequence has token ids of its own, so embedding rows tell whom a gradient reached.
    sequences = [torch.arange(0, 9), torch.arange(10, 25), torch.arange(30, 33)]
    model(pack(sequences))[1].sum().backward()
    assert rows_touched(model.embedding) == list(range(10, 25))


def test_no_gradient_flows_to_the_source_of_another_sequence():
    model = small_model(
        architecture="encoder_decoder",
        head="language_modelling",
        source_vocab_size=VOCAB,
        tie_embeddings=False,
    )
    sequences = [torch.arange(0, 4), torch.arange(10, 15), torch.arange(30, 33)]
    sources = [torch.arange(0, 9), torch.arange(10, 25), torch.arange(30, 33)]
    outputs_of(model, pack(sequences, sources=sources))[4:9].square().sum().backward()
    assert model.source_embedding is not None
    assert rows_touched(model.source_embedding) == list(range(10, 25))
    assert rows_touched(model.embedding) == list(range(10, 15))


def rows_touched(embedding: Embedding) -> list[int]:
    """The token ids whose embeddings a gradient reached."""
    gradient = embedding.tokens.weight.grad
    assert gradient is not None
    return gradient.abs().sum(1).nonzero().flatten().tolist()


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
        plain = run(model, [pack(sequences)], weights)
        filled = [*sequences, torch.zeros(13, dtype=torch.int64)]
        scores = model(pack(filled))[:3]
        (scores * weights).sum().backward()
        assert_same((scores.detach(), gradients(model)), plain, 1e-12)
