"""Where a token stands: tables, rotations of queries and keys, biases of attention by distance.

    learned, sinusoidal    positions (N,) -> rows (N, E) that are added to embeddings
    rotary                 positions (N,) -> cosines, sines (N, 1, C / 2) -> apply_rotary
    relative               distances of keys from queries -> (H, L, T) added to attention scores

Shapes: N tokens in the batch, E width of the embeddings, H heads, C head size, L and T asking and
looked-at positions of a sequence.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hasten.core.batch import SequenceLayout
from hasten.core.errors import UsageError
from hasten.model.config import RotaryScaling, Sinusoids, TransformerConfig

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines of tokens."""


class Rotations(NamedTuple):
    """Cosines and sines per token; None without rotary positions.

    Attributes:
        everywhere: for blocks that see whole sequences.
        nearby: for blocks with a window.
    """

    everywhere: Rotary | None = None
    nearby: Rotary | None = None


UNTURNED = Rotations()


def build_positions(config: TransformerConfig) -> LearnedPositions | SinusoidalPositions | None:
    """Builds the table whose rows are added to embeddings; None where there is none."""
    if config.positions == "learned":
        return LearnedPositions(config)
    return SinusoidalPositions(config) if config.positions == "sinusoidal" else None


class LearnedPositions(nn.Embedding):
    """One learned row a position; those before the offset belong to none."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config.max_positions + config.position_offset, config.embedding_width)
        self.offset = config.position_offset

    def forward(self, positions: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Maps (N,) positions to (N, E)."""
        return super().forward(positions + self.offset if self.offset else positions)


class SinusoidalPositions(nn.Module):
    """A table of sines and cosines, which is no weight."""

    table: Tensor

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        num_rows = config.max_positions + config.position_offset
        table = sinusoidal_table(num_rows, config.embedding_width, config.sinusoids)
        self.register_buffer("table", table[config.position_offset :], persistent=False)

    def forward(self, positions: Tensor) -> Tensor:
        """Maps (N,) positions to (N, E)."""
        return self.table[positions]


def sinusoidal_table(num_positions: int, size: int, sinusoids: Sinusoids = "interleaved") -> Tensor:
    """Returns the (num_positions, size) table of Vaswani et al. 2017, section 3.5.

    Args:
        num_positions: rows.
        size: columns.
        sinusoids: interleaved: even columns hold ``sin(p / 10000^(2i / size))``, odd ones the
            cosine of the same angle. halves: all sines, then all cosines, of the same angles.
            tensor2tensor: the same with ``sin(p / 10000^(i / (size / 2 - 1)))``, after the library
            that came with the paper.
    """
    count = -(-size // 2)
    step = 1 / (count - 1) if sinusoids == "tensor2tensor" else 2 / size
    frequencies = torch.exp(torch.arange(count) * (-math.log(10000.0) * step))
    angles = torch.arange(num_positions)[:, None] * frequencies
    sines, cosines = angles.sin(), angles.cos()
    if sinusoids == "interleaved":
        return torch.stack([sines, cosines], dim=-1).flatten(1)[:, :size].contiguous()
    return torch.cat([sines, cosines[:, : size - count]], dim=1)


class RotaryTable(nn.Module):
    """Cosines and sines of rotary positions (Su et al. 2021), in the two-halves layout.

    Args:
        config: of the model.
        base: of the frequencies; None for the configured one, with its scaling.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: TransformerConfig, base: float | None = None) -> None:
        super().__init__()
        half = config.head_size // 2
        frequencies = (config.rotary_base if base is None else base) ** (
            -torch.arange(half, dtype=torch.float64) / half
        )
        factor = 1.0
        if base is None and config.rotary_scaling is not None:
            scaling = config.rotary_scaling
            frequencies = scaled_frequencies(frequencies, scaling, config.rotary_base)
            factor = rotary_factor(scaling)
        angles = torch.arange(config.max_positions, dtype=torch.float64)[:, None] * frequencies
        dtype = torch.get_default_dtype()
        self.register_buffer("cos", (angles.cos() * factor).to(dtype), persistent=False)
        self.register_buffer("sin", (angles.sin() * factor).to(dtype), persistent=False)

    def forward(self, positions: Tensor) -> Rotary:
        """Maps (N,) positions to cosines and sines of shape (N, 1, C / 2)."""
        return self.cos[positions][:, None], self.sin[positions][:, None]


def apply_rotary(x_NHC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates each pair (first half, second half) of the head by its position's angles."""
    first, second = x_NHC.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def scaled_frequencies(frequencies: Tensor, scaling: RotaryScaling, base: float) -> Tensor:
    """Stretches rotary frequencies (C / 2,), float64, for longer sequences.

    With w a frequency, f the factor, L the longest sequence of pretraining and s the share of w
    that stays, all kinds are ``s w + (1 - s) w / f``:

        linear    s = 0 (Chen et al. 2023, "Extending Context Window")
        llama3    s rises linearly with the turns ``w L / 2 pi`` between its two bounds (Llama 3.1)
        yarn      s falls linearly with the number of the frequency, between those that make
                  ``beta_fast`` and ``beta_slow`` turns (Peng et al. 2023, "YaRN", section 3.2,
                  rounded outwards as its authors' code does)

    Args:
        frequencies: in radians a position.
        scaling: how.
        base: that the frequencies are powers of.
    """
    stretched = frequencies / scaling.factor
    if scaling.kind == "linear":
        return stretched
    longest = scaling.original_positions
    if scaling.kind == "llama3":
        low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
        turns = frequencies * longest / (2 * math.pi)
        stays = ((turns - low) / (high - low)).clamp(0, 1)
    else:
        count = len(frequencies)

        def number_of(turns: float) -> float:
            return count * math.log(longest / (2 * math.pi * turns)) / math.log(base)

        first = max(math.floor(number_of(scaling.beta_fast)), 0)
        last = min(math.ceil(number_of(scaling.beta_slow)), 2 * count - 1)
        width = last - first or 0.001  # a step
        numbers = torch.arange(count, dtype=frequencies.dtype)
        stays = 1 - ((numbers - first) / width).clamp(0, 1)
    return stays * frequencies + (1 - stays) * stretched


def rotary_factor(scaling: RotaryScaling) -> float:
    """Returns the factor on cosines and sines (Peng et al. 2023, equation 22)."""
    if scaling.kind != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    return 0.1 * math.log(scaling.factor) + 1.0


class RelativeBias(nn.Embedding):
    """Biases of attention, one for each head and bucket of distances (Raffel et al. 2020).

    Args:
        config: of the model.
        causal: whether only what comes before is looked at.
    """

    def __init__(self, config: TransformerConfig, *, causal: bool) -> None:
        super().__init__(config.relative_buckets, config.num_heads)
        self.causal, self.max_distance = causal, config.relative_max_distance

    def forward(self, distances: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Maps positions of keys minus those of queries, of any shape, to (..., H)."""
        return super().forward(
            distance_buckets(distances, self.num_embeddings, self.max_distance, self.causal)
        )

    def between(self, length: int) -> Tensor:
        """Returns (H, length, length): of each query's row the bias of each key."""
        distances = torch.arange(1 - length, length, device=self.weight.device)
        # A row's keys lie one further back than those of the row before.
        return self(distances).T.unfold(1, length, 1).flip(1)


def distance_buckets(
    distances: Tensor, num_buckets: int, max_distance: int, causal: bool
) -> Tensor:
    """Returns the number of each distance's bucket, int64.

    Half of a direction's buckets hold one distance each; the others grow exponentially, and the
    last one holds all from ``max_distance`` on (Raffel et al. 2020, "T5", section 2.1). Where both
    directions are looked at, keys after the query have the second half of the buckets.

    Args:
        distances: int64, positions of keys minus those of queries.
        num_buckets: in all.
        max_distance: from which on all share a bucket.
        causal: whether only what comes before is looked at.
    """
    first = torch.zeros_like(distances)
    if causal:
        far = (-distances).clamp(min=0)
    else:
        num_buckets //= 2
        first = (distances > 0).long() * num_buckets
        far = distances.abs()
    exact = num_buckets // 2
    # In this order of operations, distances at a bucket's bound fall as they do where models of
    # this kind were trained.
    grown = torch.log(far.float() / exact) / math.log(max_distance / exact) * (num_buckets - exact)
    wide = (exact + grown.clamp(min=0).long()).clamp(max=num_buckets - 1)
    return first + torch.where(far < exact, far, wide)


def check_positions(layout: SequenceLayout, max_positions: int) -> None:
    """Refuses a sequence longer than the model's positions.

    Raises:
        UsageError: naming both lengths.
    """
    longest = max(layout.lengths, default=0)
    if longest > max_positions:
        raise UsageError(
            f"a sequence of {longest} tokens is longer than the model's {max_positions} positions."
        )
