"""The order of an epoch: a pure function of (seed, epoch, lengths, budget).

    lengths (E,) --permute--> windows, sorted --cut at equal token quotas, permute--> batches

The plan never depends on how many processes there are, and nothing of it is saved: the place
in the data is (epoch, batch), so resuming replays nothing and skips nothing.

Packed batches carry no padding, but attention works on groups of like length: fewer and fuller
groups are faster. So like lengths are gathered inside a shuffled window of a few batches, small
enough that an example meets other neighbours in every epoch.
"""

from __future__ import annotations

import itertools

import numpy as np

from hasten.core.seeds import derive_seed

_WINDOW_BATCHES = 8
_RUNS = (16, 8, 4, 2)  # examples that a process is dealt at a time
_MIN_WINDOWS = 4  # an epoch of fewer batches has smaller windows, so that neighbours still change


def steps_per_epoch(lengths: np.ndarray, tokens_per_step: int) -> int:
    """Returns the number of batches of an epoch, the same for every epoch."""
    return min(len(lengths), max(1, -(-int(lengths.sum()) // tokens_per_step)))


def plan_epoch(lengths: np.ndarray, *, seed: int, epoch: int, num_batches: int) -> list[np.ndarray]:
    """Plans the global batches of one epoch.

    Args:
        lengths: (E,) tokens of each example.
        seed: of the run.
        epoch: counted from 0.
        num_batches: at most E, see ``steps_per_epoch``. Batches are cut at equal quotas of
            tokens, so that the last is no smaller than the others; one may exceed its quota by
            less than one example.

    Returns:
        ``num_batches`` arrays of example numbers, none empty; each example is in exactly one.
    """
    assert 1 <= num_batches <= len(lengths)
    draw = np.random.default_rng(derive_seed("order", seed, epoch))
    order = draw.permutation(len(lengths))
    quota = int(lengths.sum()) / num_batches
    batches_per_window = max(1, min(_WINDOW_BATCHES, num_batches // _MIN_WINDOWS))
    window = (np.cumsum(lengths[order]) - lengths[order]) // (quota * batches_per_window)
    if batches_per_window > 1:
        order = order[np.lexsort((lengths[order], window))]
    before = np.cumsum(lengths[order]) - lengths[order]
    number = np.arange(1, num_batches)
    cuts = np.searchsorted(before, number * quota)
    # An example longer than a quota would leave batches empty: each takes at least one example.
    cuts = np.maximum.accumulate(np.maximum(cuts, 1) - number) + number
    batches = np.split(order, np.minimum(cuts, len(order) - num_batches + number))
    return [batches[i] for i in draw.permutation(num_batches)]


def deal_micro_batches(
    batch: np.ndarray, lengths: np.ndarray, micro_batch_tokens: int, num_ranks: int
) -> list[list[np.ndarray]]:
    """Cuts a global batch into rounds of one micro-batch a process.

    Args:
        batch: example numbers.
        lengths: (E,) tokens of each example.
        micro_batch_tokens: token budget of a micro-batch; a longer example is alone in its own.
        num_ranks: processes that share the batch, about equally many tokens each.

    Returns:
        Rounds of ``num_ranks`` micro-batches; some of the last are empty where examples do not
        go round.
    """
    ordered = batch[np.lexsort((batch, lengths[batch]))][::-1]
    owner = _owners(lengths[ordered], num_ranks)
    shares = [
        cut_micro_batches(ordered[owner == rank], lengths, micro_batch_tokens)
        for rank in range(num_ranks)
    ]
    empty = batch[:0]
    return [list(pieces) for pieces in itertools.zip_longest(*shares, fillvalue=empty)]


def _owners(sizes: np.ndarray, num_ranks: int) -> np.ndarray:
    """Returns which process gets each of the examples, given the longest first.

    Examples of like length form a group in attention, and the fewer groups a process has, the
    faster it is: so neighbours stay together, where shares come out even to one example.
    """
    for run in _RUNS:
        cycle = 2 * num_ranks * run
        owner = _dealt(len(sizes), run, len(sizes) // cycle * cycle, num_ranks)
        if len(sizes) >= cycle and np.ptp(np.bincount(owner, sizes)) <= sizes[0]:
            return owner
    return _dealt(len(sizes), 1, 0, num_ranks)


def _dealt(count: int, run: int, together: int, num_ranks: int) -> np.ndarray:
    """Deals to and fro, the first ``together`` in runs, the others one by one.

    Of examples by falling length, dealt one by one, the sums differ by less than one of them.
    """
    turns = np.arange(together) // run, np.arange(count - together)
    turn = np.concatenate(turns) % (2 * num_ranks)
    return np.minimum(turn, 2 * num_ranks - 1 - turn)


def cut_micro_batches(
    batch: np.ndarray, lengths: np.ndarray, micro_batch_tokens: int
) -> list[np.ndarray]:
    """Cuts a global batch into micro-batches of like lengths.

    Args:
        batch: example numbers.
        lengths: (E,) tokens of each example.
        micro_batch_tokens: token budget of a micro-batch; a longer example is alone in its own.

    Returns:
        The batch's examples, sorted by length so that attention groups are plain views, cut
        wherever the next example would exceed the budget.
    """
    ordered = batch[np.lexsort((batch, lengths[batch]))]
    pieces: list[np.ndarray] = []
    start = tokens = 0
    for i, length in enumerate(lengths[ordered].tolist()):
        if tokens and tokens + length > micro_batch_tokens:
            pieces.append(ordered[start:i])
            start, tokens = i, 0
        tokens += length
    pieces.append(ordered[start:])
    return pieces
