"""Settings that contradict each other; penalties, filters and draws against transformers."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hasten.core.errors import UsageError
from hasten.model.sampling import (
    DecodingSettings,
    best_tokens,
    draw_tokens,
    filter_logits,
    keep_top_p,
    penalise_repetition,
)

NAN = math.nan
SEED = st.integers(0, 2**31)


def random_logits(seed: int, rows: int, vocab_size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(rows, vocab_size, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        ({"max_new_tokens": 0}, ["--max-new-tokens", "0"]),
        ({"min_new_tokens": -1}, ["--min-new-tokens", "-1"]),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, ["--min-new-tokens 9", "--max-new-tokens 8"]),
        ({"temperature": -0.1}, ["--temperature", "-0.1"]),
        ({"temperature": NAN}, ["--temperature", "nan"]),
        ({"temperature": math.inf}, ["--temperature", "inf"]),
        ({"top_k": -1, "temperature": 1.0}, ["--top-k", "-1"]),
        ({"top_p": 0.0, "temperature": 1.0}, ["--top-p", "0.0"]),
        ({"top_p": 1.1, "temperature": 1.0}, ["--top-p", "1.1"]),
        ({"top_p": NAN, "temperature": 1.0}, ["--top-p", "nan"]),
        ({"repetition_penalty": 0.0}, ["--repetition-penalty", "0.0"]),
        ({"repetition_penalty": -2.0}, ["--repetition-penalty", "-2.0"]),
        ({"repetition_penalty": NAN}, ["--repetition-penalty", "nan"]),
        ({"num_beams": 0}, ["--num-beams", "0"]),
        ({"num_beams": 2, "length_penalty": -1.0}, ["--length-penalty", "-1.0"]),
        ({"length_penalty": 2.0}, ["--length-penalty", "--num-beams"]),
        ({"length_penalty": 2.0, "temperature": 1.0}, ["--length-penalty", "--num-beams"]),
        ({"num_return": 0}, ["--n-best", "0"]),
        ({"num_return": 3}, ["--n-best 3", "--num-beams 3", "--temperature"]),
        ({"num_return": 3, "num_beams": 2}, ["--n-best 3", "--num-beams", "2"]),
        ({"num_beams": 2, "temperature": 1.0}, ["--num-beams", "--temperature"]),
        ({"top_k": 5}, ["--top-k", "--temperature 1"]),
        ({"top_p": 0.9}, ["--top-p", "--temperature 1"]),
        ({"top_p": 0.9, "num_beams": 2}, ["--top-p", "--temperature 1"]),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_the_names_of_their_flags(
    options: dict[str, Any], flags: list[str]
):
    with pytest.raises(UsageError) as caught:
        DecodingSettings(**options)
    message = str(caught.value)
    assert all(flag in message for flag in flags)
    assert message.count("\n") < 2


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"seed": 7},
        {"min_new_tokens": 8, "max_new_tokens": 8},
        {"num_return": 4, "num_beams": 4, "length_penalty": 0.0},
        {"num_return": 4, "temperature": 0.7, "top_k": 5, "top_p": 1.0},
        {"repetition_penalty": 0.5, "num_beams": 3},
    ],
)
def test_settings_that_make_sense_are_accepted(options: dict[str, Any]):
    settings = DecodingSettings(**options)
    assert all(getattr(settings, name) == value for name, value in options.items())


@given(
    seed=SEED,
    penalty=st.sampled_from([0.5, 1.0, 1.3, 4.0]),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.integers(0, 14),
    top_p=st.sampled_from([0.05, 0.4, 0.9, 1.0]),
)
def test_what_is_drawn_from_is_what_transformers_draws_from(
    seed: int, penalty: float, temperature: float, top_k: int, top_p: float
):
    logits = random_logits(seed, 3, 12)
    past = torch.randint(12, (3, 6), generator=torch.Generator().manual_seed(seed))
    seen = torch.zeros(3, 12, dtype=torch.bool).scatter_(1, past, True)
    # In the order of transformers' ``generate``.
    processors = LogitsProcessorList(
        [RepetitionPenaltyLogitsProcessor(penalty), TemperatureLogitsWarper(temperature)]
    )
    if top_k:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        processors.append(TopPLogitsWarper(top_p))
    expected = processors(past, logits.clone()).softmax(-1)  # type: ignore[arg-type]
    penalised = penalise_repetition(logits, seen, penalty)
    for scores in (penalised, penalised.log_softmax(-1)):  # a constant changes nothing
        actual = filter_logits(scores, temperature, top_k, top_p).softmax(-1)
        assert torch.equal(actual == 0, expected == 0)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def test_the_penalty_worked_by_hand():
    logits = torch.tensor([[2.0, -2.0, 3.0, 0.0, -torch.inf]])
    seen = torch.tensor([[True, True, False, True, True]])
    expected = [[1.0, -4.0, 3.0, 0.0, -math.inf]]
    assert penalise_repetition(logits, seen, 2.0).tolist() == expected


@given(seed=SEED, top_p=st.floats(0.01, 1.0), copies=st.integers(1, 4))
def test_the_nucleus_is_the_smallest_that_reaches_the_sum(seed: int, top_p: float, copies: int):
    logits = random_logits(seed, 4, 8).repeat(1, copies)  # repeated: equal scores
    kept = keep_top_p(logits, top_p).isfinite()
    for row, mask in zip(logits, kept, strict=True):
        probabilities = row.softmax(-1)
        chosen = probabilities[mask]
        assert chosen.sum() >= top_p - 1e-9
        assert chosen.sum() - chosen.min() < top_p + 1e-9
        order = sorted(range(len(row)), key=lambda token: (-float(row[token]), token))
        assert set(order[: len(chosen)]) == set(mask.nonzero()[:, 0].tolist())


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-45, 5e-324])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_temperature_near_zero_leaves_the_best_token(temperature: float, dtype: torch.dtype):
    logits = random_logits(0, 5, 9).to(dtype)
    probabilities = filter_logits(logits, temperature, 0, 1.0).softmax(-1)
    best = torch.nn.functional.one_hot(logits.argmax(-1), 9)
    torch.testing.assert_close(probabilities, best.to(dtype), rtol=0, atol=1e-6)


@given(seed=SEED, rows=st.integers(1, 5), dropped=st.sets(st.integers(0, 6), max_size=6))
def test_a_draw_inverts_the_cumulative_distribution(seed: int, rows: int, dropped: set[int]):
    logits = random_logits(seed, rows, 7)
    logits[:, list(dropped)] = -torch.inf
    source = random.Random(seed)
    # The ends of [0, 1) are where a token of no probability could be drawn.
    uniforms = [source.choice([0.0, 1 - 2**-53, source.random()]) for _ in range(rows)]
    tokens = draw_tokens(logits, uniforms).tolist()
    for row, uniform, token in zip(logits.numpy(), uniforms, tokens, strict=True):
        assert token not in dropped
        weights = np.exp(row - row.max())
        before = weights[:token].sum() / weights.sum()
        assert before - 1e-12 <= uniform <= before + weights[token] / weights.sum() + 1e-12


@pytest.mark.parametrize("vocab_size", [10, 100, 1000])
def test_a_draw_at_the_last_number_below_one_stays_in_the_vocabulary(vocab_size: int):
    """Sums of many probabilities end a little beside 1, above or below."""
    logits = random_logits(0, 200, vocab_size + 1)
    logits[:, -1] = -torch.inf
    assert (logits.softmax(-1).cumsum(-1)[:, -1] < 1 - 2**-53).any()
    assert draw_tokens(logits, [1 - 2**-53] * 200).max() < vocab_size


def test_draws_are_as_fine_as_float64():
    logits = torch.tensor([[0.0, -23.0]] * 2)  # the second has a probability of 1e-10
    assert draw_tokens(logits, [1 - 2e-10, 1 - 5e-11]).tolist() == [0, 1]


def test_the_nucleus_ends_with_the_token_that_reaches_the_sum():
    kept = keep_top_p(torch.zeros(1, 4), 0.5).isfinite()
    assert kept.tolist() == [[True, True, False, False]]


@given(
    rows=st.lists(
        st.lists(st.sampled_from([-math.inf, -1.0, 0.0, 0.5, 2.0]), min_size=6, max_size=6),
        min_size=1,
        max_size=4,
    ),
    count=st.integers(1, 9),
)
def test_the_best_tokens_are_sorted_by_score_and_then_by_id(rows: list[list[float]], count: int):
    expected = [sorted(range(6), key=lambda token: (-row[token], token))[:count] for row in rows]
    assert best_tokens(torch.tensor(rows), count).tolist() == expected
