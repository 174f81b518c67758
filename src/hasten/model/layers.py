"""Norms, positions, feed-forward, dropout: the parts of a block that look at one token at a time.

Shapes: N tokens in the batch, D hidden size, H heads, C head size, F feed-forward size, S
sequences.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hasten.core.batch import SequenceLayout
from hasten.core.errors import UsageError
from hasten.model.config import TransformerConfig


def build_norm(config: TransformerConfig, size: int | None = None) -> nn.Module:
    """Builds the configured norm over the last dimension of ``size``, by default D."""
    size = config.hidden_size if size is None else size
    if config.norm == "rmsnorm":
        return nn.RMSNorm(size, eps=config.norm_epsilon)
    return nn.LayerNorm(size, eps=config.norm_epsilon, bias=config.bias)


class FeedForward(nn.Module):
    """Two matrices with a nonlinearity between them; swiglu gates with a third."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.activation = config.activation
        self.up = nn.Linear(config.hidden_size, config.inner_size, bias=config.bias)
        self.gate = (
            nn.Linear(config.hidden_size, config.inner_size, bias=config.bias)
            if config.activation == "swiglu"
            else None
        )
        self.down = nn.Linear(config.inner_size, config.hidden_size, bias=config.bias)

    def forward(self, x_ND: Tensor) -> Tensor:
        """Maps (N, D) to (N, D)."""
        inner_NF = self.up(x_ND)
        if self.gate is not None:
            inner_NF = F.silu(self.gate(x_ND)) * inner_NF
        elif self.activation == "relu":
            inner_NF = F.relu(inner_NF)
        elif self.activation == "relu_squared":
            inner_NF = F.relu(inner_NF).square()
        else:
            inner_NF = F.gelu(inner_NF)
        return self.down(inner_NF)


class Embedding(nn.Module):
    """Token embeddings plus, where configured, position and segment embeddings."""

    sinusoids: Tensor

    def __init__(self, config: TransformerConfig, vocab_size: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(vocab_size or config.vocab_size, config.hidden_size)
        self.positions = (
            nn.Embedding(config.max_positions, config.hidden_size)
            if config.positions == "learned"
            else None
        )
        self.token_types = (
            nn.Embedding(config.num_token_types, config.hidden_size)
            if config.num_token_types
            else None
        )
        if config.positions == "sinusoidal":
            table = sinusoidal_table(config.max_positions, config.hidden_size)
            self.register_buffer("sinusoids", table, persistent=False)

    def forward(self, token_ids: Tensor, positions: Tensor, token_types: Tensor | None) -> Tensor:
        """Maps (N,) ids, positions and segments to (N, D)."""
        x_ND = self.tokens(token_ids)
        rate = self.config.token_dropout
        if self.training and rate:
            keep_N1 = torch.rand(len(x_ND), 1, device=x_ND.device) >= rate
            x_ND = x_ND * (keep_N1.to(x_ND.dtype) / (1 - rate))
        if self.positions is not None:
            x_ND = x_ND + self.positions(positions)
        elif self.config.positions == "sinusoidal":
            # Scaling by sqrt(D) keeps the tokens from drowning in the table (Vaswani et al. 3.4).
            x_ND = x_ND * math.sqrt(self.config.hidden_size) + self.sinusoids[positions]
        if self.token_types is not None:
            types = torch.zeros_like(token_ids) if token_types is None else token_types
            x_ND = x_ND + self.token_types(types)
        return x_ND


def sinusoidal_table(num_positions: int, size: int) -> Tensor:
    """Returns the (num_positions, size) table of Vaswani et al. 2017, section 3.5.

    Even columns hold ``sin(p / 10000^(2i / size))``, odd ones the cosine of the same angle.
    """
    frequencies = torch.exp(torch.arange(0, size, 2) * (-math.log(10000.0) / size))
    angles = torch.arange(num_positions)[:, None] * frequencies
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :size].contiguous()


class RotaryTable(nn.Module):
    """Cosines and sines of rotary positions (Su et al. 2021), in the two-halves layout."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        half = config.head_size // 2
        frequencies = config.rotary_base ** (-torch.arange(half, dtype=torch.float64) / half)
        angles = torch.arange(config.max_positions, dtype=torch.float64)[:, None] * frequencies
        dtype = torch.get_default_dtype()
        self.register_buffer("cos", angles.cos().to(dtype), persistent=False)
        self.register_buffer("sin", angles.sin().to(dtype), persistent=False)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Maps (N,) positions to cosines and sines of shape (N, 1, C / 2)."""
        return self.cos[positions][:, None], self.sin[positions][:, None]


def apply_rotary(x_NHC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates each pair (first half, second half) of the head by its position's angles."""
    first, second = x_NHC.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Dropout(nn.Module):
    """Zeroes elements at ``rate`` in training and scales the others by 1 / (1 - rate)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Maps a tensor of any shape to one of the same shape."""
        return drop_elements(x, self.rate) if self.training else x

    def extra_repr(self) -> str:
        """Shows the rate."""
        return f"rate={self.rate}"


def drop_elements(x: Tensor, rate: float) -> Tensor:
    """Zeroes elements of a tensor at ``rate`` and scales the others by 1 / (1 - rate).

    PyTorch's own draws one number an element on one CPU thread, up to a sixth of a training step;
    here each draw of 64 bits serves four elements, so the rate is exact to 1 / 65,536.
    """
    dropped = min(round(rate * 65536), 65535)
    if dropped == 0:
        return x
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, rate, training=True)
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    uniform = draws.view(torch.int16)[: x.numel()].view(x.shape)
    keep = (uniform >= dropped - 32768).to(x.dtype)
    return x * keep.mul_(65536 / (65536 - dropped))


class StochasticDepth(nn.Module):
    """Drops a residual branch for whole sequences in training (Huang et al. 2016)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x_ND: Tensor, layout: SequenceLayout) -> Tensor:
        """Maps (N, D) to (N, D), a sequence being kept whole, scaled by 1 / (1 - rate)."""
        if not self.training or self.rate == 0.0:
            return x_ND
        keep_S = torch.rand(len(layout.lengths), device=x_ND.device) >= self.rate
        scale_S = keep_S.to(x_ND.dtype) / (1 - self.rate)
        return x_ND * scale_S[layout.sequence_ids][:, None]


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
