"""Norms, feed-forward, embedding, dropout: the parts that look at one token at a time.

    Embedding    token ids (N,) -> (N, E)
    FeedForward  (N, D) -> (N, F) -> (N, D)

Shapes: N tokens in the batch, D hidden size, E width of the embeddings, F feed-forward size, S
sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hasten.core.batch import SequenceLayout
from hasten.model.config import TransformerConfig


def build_norm(config: TransformerConfig, size: int | None = None) -> nn.Module:
    """Builds the configured norm over the last dimension of ``size``, by default D."""
    size = config.hidden_size if size is None else size
    if config.norm == "rmsnorm":
        return RMSNorm(size, eps=config.norm_epsilon)
    return nn.LayerNorm(size, eps=config.norm_epsilon, bias=config.bias)


class RMSNorm(nn.RMSNorm):
    """torch's own, in the type of its gains: autocast on CPUs would leave it 16 bits."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps a tensor of any shape to one of the same shape."""
        return super().forward(x.to(self.weight.dtype))


_gelu_tanh = partial(F.gelu, approximate="tanh")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": F.relu,
    "relu_squared": lambda x: F.relu(x).square(),
    "silu": F.silu,
    "tanh": torch.tanh,
    "swiglu": F.silu,
    "geglu": F.gelu,
    "geglu_tanh": _gelu_tanh,
}
"""By the names that configurations give them; of gated feed-forwards what the gate goes through."""


class FeedForward(nn.Module):
    """Two matrices with a nonlinearity between them, or through which a third one gates."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.up = nn.Linear(config.hidden_size, config.inner_size, bias=config.bias)
        self.gate = (
            nn.Linear(config.hidden_size, config.inner_size, bias=config.bias)
            if config.is_gated
            else None
        )
        self.down = nn.Linear(config.inner_size, config.hidden_size, bias=config.bias)

    def forward(self, x_ND: Tensor) -> Tensor:
        """Maps (N, D) to (N, D)."""
        inner_NF = self.up(x_ND)
        if self.gate is not None:
            inner_NF = self.activation(self.gate(x_ND)) * inner_NF
        else:
            inner_NF = self.activation(inner_NF)
        return self.down(inner_NF)


class Embedding(nn.Module):
    """Token embeddings plus, where configured, segment embeddings."""

    def __init__(self, config: TransformerConfig, vocab_size: int | None = None) -> None:
        super().__init__()
        self.token_dropout, self.factor = config.token_dropout, config.embedding_factor
        self.tokens = nn.Embedding(vocab_size or config.vocab_size, config.embedding_width)
        self.token_types = (
            nn.Embedding(config.num_token_types, config.embedding_width)
            if config.num_token_types
            else None
        )

    def forward(self, token_ids: Tensor, token_types: Tensor | None = None) -> Tensor:
        """Maps (N,) ids and segments to (N, E)."""
        x_NE = self.tokens(token_ids)
        rate = self.token_dropout
        if self.training and rate:
            keep_N1 = torch.rand(len(x_NE), 1, device=x_NE.device) >= rate
            x_NE = x_NE * (keep_N1.to(x_NE.dtype) / (1 - rate))
        if self.factor != 1:
            x_NE = x_NE * self.factor
        if self.token_types is not None:
            types = torch.zeros_like(token_ids) if token_types is None else token_types
            x_NE = x_NE + self.token_types(types)
        return x_NE


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
    """Zeroes elements of a tensor at ``rate`` and scales the others by 1 / (1 - rate)."""
    if _dropped(rate) == 0:
        return x
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, rate, training=True)
    return x * kept_elements(x, rate)


def kept_elements(x: Tensor, rate: float) -> Tensor:
    """Returns what ``drop_elements`` multiplies elements by on a CPU: 0 or 1 / (1 - rate).

    PyTorch's own draws one number an element on one CPU thread, up to a sixth of a training step;
    here each draw of 64 bits serves four elements, so the rate is exact to 1 / 65,536.
    """
    dropped = _dropped(rate)
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    uniform = draws.view(torch.int16)[: x.numel()].view(x.shape)
    keep = (uniform >= dropped - 32768).to(x.dtype)
    return keep.mul_(65536 / (65536 - dropped))


def _dropped(rate: float) -> int:
    """Returns how many of 65,536 draws drop an element."""
    return min(round(rate * 65536), 65535)


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
