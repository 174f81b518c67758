"""The packed batch: layout, positions, and a padded batch packed at the door."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from builders import default_dtype, gradients, pack, random_sequences, small_model
from hasten.core.batch import (
    PackedBatch,
    SequenceLayout,
    pack_padded,
    positions_from_lengths,
)

LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=12)


@given(lengths=LENGTHS)
def test_layout_and_positions_follow_from_the_lengths(lengths: list[int]):
    layout = SequenceLayout.from_lengths(lengths)
    assert layout.offsets.dtype == torch.int32
    assert layout.offsets.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    assert layout.num_tokens == sum(lengths)
    assert layout.sequence_ids.tolist() == [i for i, n in enumerate(lengths) for _ in range(n)]
    assert positions_from_lengths(lengths).tolist() == [p for n in lengths for p in range(n)]


@given(lengths=LENGTHS, extra=st.integers(0, 5), as_type=st.sampled_from([bool, int, float]))
def test_a_padded_batch_is_packed_without_its_padding(lengths: list[int], extra: int, as_type):
    sequences = random_sequences(lengths)
    width = max(lengths) + extra
    ids = torch.full((len(lengths), width), 7)
    mask = torch.zeros(len(lengths), width)
    for i, sequence in enumerate(sequences):
        ids[i, : len(sequence)] = sequence
        mask[i, : len(sequence)] = 1
    dtype = {bool: torch.bool, int: torch.int64, float: torch.float32}[as_type]
    found, expected = pack_padded(ids, mask.to(dtype)), pack(sequences)
    assert torch.equal(found.token_ids, expected.token_ids)
    assert torch.equal(found.positions, expected.positions)
    assert found.positions.dtype == torch.int32 and found.token_ids.dtype == torch.int64
    assert torch.equal(found.layout.offsets, expected.layout.offsets)
    assert found.layout.lengths == expected.layout.lengths
    assert torch.equal(found.example_ids, expected.example_ids)
    assert (found.num_tokens, found.num_sequences) == (sum(lengths), len(lengths))


def test_the_model_gives_the_same_scores_for_padded_and_packed():
    model, sequences = small_model(), random_sequences([4, 9, 1])
    ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=3)
    mask = torch.arange(9)[None, :] < torch.tensor([4, 9, 1])[:, None]
    assert torch.equal(model(ids, mask), model(pack(sequences)))
    # What stands in the padding is of no account.
    assert torch.equal(model(torch.where(mask, ids, 11), mask.int()), model(ids, mask))


def test_without_a_mask_every_token_counts():
    ids = torch.stack(random_sequences([5, 5]))
    batch = pack_padded(ids)
    assert batch.layout.lengths == (5, 5)
    assert torch.equal(batch.token_ids, ids.flatten())


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        (torch.zeros(2, 3).long(), torch.ones(2, 4), r"\(2, 3\).*\(2, 4\)"),
        (torch.zeros(6).long(), None, r"\(B, T\)"),
        (torch.zeros(2, 3, 1).long(), None, r"\(B, T\)"),
        (torch.zeros(2, 3).long(), torch.tensor([[1, 1, 0], [0, 0, 0]]), "no real token"),
        (torch.zeros(1, 3).long(), torch.tensor([[0, 1, 1]]), "follow the tokens"),
        (torch.zeros(1, 3).long(), torch.tensor([[1, 0, 1]]), "follow the tokens"),
    ],
)
def test_a_padded_batch_that_cannot_be_packed_is_refused(ids, mask, message: str):
    with pytest.raises(ValueError, match=message):
        pack_padded(ids, mask)


def test_moving_a_batch_keeps_everything():
    batch = PackedBatch(
        token_ids=torch.tensor([1, 2, 3]),
        positions=torch.tensor([0, 1, 0], dtype=torch.int32),
        layout=SequenceLayout.from_lengths([2, 1]),
        example_ids=torch.tensor([8, 5]),
        token_types=torch.tensor([0, 1, 0]),
        targets=torch.tensor([1, 0]),
        num_filler=1,
        weight=2.5,
    )
    moved = batch.to("cpu")
    for name in ("token_ids", "positions", "example_ids", "token_types", "targets"):
        assert torch.equal(getattr(moved, name), getattr(batch, name))
    assert (moved.num_filler, moved.weight, moved.layout.lengths) == (1, 2.5, (2, 1))
    bare = pack(random_sequences([2])).to("cpu")
    assert bare.token_types is None and bare.targets is None


def with_source(lengths: list[int], source_lengths: list[int]) -> PackedBatch:
    return pack(random_sequences(lengths), sources=random_sequences(source_lengths, seed=1))


def test_moving_a_batch_moves_its_source():
    batch = with_source([2, 3], [4, 1])
    moved = batch.to("cpu").source
    assert moved is not None and batch.source is not None and moved is not batch.source
    assert torch.equal(moved.token_ids, batch.source.token_ids)
    assert moved.layout.lengths == (4, 1)


def test_positions_are_counted_in_all_streams():
    batch = with_source([3, 3], [5, 9])
    assert (batch.num_tokens, batch.num_positions) == (6, 6 + 14)
    # Two sources of unlike length share a group, as long as the longer of them.
    assert batch.num_attention_positions == 6 + 18
    alone = pack(random_sequences([5, 9]))
    assert (alone.num_positions, alone.num_attention_positions) == (14, 18)


def test_sequences_look_at_their_own_source():
    plan = with_source([3, 3], [5, 9]).source_plan
    (group,) = plan.groups
    assert (group.queries.length, group.keys.length) == (3, 9)
    assert plan.queries is None and group.keys.mask is not None
    assert group.keys.mask.flatten(1).sum(1).tolist() == [5, 9]


@pytest.mark.parametrize("architecture", ["encoder", "decoder", "encoder_decoder"])
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    multiple=st.integers(1, 8),
    seed=st.integers(0, 99),
)
def test_filler_changes_neither_outputs_nor_gradients(
    architecture: str, lengths: list[int], multiple: int, seed: int
):
    with default_dtype(torch.float64):
        model = small_model(architecture=architecture, norm="layernorm", bias=True)
        sources = [1 + (seed + n) % 7 for n in lengths]
        batch = (
            with_source(lengths, sources)
            if architecture == "encoder_decoder"
            else pack(random_sequences(lengths))
        )
        found = []
        for model.row_multiple in (1, multiple):
            outputs = model(batch)
            (outputs**2).sum().backward()
            found.append({"outputs": outputs.detach(), **gradients(model)})
    filled = batch.filled(multiple)
    assert filled.num_tokens % multiple == 0 and filled.num_tokens - batch.num_tokens <= multiple
    assert filled.unfilled_layout.lengths == batch.layout.lengths
    for name, alone in found[0].items():
        torch.testing.assert_close(found[1][name], alone, rtol=1e-10, atol=1e-12)


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5), more=st.integers(0, 60))
def test_a_batch_is_filled_up_to_a_number(lengths: list[int], more: int):
    batch = pack(random_sequences(lengths))
    filled = batch.filled(1, batch.num_tokens + more)
    assert (filled.num_tokens, filled.num_filler) == (batch.num_tokens + more, more)
    assert filled.positions.max() < max(16, *lengths, 10)
    assert filled.unfilled_layout.lengths == batch.layout.lengths
