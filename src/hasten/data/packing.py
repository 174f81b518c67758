"""Examples to PackedBatch: gather the examples' tokens and lay them end to end.

TokenStore, example numbers (S,) --> token_ids (N,), positions, layout, targets
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from hasten.core.batch import PackedBatch, SequenceLayout, positions_from_lengths
from hasten.data.tokens import EncodedText, TokenStore


def pack_examples(
    store: TokenStore,
    examples: np.ndarray,
    *,
    targets: np.ndarray | None = None,
    weight: float = 1.0,
) -> PackedBatch:
    """Packs the given examples of a store.

    Args:
        store: encoded examples.
        examples: (S,) their numbers, in the order in which they are laid down.
        targets: (E, ...) one target for each example of the store.
        weight: units that the step's summed loss is divided by.
    """
    starts = store.offsets[examples]
    lengths = store.offsets[examples + 1] - starts
    rows = np.repeat(starts - (np.cumsum(lengths) - lengths), lengths) + np.arange(lengths.sum())
    types = None if store.token_types is None else store.token_types[rows].astype(np.int64)
    return PackedBatch(
        token_ids=torch.from_numpy(store.token_ids[rows].astype(np.int64)),
        positions=torch.from_numpy(positions_from_lengths(lengths.tolist())),
        layout=SequenceLayout.from_lengths(lengths.tolist()),
        example_ids=torch.from_numpy(examples.astype(np.int64)),
        token_types=None if types is None else torch.from_numpy(types),
        targets=None if targets is None else torch.from_numpy(targets[examples].astype(np.int64)),
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
