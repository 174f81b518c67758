"""The order of an epoch: nothing lost, nothing twice, the same on every machine."""

from __future__ import annotations

import hashlib
import itertools
import subprocess
import sys

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.core.seeds import derive_seed
from hasten.data.order import cut_micro_batches, deal_micro_batches, plan_epoch, steps_per_epoch

LENGTHS = st.lists(
    st.one_of(st.integers(1, 12), st.integers(1, 600)), min_size=1, max_size=120
).map(lambda values: np.array(values, dtype=np.int64))
BUDGET = st.integers(1, 1500)


@settings(max_examples=300)
@given(lengths=LENGTHS, budget=BUDGET, seed=st.integers(0, 2**40), epoch=st.integers(0, 5))
def test_an_epoch_holds_every_example_once_in_as_many_batches_each_time(
    lengths: np.ndarray, budget: int, seed: int, epoch: int
):
    batches = plan_epoch(
        lengths, seed=seed, epoch=epoch, num_batches=steps_per_epoch(lengths, budget)
    )
    assert len(batches) == steps_per_epoch(lengths, budget)
    assert all(len(batch) for batch in batches)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    again = plan_epoch(
        lengths.copy(), seed=seed, epoch=epoch, num_batches=steps_per_epoch(lengths, budget)
    )
    assert all(np.array_equal(a, b) for a, b in zip(batches, again, strict=True))


@settings(max_examples=300)
@given(lengths=LENGTHS, budget=BUDGET, seed=st.integers(0, 2**40))
def test_a_batch_exceeds_its_quota_by_less_than_one_example(
    lengths: np.ndarray, budget: int, seed: int
):
    batches = plan_epoch(lengths, seed=seed, epoch=0, num_batches=steps_per_epoch(lengths, budget))
    quota = lengths.sum() / len(batches)
    # There are as many batches as the budget asks for, unless each holds one example already.
    assert quota <= budget or len(batches) == len(lengths)
    for batch in batches:
        tokens = lengths[batch].sum()
        assert tokens < quota + lengths[batch].max() or len(batch) == 1


@settings(max_examples=200)
@given(lengths=LENGTHS, other=st.integers(0, 99), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_as_many_batches_as_asked_for_whatever_the_lengths(
    lengths: np.ndarray, other: int, share: float, seed: int
):
    """Where words are cut anew each epoch, lengths change and the number of steps must not."""
    lengths = np.random.default_rng(other).permutation(lengths)
    num_batches = max(1, round(share * len(lengths)))
    batches = plan_epoch(lengths, seed=seed, epoch=0, num_batches=num_batches)
    assert len(batches) == num_batches and all(len(batch) for batch in batches)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))


@given(budget=st.integers(10, 400))
def test_batches_of_equal_examples_are_equal(budget: int):
    sizes = [
        len(b)
        for b in plan_epoch(
            np.full(200, 5), seed=1, epoch=0, num_batches=steps_per_epoch(np.full(200, 5), budget)
        )
    ]
    assert max(sizes) - min(sizes) <= 1


def test_epochs_and_seeds_differ_and_are_shuffled():
    lengths = np.arange(1, 200)
    orders = {
        tuple(
            np.concatenate(
                plan_epoch(lengths, seed=s, epoch=e, num_batches=steps_per_epoch(lengths, 500))
            ).tolist()
        )
        for s in range(4)
        for e in range(4)
    }
    assert len(orders) == 16
    assert tuple(range(199)) not in orders


def test_like_lengths_meet_but_neighbours_change():
    lengths = np.random.default_rng(0).integers(1, 60, 5000)
    first, second = (
        plan_epoch(lengths, seed=3, epoch=epoch, num_batches=steps_per_epoch(lengths, 2000))
        for epoch in range(2)
    )
    spread = np.mean([lengths[batch].std() for batch in first])
    assert spread < 0.3 * lengths.std()
    # Batches come in no order of length, and an example meets others in the next epoch.
    means = np.array([lengths[batch].mean() for batch in first])
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.4
    home = {example: set(batch.tolist()) for batch in first for example in batch.tolist()}
    again = [
        len(home[example] & set(batch.tolist())) / len(batch)
        for batch in second
        for example in batch.tolist()[:1]
    ]
    assert np.mean(again) < 0.3


def test_few_batches_are_not_sorted_into_the_same_ones_each_epoch():
    lengths = np.arange(1, 41)
    plans = [
        {frozenset(b.tolist()) for b in plan_epoch(lengths, seed=1, epoch=e, num_batches=4)}
        for e in range(3)
    ]
    assert not plans[0] & plans[1] and not plans[1] & plans[2]


def test_the_place_of_an_example_is_uniform():
    first = np.zeros(10)
    for epoch in range(2000):
        batches = plan_epoch(
            np.full(10, 3), seed=0, epoch=epoch, num_batches=steps_per_epoch(np.full(10, 3), 3)
        )
        first[batches[0][0]] += 1
    assert ((first - 200) ** 2 / 200).sum() < 33  # chi-squared, 9 degrees of freedom, p = 1e-4


def test_another_process_plans_the_same_epoch():
    code = (
        "import numpy as np, hashlib; from hasten.data.order import plan_epoch; "
        "b = plan_epoch(np.arange(1, 900), seed=7, epoch=3, num_batches=300); "
        "print(hashlib.sha256(repr([x.tolist() for x in b]).encode()).hexdigest())"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    batches = plan_epoch(np.arange(1, 900), seed=7, epoch=3, num_batches=300)
    own = hashlib.sha256(repr([x.tolist() for x in batches]).encode()).hexdigest()
    assert printed.strip() == own


@settings(max_examples=300)
@given(lengths=LENGTHS, budget=BUDGET, data=st.data())
def test_micro_batches_part_the_batch_within_the_budget(lengths: np.ndarray, budget: int, data):
    chosen = data.draw(
        st.lists(st.integers(0, len(lengths) - 1), min_size=1, unique=True), label="batch"
    )
    pieces = cut_micro_batches(np.array(chosen), lengths, budget)
    assert sorted(np.concatenate(pieces).tolist()) == sorted(chosen)
    for piece in pieces:
        assert len(piece)
        assert lengths[piece].sum() <= budget or len(piece) == 1
    in_order = lengths[np.concatenate(pieces)]
    assert (np.diff(in_order) >= 0).all()
    for piece, following in itertools.pairwise(pieces):  # no piece is cut too early
        assert lengths[piece].sum() + lengths[following[0]] > budget
    # The order in which the batch lists its examples is of no account.
    again = cut_micro_batches(np.array(chosen[::-1]), lengths, budget)
    assert [p.tolist() for p in again] == [p.tolist() for p in pieces]


@settings(max_examples=300)
@given(lengths=LENGTHS, budget=BUDGET, num_ranks=st.integers(1, 9), data=st.data())
def test_a_batch_is_dealt_to_processes_in_about_equal_shares(
    lengths: np.ndarray, budget: int, num_ranks: int, data
):
    numbers = st.lists(st.integers(0, len(lengths) - 1), min_size=1, unique=True)
    batch = np.array(data.draw(numbers, label="batch"))
    rounds = deal_micro_batches(batch, lengths, budget, num_ranks)
    assert all(len(pieces) == num_ranks for pieces in rounds)
    dealt = np.concatenate([piece for pieces in rounds for piece in pieces])
    assert sorted(dealt.tolist()) == sorted(batch.tolist())
    for pieces in rounds:
        assert any(len(piece) for piece in pieces)  # nobody waits for a round of nothing
        assert all(lengths[p].sum() <= budget or len(p) == 1 for p in pieces)
    shares = [[pieces[rank] for pieces in rounds] for rank in range(num_ranks)]
    tokens = [sum(int(lengths[piece].sum()) for piece in share) for share in shares]
    assert max(tokens) - min(tokens) <= lengths[batch].max()
    counts = [sum(len(piece) for piece in share) for share in shares]
    assert max(counts) - min(counts) <= 1
    for share in shares:  # what a process has, it has first, and without gaps
        sizes = [len(piece) > 0 for piece in share]
        assert sizes == sorted(sizes, reverse=True)
    # The order in which the batch lists its examples is of no account.
    again = deal_micro_batches(batch[::-1], lengths, budget, num_ranks)
    assert [[p.tolist() for p in r] for r in again] == [[p.tolist() for p in r] for r in rounds]


@given(lengths=LENGTHS, budget=BUDGET)
def test_a_process_alone_is_dealt_what_it_would_cut(lengths: np.ndarray, budget: int):
    batch = np.arange(len(lengths))
    rounds = deal_micro_batches(batch, lengths, budget, 1)
    pieces = cut_micro_batches(batch, lengths, budget)
    assert [[p.tolist() for p in r] for r in rounds] == [[p.tolist()] for p in pieces]


def test_neighbours_in_length_stay_together_where_there_are_many():
    lengths = np.repeat(np.arange(10, 42), 16)
    rounds = deal_micro_batches(np.arange(len(lengths)), lengths, 10**6, 2)
    assert [len(set(lengths[piece].tolist())) for piece in rounds[0]] == [16, 16]


def test_processes_without_an_example_are_dealt_empty_pieces():
    rounds = deal_micro_batches(np.array([3, 1]), np.array([5, 5, 5, 9]), 100, 4)
    assert [[p.tolist() for p in pieces] for pieces in rounds] == [[[3], [1], [], []]]


@given(st.lists(st.one_of(st.integers(0, 10**9), st.text(max_size=5)), min_size=1, max_size=4))
def test_seeds_are_in_range_and_depend_on_every_part(parts: list[int | str]):
    seed = derive_seed(*parts)
    assert 0 <= seed < 2**63
    assert seed == derive_seed(*parts)
    for i, part in enumerate(parts):
        other = part + 1 if isinstance(part, int) else part + "x"
        assert derive_seed(*parts[:i], other, *parts[i + 1 :]) != seed
    if parts != parts[::-1]:
        assert derive_seed(*parts[::-1]) != seed
    assert derive_seed(1, 23) != derive_seed(12, 3)
    assert derive_seed(1) != derive_seed("1")
