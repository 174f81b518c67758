"""Padded rectangles give what packed batches give, whatever stands at the padding."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_packing_equivalence import DECODER_OPTIONS, OPTIONS, TRANSLATOR_OPTIONS
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from builders import VOCAB, default_dtype, pack, random_sequences, small_model
from hasten.model.dense import DenseTransformer
from hasten.model.heads import TokenOutputs
from hasten.model.transformer import Transformer

LENGTHS = st.lists(st.sampled_from([1, 2, 3, 5, 40]), min_size=1, max_size=4)
PADDINGS = st.integers(0, VOCAB - 1)


def packed_rows(model: Transformer, batch: Any) -> Tensor:
    outputs = model(batch)
    return outputs.scores() if isinstance(outputs, TokenOutputs) else outputs


def padded(sequences: list[Tensor], padding: int) -> tuple[Tensor, Tensor]:
    """Ids and mask, with two columns more than the longest needs."""
    ids = pad_sequence(sequences, batch_first=True, padding_value=padding)
    ids = torch.cat([ids, ids.new_full((len(ids), 2), padding)], dim=1)
    lengths = torch.tensor([len(s) for s in sequences])
    return ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long()


def rows_of(model: Transformer, dense: Tensor, mask: Tensor) -> Tensor:
    """The rows that a packed batch has: of sequences, or of tokens without padding."""
    return dense if dense.ndim == 2 else dense[mask.bool()]


@settings(max_examples=40)
@given(OPTIONS | DECODER_OPTIONS, LENGTHS, PADDINGS, st.booleans())
def test_a_stack_gives_what_it_gives_packed(
    options: dict[str, Any], lengths: list[int], padding: int, has_types: bool
):
    with default_dtype(torch.float64):
        model = small_model(**options)
    sequences = random_sequences(lengths)
    types = [s % 3 for s in sequences] if options.get("num_token_types") and has_types else None
    ids, mask = padded(sequences, padding)
    type_ids = None if types is None else padded(types, padding % 3)[0]
    with torch.inference_mode():
        expected = packed_rows(model, pack(sequences, types))
        found = DenseTransformer(model)(ids, mask, type_ids)
    torch.testing.assert_close(rows_of(model, found, mask), expected)


@settings(max_examples=30)
@given(TRANSLATOR_OPTIONS, LENGTHS, LENGTHS, PADDINGS)
def test_a_translator_gives_what_it_gives_packed(
    options: dict[str, Any], lengths: list[int], of_sources: list[int], padding: int
):
    count = min(len(lengths), len(of_sources))
    with default_dtype(torch.float64):
        model = small_model(**options)
    sequences, sources = random_sequences(lengths[:count]), random_sequences(of_sources[:count], 1)
    (ids, mask), (source_ids, source_mask) = padded(sequences, padding), padded(sources, padding)
    with torch.inference_mode():
        expected = packed_rows(model, pack(sequences, sources=sources))
        found = DenseTransformer(model)(ids, mask, source_ids=source_ids, source_mask=source_mask)
    torch.testing.assert_close(rows_of(model, found, mask), expected)
