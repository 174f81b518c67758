"""Greedy decoding, sampling and beam search over a made-up model small enough to enumerate."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from hasten.core.errors import DivergenceError, UsageError
from hasten.model import search
from hasten.model.search import Decoded, DecodingSettings, Request, generate

VOCAB, END = 5, 0
SEED = st.integers(0, 2**31)


class TableStepper:
    """The next token depends on the last two: a row with another's past gives other scores."""

    def __init__(self, table_VVV: Tensor, prompts: Sequence[tuple[int, ...]]) -> None:
        self.table, self.rows = table_VVV, [tuple(prompt) for prompt in prompts]
        self.advanced: list[int] = []  # rows of each step
        self._score()

    def advance(self, tokens_B: Tensor) -> None:
        assert tokens_B.dtype == torch.int64 and tokens_B.shape == (len(self.rows),)
        self.rows = [(*row, token) for row, token in zip(self.rows, tokens_B.tolist(), strict=True)]
        self.advanced.append(len(self.rows))
        self._score()

    def select(self, rows: Tensor) -> None:
        assert rows.dtype == torch.int64 and len(rows)
        self.rows = [self.rows[row] for row in rows.tolist()]
        self._score()

    def _score(self) -> None:
        self.logits = torch.stack([self.table[row[-2], row[-1]] for row in self.rows])


def random_table(seed: int, vocab_size: int = VOCAB, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (vocab_size, vocab_size, vocab_size)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def run(
    table: Tensor,
    prompts: Sequence[tuple[int, ...]],
    options: DecodingSettings,
    limits: Sequence[int | None] | None = None,
    **more: Any,
) -> list[list[Decoded]]:
    requests = [
        Request(example_id=10 * place, prompt=prompt, max_new_tokens=limit)
        for place, (prompt, limit) in enumerate(
            zip(prompts, limits or [None] * len(prompts), strict=True)
        )
    ]
    more.setdefault("end_ids", frozenset({END}))
    return generate(TableStepper(table, prompts), options, requests, **more)


def log_probability(table: Tensor, prompt: tuple[int, ...], token_ids: Sequence[int]) -> float:
    """The model's own, of tokens given with their end token."""
    past, total = prompt, 0.0
    for token in token_ids:
        total += float(table[past[-2], past[-1]].log_softmax(-1)[token])
        past = (*past, token)
    return total


def whole(decoded: Decoded, limit: int) -> tuple[int, ...]:
    """The tokens with the end token, where nothing but that ended them."""
    assert decoded.finished or len(decoded.token_ids) == limit
    return (*decoded.token_ids, END) if decoded.finished else decoded.token_ids


def enumerate_all(
    table: Tensor, prompt: tuple[int, ...], limit: int, power: float
) -> dict[tuple[int, ...], float]:
    """The scores of every sequence that ends or is as long as may be."""
    vocab_size = table.shape[0]
    every = [
        tokens
        for length in range(1, limit + 1)
        for tokens in itertools.product(range(vocab_size), repeat=length)
        if END not in tokens[:-1] and (tokens[-1] == END or length == limit)
    ]
    return {t: log_probability(table, prompt, t) / len(t) ** power for t in every}


def penalised(scores: list[float], past: Sequence[int], penalty: float) -> list[float]:
    seen = set(past)
    return [
        score * (1 if token not in seen else penalty if score < 0 else 1 / penalty)
        for token, score in enumerate(scores)
    ]


def plain_beam_search(
    table: Tensor,
    prompt: tuple[int, ...],
    limit: int,
    end_ids: frozenset[int],
    options: DecodingSettings,
) -> list[tuple[int, ...]]:
    """As its definition says, without ever stopping early."""

    def best_first(entry: tuple[float, tuple[int, ...]]) -> float:
        return -entry[0]

    beams: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    found: list[tuple[float, tuple[int, ...]]] = []
    for length in range(1, limit + 1):
        candidates = []
        for total, tokens in beams:
            past = (*prompt, *tokens)
            scores = table[past[-2], past[-1]].tolist()
            scores = penalised(scores, past, options.repetition_penalty)
            scores = torch.tensor(scores, dtype=torch.float64).log_softmax(-1).tolist()
            candidates += [(total + score, (*tokens, t)) for t, score in enumerate(scores)]
        candidates.sort(key=best_first)
        for total, tokens in candidates[: options.num_beams]:
            if tokens[-1] in end_ids or length == limit:
                found.append((total / length**options.length_penalty, tokens))
        going_on = [candidate for candidate in candidates if candidate[1][-1] not in end_ids]
        beams = going_on[: options.num_beams]
    return [tokens for _, tokens in sorted(found, key=best_first)[: options.num_beams]]


PROMPTS = st.lists(
    st.tuples(st.integers(1, VOCAB - 1), st.integers(1, VOCAB - 1)), min_size=1, max_size=4
)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("seed", range(5))
def test_a_beam_wide_enough_finds_the_best_of_all_sequences(seed: int, power: float):
    table, limit, prompts = random_table(seed, vocab_size=4), 4, [(1, 2), (3, 3)]
    options = DecodingSettings(
        max_new_tokens=limit, num_beams=110, num_return=6, length_penalty=power
    )
    for prompt, found in zip(prompts, run(table, prompts, options), strict=True):
        scores = enumerate_all(table, prompt, limit, power)
        best = sorted(scores.values(), reverse=True)[:6]
        assert [decoded.score for decoded in found] == pytest.approx(best)
        # By their scores, not by their place: two sequences of the same steps are equally good.
        tokens = [whole(decoded, limit) for decoded in found]
        assert [scores[each] for each in tokens] == pytest.approx(best)
        assert len(set(tokens)) == 6


@settings(max_examples=200)
@given(
    seed=SEED,
    prompts=PROMPTS,
    num_beams=st.integers(2, 4),
    power=st.sampled_from([0.0, 0.7, 1.0, 2.0]),
    penalty=st.sampled_from([1.0, 1.0, 1.6]),
    end_ids=st.sampled_from([frozenset({0}), frozenset({0, 3}), frozenset({0, 3, 4, 5, 6, 7})]),
    end_bonus=st.sampled_from([-3.0, 0.0, 1.5]),
    data=st.data(),
)
def test_beam_search_follows_its_definition_and_loses_nothing_by_stopping_early(
    seed: int,
    prompts: list[tuple[int, ...]],
    num_beams: int,
    power: float,
    penalty: float,
    end_ids: frozenset[int],
    end_bonus: float,
    data: st.DataObject,
):
    table = random_table(seed, vocab_size=8)
    table[..., list(end_ids)] += end_bonus
    limits = [data.draw(st.integers(1, 7)) for _ in prompts]
    options = DecodingSettings(
        max_new_tokens=7,
        num_beams=num_beams,
        num_return=num_beams,
        length_penalty=power,
        repetition_penalty=penalty,
    )
    results = run(table, prompts, options, limits, end_ids=end_ids)
    for prompt, limit, found in zip(prompts, limits, results, strict=True):
        expected = plain_beam_search(table, prompt, limit, end_ids, options)
        assert [decoded.finished for decoded in found] == [t[-1] in end_ids for t in expected]
        assert [decoded.token_ids for decoded in found] == [
            tokens[:-1] if tokens[-1] in end_ids else tokens for tokens in expected
        ]
        # The order is that of the penalised scores, the score is the model's own.
        scores = [log_probability(table, prompt, t) / len(t) ** power for t in expected]
        assert [decoded.score for decoded in found] == pytest.approx(scores)


def test_beam_search_stops_once_no_beam_can_beat_what_was_found():
    table = torch.full((VOCAB, VOCAB, VOCAB), -50.0)
    table[..., END] = 0.0
    table[1, 1, :4] = torch.tensor([-0.9, -50.0, -0.5, -5.0])  # log probabilities, nearly
    table[1, 2, 1:] = -5.5
    stepper = TableStepper(table, [(1, 1)])
    options = DecodingSettings(max_new_tokens=3, num_beams=2, num_return=2)
    (found,) = generate(stepper, options, [Request(0)], end_ids=frozenset({END}))
    assert [decoded.token_ids for decoded in found] == [(2,), ()]
    # After two steps (2) scores -0.5 / 2, () -0.9 and (3) -5 / 2. Going on with (2, 1), worth at
    # most -6 / 3, cannot beat the best two, though it could beat the third.
    assert stepper.advanced == [2]


def test_beams_of_an_input_that_is_done_leave_the_batch():
    table = torch.zeros(VOCAB, VOCAB, VOCAB)
    table[..., END] = 8.0
    table[:, 2, END], table[:, 2, 2] = -30.0, 30.0  # once at 2, always at 2
    table[:, [1, 3, 4], 2] = -30.0
    stepper = TableStepper(table, [(1, 1), (2, 2)])
    options = DecodingSettings(max_new_tokens=6, num_beams=3, length_penalty=0.0)
    found = generate(stepper, options, [Request(0), Request(1)], end_ids=frozenset({END}))
    assert [best.token_ids for (best,) in found] == [(), (2,) * 6]
    assert stepper.advanced == [6, 3, 3, 3, 3]


def test_fewer_hypotheses_are_returned_where_fewer_exist():
    table = random_table(0, vocab_size=2)
    options = DecodingSettings(max_new_tokens=1, num_beams=4, num_return=4)
    (found,) = run(table, [(1, 1)], options)
    assert sorted(decoded.token_ids for decoded in found) == [(), (1,)]
    assert found[0].score > found[1].score
    (found,) = run(random_table(0), [(1, 1)], options, banned_ids=(0, 1, 2, 3))
    assert [decoded.token_ids for decoded in found] == [(4,)]


def plain_greedy(
    table: Tensor, prompt: tuple[int, ...], options: DecodingSettings, banned: Sequence[int]
) -> tuple[int, ...]:
    tokens: tuple[int, ...] = ()
    while len(tokens) < options.max_new_tokens and END not in tokens:
        past = (*prompt, *tokens)
        scores = penalised(table[past[-2], past[-1]].tolist(), past, options.repetition_penalty)
        for token in banned:
            scores[token] = -math.inf
        if len(tokens) < options.min_new_tokens:
            scores[END] = -math.inf
        tokens = (*tokens, scores.index(max(scores)))
    return tokens


@settings(max_examples=200)
@given(
    seed=SEED,
    prompts=PROMPTS,
    penalty=st.sampled_from([0.8, 1.0, 1.5, 3.0]),
    limit=st.integers(1, 8),
    banned=st.sampled_from([(), (2,), (1, 4)]),
    data=st.data(),
)
def test_greedy_decoding_takes_the_best_token_each_time(
    seed: int,
    prompts: list[tuple[int, ...]],
    penalty: float,
    limit: int,
    banned: tuple[int, ...],
    data: st.DataObject,
):
    table = random_table(seed)
    options = DecodingSettings(
        max_new_tokens=limit,
        min_new_tokens=data.draw(st.integers(0, limit)),
        repetition_penalty=penalty,
        num_beams=1,
    )
    streamed: list[list[int]] = [[] for _ in prompts]
    results = run(
        table,
        prompts,
        options,
        banned_ids=banned,
        on_token=lambda place, token: streamed[place].append(token),
    )
    for prompt, (decoded,), seen in zip(prompts, results, streamed, strict=True):
        assert whole(decoded, limit) == plain_greedy(table, prompt, options, banned)
        # The score is the model's own, whatever is penalised or banned.
        expected = log_probability(table, prompt, whole(decoded, limit))
        assert decoded.score == pytest.approx(expected)
        assert tuple(seen) == decoded.token_ids


@settings(max_examples=100)
@given(
    seed=SEED,
    prompts=PROMPTS,
    penalty=st.sampled_from([1.0, 1.5]),
    shortest=st.integers(0, 4),
    levels=st.sampled_from([2, 1000]),
)
def test_one_beam_without_length_penalty_is_greedy_decoding(
    seed: int, prompts: list[tuple[int, ...]], penalty: float, shortest: int, levels: int
):
    table = (random_table(seed) * levels).round() / levels  # few levels: many equal scores
    options = DecodingSettings(
        max_new_tokens=8, min_new_tokens=shortest, repetition_penalty=penalty
    )
    greedy = run(table.float(), prompts, options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "_SingleSearch", search._BeamSearch)
        assert run(table.float(), prompts, options) == greedy


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_of_equal_scores_the_lowest_token_is_taken(dtype: torch.dtype, num_beams: int):
    table = torch.zeros(VOCAB, VOCAB, VOCAB, dtype=dtype)
    options = DecodingSettings(max_new_tokens=3, num_beams=num_beams, num_return=num_beams)
    (found,) = run(table, [(1, 1)], options, end_ids=frozenset(), banned_ids=(0, 1))
    expected = [(2, 2, 2), (2, 2, 3), (2, 2, 4)]
    assert [decoded.token_ids for decoded in found] == expected[:num_beams]
    # Computed in float32 or wider: log 5 in bfloat16 is wrong in the third place.
    score = -3 * math.log(VOCAB) / (1 if num_beams == 1 else 3)
    assert [decoded.score for decoded in found] == pytest.approx([score] * num_beams, rel=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        DecodingSettings(max_new_tokens=6),
        DecodingSettings(max_new_tokens=6, repetition_penalty=1.7, min_new_tokens=2),
        DecodingSettings(max_new_tokens=6, temperature=1.3, top_k=4, top_p=0.9),
        DecodingSettings(max_new_tokens=6, temperature=1.0, num_return=3, repetition_penalty=1.2),
        DecodingSettings(max_new_tokens=6, num_beams=3, num_return=2),
        DecodingSettings(max_new_tokens=6, num_beams=2, repetition_penalty=1.5, length_penalty=0.5),
    ],
    ids=["greedy", "penalised", "filtered", "samples", "beams", "penalised beams"],
)
@settings(max_examples=60)
@given(seed=SEED, prompts=PROMPTS, draw=st.integers(0, 99), data=st.data())
def test_a_batch_gives_what_each_of_its_sequences_gives_alone(
    options: DecodingSettings,
    seed: int,
    prompts: list[tuple[int, ...]],
    draw: int,
    data: st.DataObject,
):
    if options.temperature:
        options = replace(options, seed=draw)
    table = random_table(seed).float()
    requests = [
        Request(data.draw(st.integers(0, 9)), prompt, data.draw(st.integers(0, 7)))
        for prompt in prompts
    ]

    def stops(token_ids: tuple[int, ...]) -> bool:
        return token_ids[-2:] == (1, 2)

    together = generate(
        TableStepper(table, prompts),
        options,
        requests,
        end_ids=frozenset({END}),
        stop=lambda place, token_ids: stops(token_ids),
    )
    for prompt, request, found in zip(prompts, requests, together, strict=True):
        (alone,) = generate(
            TableStepper(table, [prompt]),
            options,
            [request],
            end_ids=frozenset({END}),
            stop=lambda place, token_ids: stops(token_ids),
        )
        assert found == alone


def within_six_sigma(count: int, trials: int, probability: float) -> bool:
    deviation = math.sqrt(trials * probability * (1 - probability))
    return abs(count - trials * probability) <= 6 * deviation + 1e-9


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "penalty"),
    [(1.0, 0, 1.0, 1.0), (0.6, 0, 1.0, 1.5), (1.5, 3, 1.0, 1.0), (1.0, 0, 0.7, 1.0)],
)
def test_samples_are_as_frequent_as_their_probability(
    temperature: float, top_k: int, top_p: float, penalty: float
):
    table, trials, prompt = random_table(5, scale=1.0), 20_000, (1, 2)
    options = DecodingSettings(
        max_new_tokens=2,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=penalty,
        num_return=trials,
    )
    (found,) = run(table, [prompt], options)
    counts = Counter(whole(decoded, 2) for decoded in found)

    def distribution(past: tuple[int, ...]) -> dict[int, float]:
        scores = penalised(table[past[-2], past[-1]].tolist(), past, penalty)
        weights = {t: math.exp(score / temperature) for t, score in enumerate(scores)}
        best = sorted(weights, key=lambda token: -weights[token])[: top_k or VOCAB]
        weights = {token: weights[token] / sum(weights[b] for b in best) for token in best}
        kept = [t for i, t in enumerate(best) if sum(weights[b] for b in best[:i]) < top_p]
        return {token: weights[token] / sum(weights[k] for k in kept) for token in kept}

    expected: dict[tuple[int, ...], float] = {}
    for first, probability in distribution(prompt).items():
        if first == END:
            expected[END,] = probability
            continue
        for second, then in distribution((*prompt, first)).items():
            expected[first, second] = probability * then
    assert sum(expected.values()) == pytest.approx(1)
    assert set(counts) <= set(expected)
    for tokens, probability in expected.items():
        assert within_six_sigma(counts[tokens], trials, probability), tokens
    scores = [decoded.score for decoded in found]
    assert scores == sorted(scores, reverse=True)
    for decoded in found[:50]:
        assert decoded.score == pytest.approx(log_probability(table, prompt, whole(decoded, 2)))


def test_draws_depend_on_seed_example_and_number_of_the_draw_only():
    table, prompt = torch.zeros(VOCAB, VOCAB, VOCAB), (1, 1)
    options = DecodingSettings(max_new_tokens=40, temperature=1.0, num_return=2, seed=3)

    def draws(example_id: int, seed: int) -> list[tuple[int, ...]]:
        (found,) = generate(
            TableStepper(table, [prompt]),
            replace(options, seed=seed),
            [Request(example_id)],
            end_ids=frozenset(),
        )
        return [decoded.token_ids for decoded in found]

    assert draws(7, 3) == draws(7, 3)
    different = [*draws(7, 3), *draws(7, 4), *draws(8, 3)]
    assert len(set(different)) == 6
    # The first draws stay what they are where more are asked for.
    options = replace(options, num_return=5)
    assert set(different[:2]) <= set(draws(7, 3))


@settings(max_examples=60)
@given(seed=SEED, prompts=PROMPTS, temperature=st.sampled_from([0.0, 1.0]))
def test_finished_sequences_leave_the_batch_at_once(
    seed: int, prompts: list[tuple[int, ...]], temperature: float
):
    stepper = TableStepper(random_table(seed), prompts)
    requests = [Request(number) for number in range(len(prompts))]
    options = DecodingSettings(max_new_tokens=9, temperature=temperature)
    results = generate(stepper, options, requests, end_ids=frozenset({END}))
    lengths = [len(whole(decoded, 9)) for (decoded,) in results]
    # A sequence of n tokens is advanced n - 1 times: nothing is computed after its last.
    expected = [sum(length > step for length in lengths) for step in range(1, max(lengths))]
    assert stepper.advanced == expected


@pytest.mark.parametrize("num_beams", [1, 3])
def test_each_sequence_keeps_to_its_own_limit(num_beams: int):
    table, prompts = random_table(1), [(1, 1)] * 5
    options = DecodingSettings(max_new_tokens=6, min_new_tokens=6, num_beams=num_beams)
    results = run(table, prompts, options, [None, 3, 0, -2, 99])
    assert [len(found[0].token_ids) for found in results] == [6, 3, 0, 0, 6]
    assert not any(found[0].finished for found in results)
    assert results[2] == results[3] == [Decoded((), 0.0, False)]
    assert results[0] == results[4]


def test_without_room_for_a_token_nothing_is_computed():
    stepper = TableStepper(random_table(0), [(1, 1)])
    options = DecodingSettings(temperature=1.0, num_return=2)
    nothing = Decoded((), 0.0, False)
    found = generate(stepper, options, [Request(0, (), 0)], end_ids=frozenset({END}))
    assert found == [[nothing, nothing]] and not stepper.advanced
    assert generate(stepper, options, [], end_ids=frozenset({END})) == []


def test_an_end_token_at_the_limit_finishes_the_sequence():
    table = torch.zeros(VOCAB, VOCAB, VOCAB)
    table[1, 1, 2] = table[1, 2, END] = 5.0
    ((decoded,),) = run(table, [(1, 1)], DecodingSettings(max_new_tokens=2))
    assert decoded.token_ids == (2,) and decoded.finished
    ((decoded,),) = run(table, [(1, 1)], DecodingSettings(max_new_tokens=1))
    assert decoded.token_ids == (2,) and not decoded.finished


@pytest.mark.parametrize("end_ids", [{0, 3}, {1, 2, 3, 4}])
def test_any_of_several_end_tokens_ends_a_beam(end_ids: set[int]):
    options = DecodingSettings(max_new_tokens=5, min_new_tokens=2, num_beams=2, num_return=2)
    for seed in range(10):
        (found,) = run(random_table(seed), [(1, 1)], options, end_ids=frozenset(end_ids))
        for decoded in found:
            assert not end_ids & set(decoded.token_ids)
            assert len(decoded.token_ids) == 5 or (decoded.finished and len(decoded.token_ids) > 1)


@pytest.mark.parametrize("num_beams", [1, 2])
def test_a_stop_rule_ends_a_sequence_after_the_token_that_met_it(num_beams: int):
    table = torch.zeros(VOCAB, VOCAB, VOCAB)
    for last in range(VOCAB):
        table[:, last, 1 + last % 4] = 9.0  # 1, 2, 3, 4, 1, 2 ...
    asked: list[tuple[int, tuple[int, ...]]] = []

    def stop(place: int, token_ids: tuple[int, ...]) -> bool:
        asked.append((place, token_ids))
        return place == 1 and token_ids[-2:] == (3, 4)

    options = DecodingSettings(max_new_tokens=7, num_beams=num_beams)
    first, second = run(table, [(4, 4), (4, 4)], options, stop=stop)
    assert first[0].token_ids == (1, 2, 3, 4, 1, 2, 3) and not first[0].finished
    assert second[0].token_ids == (1, 2, 3, 4) and second[0].finished
    length = 1 if num_beams == 1 else 4
    expected = log_probability(table, (4, 4), (1, 2, 3, 4)) / length
    assert second[0].score == pytest.approx(expected)
    assert (0, (1,)) in asked and all(END not in token_ids for _, token_ids in asked)


def test_beams_that_the_stop_rule_ends_make_room_for_others():
    """Everything that begins with 1 or 2 is stopped at once: both are found, the rest go on."""
    table = random_table(2, scale=0.1)
    table[1, 1, 1], table[1, 1, 2] = 4.0, 3.0
    options = DecodingSettings(max_new_tokens=3, num_beams=2, num_return=2, length_penalty=0.0)
    (found,) = run(
        table, [(1, 1)], options, stop=lambda place, ids: ids[0] in (1, 2), end_ids=frozenset()
    )
    assert [decoded.token_ids for decoded in found] == [(1,), (2,)]
    assert all(decoded.finished for decoded in found)


def test_tokens_are_shown_before_the_next_is_computed():
    stepper = TableStepper(random_table(0), [(1, 1), (2, 2)])
    steps: list[int] = []
    generate(
        stepper,
        DecodingSettings(max_new_tokens=3),
        [Request(0), Request(1)],
        end_ids=frozenset(),
        on_token=lambda place, token: steps.append(len(stepper.advanced)),
    )
    assert steps == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    "options",
    [DecodingSettings(num_beams=2), DecodingSettings(temperature=1.0, num_return=2)],
)
def test_tokens_that_may_be_revised_are_not_shown(options: DecodingSettings):
    with pytest.raises(UsageError, match="--n-best"):
        run(random_table(0), [(1, 1)], options, on_token=lambda place, token: None)


@pytest.mark.parametrize(
    "options",
    [DecodingSettings(), DecodingSettings(temperature=1.0), DecodingSettings(num_beams=2)],
    ids=["greedy", "sampling", "beams"],
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_scores_that_are_no_numbers_are_named(options: DecodingSettings, value: float):
    table = random_table(0)
    table[2, 2, 3] = value
    with pytest.raises(DivergenceError, match="example 10, new token 1"):
        run(table, [(1, 1), (2, 2)], options)


@pytest.mark.parametrize(
    "options",
    [
        DecodingSettings(min_new_tokens=1),
        DecodingSettings(min_new_tokens=1, temperature=1.0),
        DecodingSettings(min_new_tokens=1, num_beams=2),
    ],
    ids=["greedy", "sampling", "beams"],
)
def test_a_ban_of_every_token_is_refused(options: DecodingSettings):
    with pytest.raises(UsageError, match="example 0, new token 1"):
        run(random_table(0), [(1, 1)], options, banned_ids=range(1, VOCAB))


class UncachedGPT2:
    """A transformers model that reads each whole sequence anew."""

    def __init__(self, model: GPT2LMHeadModel, prompts_BN: Tensor) -> None:
        self.model, self.rows_BN = model, prompts_BN
        self._score()

    def advance(self, tokens_B: Tensor) -> None:
        self.rows_BN = torch.cat([self.rows_BN, tokens_B[:, None]], dim=1)
        self._score()

    def select(self, rows: Tensor) -> None:
        self.rows_BN = self.rows_BN[rows]
        self._score()

    def _score(self) -> None:
        self.logits = self.model(self.rows_BN).logits[:, -1]


@pytest.fixture(scope="module")
def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=11,
        n_positions=32,
        n_embd=16,
        n_layer=1,
        n_head=2,
        initializer_range=0.6,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():  # so that some sequences end and others do not
        model.transformer.ln_f.bias.copy_(-0.1 * model.lm_head.weight[0])
    return model


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        *[
            (
                {"num_beams": width, "num_return": width, "length_penalty": power},
                {
                    "num_beams": width,
                    "num_return_sequences": width,
                    "length_penalty": power,
                    # The other values stop by a guess, which may lose a better hypothesis.
                    "early_stopping": "never",
                },
            )
            for width, power in [(2, 0.0), (3, 1.0), (4, 2.0)]
        ],
        ({"min_new_tokens": 3}, {"min_new_tokens": 3}),
        ({"repetition_penalty": 1.6}, {"repetition_penalty": 1.6}),
        ({"repetition_penalty": 0.7}, {"repetition_penalty": 0.7}),
    ],
)
def test_sequences_are_those_of_transformers(
    gpt2: GPT2LMHeadModel, ours: dict[str, Any], theirs: dict[str, Any]
):
    generator = torch.Generator().manual_seed(1)
    prompts_BN = torch.randint(1, 11, (20, 4), generator=generator)
    with torch.no_grad():
        results = generate(
            UncachedGPT2(gpt2, prompts_BN),
            DecodingSettings(max_new_tokens=9, **ours),
            [Request(place, row) for place, row in enumerate(prompts_BN.tolist())],
            end_ids=frozenset({0}),
        )
        expected_BN = gpt2.generate(
            prompts_BN,
            attention_mask=torch.ones_like(prompts_BN),
            do_sample=False,
            max_new_tokens=9,
            **theirs,
        )
    found = [(*d.token_ids, *[0] * (9 - len(d.token_ids))) for row in results for d in row]
    expected = torch.nn.functional.pad(expected_BN[:, 4:], (0, 13 - expected_BN.shape[1]))
    assert found == [tuple(row) for row in expected.tolist()]
    assert 0 < sum(d.finished for row in results for d in row) < len(found)
