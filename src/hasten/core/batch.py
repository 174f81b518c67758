"""One batch layout for every task, architecture and device: sequences laid end to end.

    sequences      a a a a | b b | c c c
    token_ids      (N,)      all tokens, no padding between sequences      N = 9
    positions      (N,)      0 1 2 3 0 1 0 1 2
    offsets        (S + 1,)  0 4 6 9                                       S = 3
    lengths        host      (4, 2, 3)

Linear layers, norms and embeddings work on the (N, ...) stream and never see padding. Only
attention needs to know where a sequence ends: it works on ``SequenceLayout.groups``, runs of
sequences of like length, formed on the host without waiting for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

# Merging two lengths into one padded group saves the fixed cost of a kernel call and pays for
# the padded positions. The fixed cost, expressed in query-key pairs, was measured on CPU.
_GROUP_OVERHEAD_PAIRS = 16384
# Of a sequence of filler: short, since attention pays for pairs and models have few positions.
_FILLER_LENGTH = 16


@dataclass(frozen=True)
class GroupSide:
    """One stream's part of an attention group: B sequences as one rectangle.

    Attributes:
        length: length L of the longest of the sequences.
        mask: (B, 1, 1, L) bool, True at real positions; None where nothing is padded.
    """

    length: int
    mask: Tensor | None


@dataclass(frozen=True)
class SequenceGroup:
    """Sequences that attention treats as one rectangular block.

    Attributes:
        count: number of sequences B in the group.
        queries: the sequences that ask.
        keys: the sequences that are looked at, one for each of ``queries``; the same object
            where a stream attends to itself.
    """

    count: int
    queries: GroupSide
    keys: GroupSide


@dataclass(frozen=True)
class Places:
    """Where the tokens of a stream stand in the rectangles of all groups, laid end to end.

    Attributes:
        rows: (P,) stream row of each position, padding pointing to row 0.
        restore: (N,) position of each token.
    """

    rows: Tensor
    restore: Tensor


@dataclass(frozen=True)
class GroupPlan:
    """The groups of a layout and how streams get into and out of them.

    Attributes:
        groups: the groups; their rectangles are laid end to end in this order.
        queries: of the stream that asks; None where its order is that of the groups, unpadded.
        keys: likewise of the stream that is looked at.
    """

    groups: tuple[SequenceGroup, ...]
    queries: Places | None
    keys: Places | None

    @property
    def num_positions(self) -> int:
        """Query positions of all groups, padding included."""
        return sum(group.count * group.queries.length for group in self.groups)


@dataclass(frozen=True, eq=False)
class SequenceLayout:
    """Where the sequences of a stream begin and end.

    Attributes:
        offsets: (S + 1,) int32, start of each sequence; ``offsets[-1] == N``.
        lengths: the S lengths on the host.
    """

    offsets: Tensor
    lengths: tuple[int, ...]

    @classmethod
    def from_lengths(
        cls, lengths: Sequence[int], device: torch.device | str = "cpu"
    ) -> SequenceLayout:
        """Builds the layout of sequences of the given lengths."""
        offsets = np.zeros(len(lengths) + 1, dtype=np.int32)
        np.cumsum(lengths, out=offsets[1:])
        return cls(torch.from_numpy(offsets).to(device), tuple(int(n) for n in lengths))

    @property
    def num_tokens(self) -> int:
        """Number of tokens N in the stream."""
        return sum(self.lengths)

    @cached_property
    def sequence_ids(self) -> Tensor:
        """(N,) int64: which sequence each token belongs to."""
        device = self.offsets.device
        lengths = torch.tensor(self.lengths, dtype=torch.int64, device=device)
        return torch.repeat_interleave(
            torch.arange(len(self.lengths), device=device), lengths, output_size=self.num_tokens
        )

    @cached_property
    def group_plan(self) -> GroupPlan:
        """The groups of attention within the stream, computed once and shared by all layers."""
        return plan_groups(self, self)


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """S sequences of N tokens in all, laid end to end.

    Attributes:
        token_ids: (N,) int64.
        positions: (N,) int32, restarting at 0 in each sequence.
        layout: offsets (S + 1,) and host lengths of the sequences.
        example_ids: (S,) int64, which example each sequence is (or is a window of).
        token_types: (N,) int64 segments, or None where the model has none.
        source: the stream an encoder-decoder reads, sequence for sequence; None without one.
        targets: what the task needs: (S,) labels, (N,) next tokens, (S, 2) spans; None when
            only predictions are wanted.
        num_filler: trailing tokens that only fill the stream up: sequences of their own, which
            stand in ``layout`` but have no example and no target.
        weight: number of units the summed loss is divided by, counted over all ranks and
            micro-batches of the optimizer step.
    """

    token_ids: Tensor
    positions: Tensor
    layout: SequenceLayout
    example_ids: Tensor
    token_types: Tensor | None = None
    source: PackedBatch | None = None
    targets: Tensor | None = None
    num_filler: int = 0
    weight: float = 1.0

    @property
    def num_tokens(self) -> int:
        """Number of tokens N, filler included."""
        return self.layout.num_tokens

    @property
    def num_positions(self) -> int:
        """Positions that pass through linear layers, of all streams."""
        return len(self.token_ids) + (0 if self.source is None else self.source.num_positions)

    @property
    def num_attention_positions(self) -> int:
        """Query positions within attention groups, of all streams, padding included."""
        others = 0 if self.source is None else self.source.num_attention_positions
        return self.layout.group_plan.num_positions + others

    @cached_property
    def source_plan(self) -> GroupPlan:
        """The groups in which this stream's sequences look at their source."""
        assert self.source is not None
        return plan_groups(self.layout, self.source.layout)

    @property
    def num_sequences(self) -> int:
        """Number of sequences S."""
        return len(self.layout.lengths)

    @property
    def unfilled_layout(self) -> SequenceLayout:
        """Where the sequences begin and end that are not filler."""
        if not self.num_filler:
            return self.layout
        num_real = len(self.layout.lengths) - len(_filler_lengths(self.num_filler))
        return SequenceLayout(self.layout.offsets[: num_real + 1], self.layout.lengths[:num_real])

    def filled(self, multiple: int, num_tokens: int = 0) -> PackedBatch:
        """Returns the batch with filler behind each stream.

        Args:
            multiple: of which the number of tokens becomes one.
            num_tokens: that a stream has afterwards, at the least.
        """
        streams = [self] if self.source is None else [self, self.source]
        wanted = [-(-max(s.num_tokens, num_tokens) // multiple) * multiple for s in streams]
        missing = [n - s.num_tokens for n, s in zip(wanted, streams, strict=True)]
        if not any(missing):
            return self
        if self.source is None:
            return _with_filler(self, _filler_lengths(missing[0]))
        # Streams are read sequence for sequence, so that both get equally many.
        assert num_tokens == 0, "two streams are filled up to a multiple only"
        assert multiple <= _FILLER_LENGTH
        own, of_source = ([n or multiple] for n in missing)
        return replace(_with_filler(self, own), source=_with_filler(self.source, of_source))

    def to(self, device: torch.device | str) -> PackedBatch:
        """Returns the batch on ``device``; host lengths stay on the host."""

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        return replace(
            self,
            token_ids=self.token_ids.to(device, non_blocking=True),
            positions=self.positions.to(device, non_blocking=True),
            layout=SequenceLayout(self.layout.offsets.to(device), self.layout.lengths),
            example_ids=self.example_ids.to(device, non_blocking=True),
            token_types=move(self.token_types),
            source=None if self.source is None else self.source.to(device),
            targets=move(self.targets),
        )


def _filler_lengths(num_tokens: int) -> list[int]:
    whole, rest = divmod(num_tokens, _FILLER_LENGTH)
    return [_FILLER_LENGTH] * whole + [rest] * bool(rest)


def _with_filler(batch: PackedBatch, lengths: list[int]) -> PackedBatch:
    """Returns the stream with sequences of token 0 at its end."""
    assert not batch.num_filler
    num_filler, device = sum(lengths), batch.token_ids.device

    def longer(tensor: Tensor) -> Tensor:
        return torch.cat([tensor, tensor.new_zeros(num_filler)])

    positions = torch.from_numpy(positions_from_lengths(lengths)).to(device)
    return replace(
        batch,
        token_ids=longer(batch.token_ids),
        positions=torch.cat([batch.positions, positions]),
        layout=SequenceLayout.from_lengths([*batch.layout.lengths, *lengths], device),
        token_types=None if batch.token_types is None else longer(batch.token_types),
        num_filler=num_filler,
    )


def positions_from_lengths(lengths: Sequence[int]) -> np.ndarray:
    """Returns (N,) int32 positions that restart at 0 in each sequence."""
    lengths_S = np.asarray(lengths, dtype=np.int32)
    starts_S = np.cumsum(lengths_S, dtype=np.int32) - lengths_S
    return np.arange(int(lengths_S.sum()), dtype=np.int32) - np.repeat(starts_S, lengths_S)


def pack_padded(input_ids: Tensor, mask: Tensor | None = None) -> PackedBatch:
    """Packs a padded batch at the door.

    Args:
        input_ids: (B, T) token ids, padded on the right.
        mask: (B, T), nonzero at real tokens; None where nothing is padded.

    Raises:
        ValueError: shapes differ, a row has no real token, or padding precedes a token.
    """
    if input_ids.ndim != 2 or (mask is not None and mask.shape != input_ids.shape):
        shape = None if mask is None else tuple(mask.shape)
        raise ValueError(
            f"expected ids and mask of one shape (B, T), got {tuple(input_ids.shape)} and {shape}"
        )
    device = input_ids.device
    real = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.bool()
    lengths = real.sum(1).tolist()
    if min(lengths, default=1) == 0:
        raise ValueError("a row of the mask has no real token")
    if bool((real[:, 1:] & ~real[:, :-1]).any()):
        raise ValueError("padding must follow the tokens, not precede them")
    return PackedBatch(
        token_ids=input_ids[real].long(),
        positions=torch.from_numpy(positions_from_lengths(lengths)).to(device),
        layout=SequenceLayout.from_lengths(lengths, device),
        example_ids=torch.arange(len(lengths), device=device),
    )


def plan_groups(queries: SequenceLayout, keys: SequenceLayout) -> GroupPlan:
    """Forms groups of like lengths; see ``_GROUP_OVERHEAD_PAIRS`` for the trade.

    Args:
        queries: the stream that asks.
        keys: the stream that is looked at, sequence for sequence; may be the same.
    """
    assert len(queries.lengths) == len(keys.lengths)
    asking = np.asarray(queries.lengths, dtype=np.int64)
    looked_at = np.asarray(keys.lengths, dtype=np.int64)
    members = _like_lengths(asking, looked_at)
    own, places = _sides(asking, members, queries.offsets.device)
    others, other_places = own, places
    if keys is not queries:
        others, other_places = _sides(looked_at, members, keys.offsets.device)
    groups = tuple(map(SequenceGroup, map(len, members), own, others))
    return GroupPlan(groups, places, other_places)


def _sides(
    sizes: np.ndarray, groups: list[np.ndarray], device: torch.device
) -> tuple[list[GroupSide], Places | None]:
    """Returns a stream's part of each group, and where its tokens stand in them."""
    starts = np.cumsum(sizes) - sizes
    sides: list[GroupSide] = []
    rows: list[np.ndarray] = []
    for members in groups:
        length = int(sizes[members].max())
        positions = np.arange(length)
        real = positions[None, :] < sizes[members][:, None]
        mask = None if real.all() else _tensor(real[:, None, None, :], device)
        sides.append(GroupSide(length, mask))
        rows.append(np.where(real, starts[members][:, None] + positions[None, :], -1).reshape(-1))
    rows_P = np.concatenate(rows)
    taken = np.flatnonzero(rows_P >= 0)
    if len(taken) == len(rows_P) and bool((rows_P == np.arange(len(rows_P))).all()):
        return sides, None
    restore_N = np.empty(len(taken), dtype=np.int64)
    restore_N[rows_P[taken]] = taken
    return sides, Places(_tensor(rows_P.clip(0), device), _tensor(restore_N, device))


def _like_lengths(asking: np.ndarray, looked_at: np.ndarray) -> list[np.ndarray]:
    """Cuts the sequences, by length, where another group costs less than more padding."""
    order = np.lexsort((looked_at, asking))  # stable: equal lengths keep the stream's order
    pairs = np.stack([asking[order], looked_at[order]])
    first = np.flatnonzero(np.r_[True, (np.diff(pairs) != 0).any(0)]).tolist()
    bounds = [*first, len(order)]
    cuts = [0]
    exact = widest = 0  # query-key pairs of the open group without padding; its longest keys
    for i, (rows, columns) in enumerate(pairs[:, first].T.tolist()):
        added = (bounds[i + 1] - bounds[i]) * rows * columns
        padded = (bounds[i + 1] - cuts[-1]) * rows * max(widest, columns)
        if bounds[i] > cuts[-1] and padded - exact - added > _GROUP_OVERHEAD_PAIRS:
            cuts.append(bounds[i])
            exact = widest = 0
        exact, widest = exact + added, max(widest, columns)
    return [order[a:b] for a, b in zip(cuts, [*cuts[1:], len(order)], strict=True)]


def _tensor(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)
