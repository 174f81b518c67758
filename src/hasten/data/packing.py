"""Examples to PackedBatch: gather the examples' tokens and lay them end to end.

TokenStore, example numbers (S,)     --> token_ids (N,), positions, layout, targets
TokenStore, ranges of tokens (S,)    --> token_ids (N,), and the next token of each as target
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hasten.core.batch import PackedBatch, SequenceLayout, positions_from_lengths
from hasten.data.tokens import EncodedText, TokenStore

IGNORED = -100
"""Target of a token whose successor is not learned."""


def pack_examples(
    store: TokenStore,
    rows: np.ndarray,
    *,
    example_ids: np.ndarray | None = None,
    targets: np.ndarray | None = None,
    weight: float = 1.0,
) -> PackedBatch:
    """Packs whole sequences of a store.

    Args:
        store: encoded examples.
        rows: (S,) their numbers in the store, in the order in which they are laid down.
        example_ids: (S,) which example each is; ``rows`` by default.
        targets: (S, ...) one target for each sequence.
        weight: units that the step's summed loss is divided by.
    """
    starts = store.offsets[rows]
    lengths = store.offsets[rows + 1] - starts
    places = places_of(starts, lengths)
    types = None if store.token_types is None else _int64(store.token_types[places])
    return PackedBatch(
        token_ids=_int64(store.token_ids[places]),
        positions=torch.from_numpy(positions_from_lengths(lengths.tolist())),
        layout=SequenceLayout.from_lengths(lengths.tolist()),
        example_ids=_int64(rows if example_ids is None else example_ids),
        token_types=types,
        targets=None if targets is None else _int64(targets),
        weight=weight,
    )


def pack_shifted(
    store: TokenStore,
    starts: np.ndarray,
    ends: np.ndarray,
    *,
    example_ids: np.ndarray,
    learned_type: int | None = None,
    weight: float = 1.0,
) -> PackedBatch:
    """Packs ranges of a store's tokens for learning the next token.

    A range of n + 1 tokens becomes a sequence of its first n, whose targets are its last n.

    Args:
        store: encoded texts.
        starts: (S,) first token of each range.
        ends: (S,) the place after its last token; at least two tokens after its start.
        example_ids: (S,) which example each is.
        learned_type: only targets of this token type are learned; None for all.
        weight: units that the step's summed loss is divided by.
    """
    lengths = ends - starts - 1
    places = places_of(starts, lengths)
    targets = store.token_ids[places + 1].astype(np.int64)
    if learned_type is not None:
        assert store.token_types is not None
        targets[store.token_types[places + 1] != learned_type] = IGNORED
    return PackedBatch(
        token_ids=_int64(store.token_ids[places]),
        positions=torch.from_numpy(positions_from_lengths(lengths.tolist())),
        layout=SequenceLayout.from_lengths(lengths.tolist()),
        example_ids=_int64(example_ids),
        targets=torch.from_numpy(targets),
        weight=weight,
    )


def pack_texts(texts: Sequence[EncodedText], *, with_types: bool = False) -> PackedBatch:
    """Packs encoded texts that are in memory, without targets."""
    lengths = [len(text.token_ids) for text in texts]
    ids = np.concatenate([np.asarray(text.token_ids, dtype=np.int64) for text in texts])
    types = np.concatenate([np.asarray(text.token_types, dtype=np.int64) for text in texts])
    return PackedBatch(
        token_ids=torch.from_numpy(ids),
        positions=torch.from_numpy(positions_from_lengths(lengths)),
        layout=SequenceLayout.from_lengths(lengths),
        example_ids=torch.arange(len(texts)),
        token_types=torch.from_numpy(types) if with_types else None,
    )


def places_of(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Returns (sum of lengths,) the places ``start, start + 1, ...`` of each range in turn."""
    return np.repeat(starts - (np.cumsum(lengths) - lengths), lengths) + np.arange(lengths.sum())


def _int64(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array).astype(np.int64))
