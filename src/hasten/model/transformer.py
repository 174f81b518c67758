"""One configurable Block, the encoder made of it, and the public ``Transformer``.

PackedBatch -> Embedding -> Block x L -> (final norm) -> head -> outputs
                  (N, D)     (N, D)         (N, D)        (S, K)
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from hasten.core.batch import PackedBatch, SequenceLayout, pack_padded
from hasten.core.errors import UsageError, nearest
from hasten.model.attention import Attention
from hasten.model.config import TransformerConfig
from hasten.model.heads import ClassificationHead
from hasten.model.layers import (
    Dropout,
    Embedding,
    FeedForward,
    RotaryTable,
    StochasticDepth,
    build_norm,
    check_positions,
)


class Block(nn.Module):
    """Attention and feed-forward, each a residual branch with its norm before or after."""

    def __init__(self, config: TransformerConfig, stochastic_depth: float = 0.0) -> None:
        super().__init__()
        self.norm_first = config.norm_placement == "pre"
        self.attention = Attention(config)
        self.attention_norm = build_norm(config)
        self.feed_forward = FeedForward(config)
        self.feed_forward_norm = build_norm(config)
        self.dropout = Dropout(config.dropout)
        self.stochastic_depth = StochasticDepth(stochastic_depth)

    def forward(
        self, x_ND: Tensor, layout: SequenceLayout, rotary: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """Maps the residual stream (N, D) to (N, D)."""
        if self.norm_first:
            branch_ND = self.attention(self.attention_norm(x_ND), layout, rotary)
            x_ND = x_ND + self._thin(branch_ND, layout)
            branch_ND = self.feed_forward(self.feed_forward_norm(x_ND))
            return x_ND + self._thin(branch_ND, layout)
        branch_ND = self.attention(x_ND, layout, rotary)
        x_ND = self.attention_norm(x_ND + self._thin(branch_ND, layout))
        branch_ND = self.feed_forward(x_ND)
        return self.feed_forward_norm(x_ND + self._thin(branch_ND, layout))

    def _thin(self, branch_ND: Tensor, layout: SequenceLayout) -> Tensor:
        return self.stochastic_depth(self.dropout(branch_ND), layout)


class Encoder(nn.Module):
    """Embeddings and a stack of blocks in which every token sees its whole sequence."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config)
        # Post-norm leaves the embeddings' sum unnormalised otherwise.
        self.embedding_norm = build_norm(config) if config.norm_placement == "post" else None
        self.dropout = Dropout(config.dropout)
        self.rotary = RotaryTable(config) if config.positions == "rotary" else None
        steps = max(config.num_layers - 1, 1)
        self.blocks = nn.ModuleList(
            Block(config, config.stochastic_depth * i / steps) for i in range(config.num_layers)
        )
        self.final_norm = build_norm(config) if config.norm_placement == "pre" else None

    def forward(self, batch: PackedBatch) -> Tensor:
        """Maps a batch of N tokens to hidden states (N, D).

        Raises:
            UsageError: a sequence is longer than ``max_positions``.
        """
        check_positions(batch.layout, self.config.max_positions)
        x_ND = self.embedding(batch.token_ids, batch.positions, batch.token_types)
        if self.embedding_norm is not None:
            x_ND = self.embedding_norm(x_ND)
        x_ND = self.dropout(x_ND)
        rotary = None if self.rotary is None else self.rotary(batch.positions)
        for block in self.blocks:
            x_ND = block(x_ND, batch.layout, rotary)
        return x_ND if self.final_norm is None else self.final_norm(x_ND)


class Transformer(nn.Module):
    """A Transformer encoder with a classification head.

    Args:
        vocab_size: number of token embeddings.
        num_layers: number of blocks.
        hidden_size: width D of the residual stream.
        num_heads: attention heads; must divide ``hidden_size``.
        dropout: rate on embeddings and residual branches.
        **options: any other field of ``TransformerConfig``.

    Raises:
        UsageError: an unknown option, or values that do not fit each other.
    """

    def __init__(
        self,
        vocab_size: int,
        num_layers: int = 6,
        hidden_size: int = 512,
        num_heads: int = 8,
        dropout: float = 0.1,
        **options: Any,
    ) -> None:
        super().__init__()
        fields = {field.name for field in dataclasses.fields(TransformerConfig)}
        for name in options:
            if name not in fields:
                raise UsageError(f"Transformer has no option '{name}'.{nearest(name, fields)}")
        self.config = TransformerConfig(
            vocab_size=vocab_size,
            num_layers=num_layers,
            hidden_size=hidden_size,
            num_heads=num_heads,
            dropout=dropout,
            **options,
        )
        self.encoder = Encoder(self.config)
        self.head = ClassificationHead(self.config)
        self.reset_parameters()

    @classmethod
    def from_config(cls, config: TransformerConfig) -> Transformer:
        """Builds the model that ``config`` describes."""
        return cls(**{f.name: getattr(config, f.name) for f in dataclasses.fields(config)})

    def forward(self, inputs: Tensor | PackedBatch, mask: Tensor | None = None) -> Tensor:
        """Scores each sequence.

        Args:
            inputs: a ``PackedBatch``, or padded token ids (B, T), which are packed here and
                take the same path.
            mask: (B, T), nonzero at real tokens; only with padded ids.

        Returns:
            (S, num_labels) scores before the softmax.
        """
        batch = inputs if isinstance(inputs, PackedBatch) else pack_padded(inputs, mask)
        return self.head(self.encoder(batch), batch.layout)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws all weights anew: normal matrices, zero biases, unit norms."""
        std = self.config.initializer_std
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=std)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
                module.reset_parameters()
        for block in self.encoder.blocks:
            assert isinstance(block, Block)
            for matrix in (block.attention.output, block.feed_forward.down):
                if self.config.zero_init_residual:
                    nn.init.zeros_(matrix.weight)
                else:
                    # Keeps the residual stream's variance independent of depth (GPT-2).
                    nn.init.normal_(matrix.weight, std=std / (2 * self.config.num_layers) ** 0.5)
