"""One configurable Block, stacks of it, and the public ``Transformer``.

    encoder            PackedBatch -> Embedding -> encoder -> head -> outputs
    decoder            PackedBatch -> Embedding -> decoder -> head -> outputs
    encoder_decoder    PackedBatch.source -> Embedding -> encoder --memory--.
                       PackedBatch        -> Embedding -> decoder <---------' -> head -> outputs

Shapes: N tokens, M tokens of the source, D hidden size, S sequences.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hasten.core.batch import GroupPlan, PackedBatch, SequenceLayout, pack_padded
from hasten.core.errors import UsageError, nearest
from hasten.model.attention import Attention, Rotary
from hasten.model.config import TransformerConfig
from hasten.model.heads import ClassificationHead, SpanHead, TokenHead, TokenOutputs
from hasten.model.layers import (
    Dropout,
    Embedding,
    FeedForward,
    RotaryTable,
    StochasticDepth,
    build_norm,
    check_positions,
)


@dataclasses.dataclass(frozen=True)
class Surroundings:
    """What a block needs to know about its stream besides the stream itself.

    Attributes:
        layout: where the sequences begin and end.
        plan: groups in which they are looked at; formed outside of what is compiled.
        rotary: cosines and sines per token; None without rotary positions.
        memory_MD: encoded source; None without one.
        memory_plan: groups in which sequences look at their source.
    """

    layout: SequenceLayout
    plan: GroupPlan
    rotary: Rotary | None
    memory_MD: Tensor | None = None
    memory_plan: GroupPlan | None = None


class Block(nn.Module):
    """Attention and feed-forward, each a residual branch with its norm before or after."""

    def __init__(
        self,
        config: TransformerConfig,
        *,
        causal: bool = False,
        reads_source: bool = False,
        stochastic_depth: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm_first = config.norm_placement == "pre"
        self.attention = Attention(config, causal=causal)
        self.attention_norm = build_norm(config)
        self.source_attention = Attention(config) if reads_source else None
        self.source_norm = build_norm(config) if reads_source else None
        self.feed_forward = FeedForward(config)
        self.feed_forward_norm = build_norm(config)
        self.dropout = Dropout(config.dropout)
        self.stochastic_depth = StochasticDepth(stochastic_depth)

    def forward(self, x_ND: Tensor, around: Surroundings) -> Tensor:
        """Maps the residual stream (N, D) to (N, D)."""
        layout = around.layout
        return self.run(
            x_ND,
            layout,
            lambda attention, h: attention(h, around.plan, around.rotary),
            lambda attention, h: attention(h, around.memory_plan, None, around.memory_MD),
        )

    def run(
        self,
        x_ND: Tensor,
        layout: SequenceLayout,
        attend: Callable[[Attention, Tensor], Tensor],
        attend_to_source: Callable[[Attention, Tensor], Tensor],
    ) -> Tensor:
        """The block with attention as the caller does it: packed, or from a cache in decoding."""
        own, source = self.attention, self.source_attention
        x_ND = self._residual(x_ND, self.attention_norm, layout, lambda h: attend(own, h))
        if source is not None and self.source_norm is not None:
            x_ND = self._residual(
                x_ND, self.source_norm, layout, lambda h: attend_to_source(source, h)
            )
        return self._residual(x_ND, self.feed_forward_norm, layout, self.feed_forward)

    def _residual(
        self,
        x_ND: Tensor,
        norm: nn.Module,
        layout: SequenceLayout,
        branch: Callable[[Tensor], Tensor],
    ) -> Tensor:
        if self.norm_first:
            return x_ND + self._thin(branch(norm(x_ND)), layout)
        return norm(x_ND + self._thin(branch(x_ND), layout))

    def _thin(self, branch_ND: Tensor, layout: SequenceLayout) -> Tensor:
        return self.stochastic_depth(self.dropout(branch_ND), layout)


class Stack(nn.Module):
    """Blocks on top of embeddings: an encoder, or a decoder where ``causal``."""

    def __init__(
        self,
        config: TransformerConfig,
        *,
        num_layers: int | None = None,
        causal: bool = False,
        reads_source: bool = False,
    ) -> None:
        super().__init__()
        num_layers = num_layers or config.num_layers
        self.max_positions = config.max_positions
        # Post-norm leaves the embeddings' sum unnormalised otherwise.
        self.embedding_norm = build_norm(config) if config.norm_placement == "post" else None
        self.dropout = Dropout(config.dropout)
        self.rotary = RotaryTable(config) if config.positions == "rotary" else None
        self.blocks = nn.ModuleList(
            Block(
                config,
                causal=causal,
                reads_source=reads_source,
                stochastic_depth=config.stochastic_depth * i / max(num_layers - 1, 1),
            )
            for i in range(num_layers)
        )
        self.final_norm = build_norm(config) if config.norm_placement == "pre" else None
        # Between them processes that share a stream hold some of its rows each.
        self.divide, self.unite = nn.Identity(), nn.Identity()
        self.recompute = False

    def forward(self, x_ND: Tensor, batch: PackedBatch, memory_MD: Tensor | None = None) -> Tensor:
        """Maps embeddings (N, D) to hidden states (N, D).

        Raises:
            UsageError: a sequence is longer than ``max_positions``.
        """
        x_ND = self.divide(self.enter(x_ND))
        return self.unite(self.leave(self.advance(x_ND, batch, memory_MD)))

    def advance(
        self,
        x_ND: Tensor,
        batch: PackedBatch,
        memory_MD: Tensor | None = None,
        blocks: Iterable[nn.Module] | None = None,
    ) -> Tensor:
        """Runs the blocks that are here; ``recompute`` trades their activations for time.

        Args:
            x_ND: what goes into the first of them.
            batch: that it belongs to.
            memory_MD: encoded source; None without one.
            blocks: to run instead of all that are here.

        Raises:
            UsageError: a sequence is longer than ``max_positions``.
        """
        check_positions(batch.layout, self.max_positions)
        around = Surroundings(
            batch.layout,
            batch.layout.group_plan,
            self.rotate(batch.positions),
            memory_MD,
            None if memory_MD is None else batch.source_plan,
        )
        for block in self.blocks if blocks is None else blocks:
            if self.recompute and self.training:
                # Stopping early would leave the block's last collective without a wait for it, and
                # torch holds its tensors until there is one.
                x_ND = checkpoint(  # pyright: ignore[reportAssignmentType]
                    block, x_ND, around, use_reentrant=False, early_stop=False
                )
            else:
                x_ND = block(x_ND, around)
        return x_ND

    def rotate(self, positions: Tensor) -> Rotary | None:
        """Returns the cosines and sines of (N,) positions, where they are rotary."""
        return None if self.rotary is None else self.rotary(positions)

    def enter(self, x_ND: Tensor) -> Tensor:
        """What happens to embeddings before the first block."""
        return self.dropout(x_ND if self.embedding_norm is None else self.embedding_norm(x_ND))

    def leave(self, x_ND: Tensor) -> Tensor:
        """What happens to hidden states after the last block."""
        return x_ND if self.final_norm is None else self.final_norm(x_ND)


class Transformer(nn.Module):
    """A Transformer with a head; by default an encoder that classifies.

    Attributes:
        row_multiple: the rows of a stream are filled up to a multiple of it, for processes that
            share them; outputs have none of the filler.

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
        self.config = config = TransformerConfig(
            vocab_size=vocab_size,
            num_layers=num_layers,
            hidden_size=hidden_size,
            num_heads=num_heads,
            dropout=dropout,
            **options,
        )
        self.embedding = Embedding(config)
        self.source_embedding = (
            Embedding(config, config.source_vocab_size) if config.source_vocab_size else None
        )
        self.encoder = Stack(config) if config.architecture != "decoder" else None
        self.decoder = (
            Stack(
                config,
                num_layers=config.decoder_layers,
                causal=True,
                reads_source=config.architecture == "encoder_decoder",
            )
            if config.architecture != "encoder"
            else None
        )
        self.head = _HEADS[config.head](config)
        self.row_multiple = 1
        self.reset_parameters()

    @classmethod
    def from_config(cls, config: TransformerConfig) -> Transformer:
        """Builds the model that ``config`` describes."""
        return cls(**{f.name: getattr(config, f.name) for f in dataclasses.fields(config)})

    def forward(
        self, inputs: Tensor | PackedBatch, mask: Tensor | None = None
    ) -> Tensor | TokenOutputs:
        """Scores sequences or tokens.

        Args:
            inputs: a ``PackedBatch``, or padded token ids (B, T), which are packed here and
                take the same path.
            mask: (B, T), nonzero at real tokens; only with padded ids.

        Returns:
            Before the softmax: (S, num_labels) scores of classes, (N, 2) scores of a span's
            ends, or what scores of tokens are made of.

        Raises:
            UsageError: the batch has no source for an encoder-decoder, or one too many.
        """
        batch = inputs if isinstance(inputs, PackedBatch) else pack_padded(inputs, mask)
        batch = batch.filled(self.row_multiple)
        if (batch.source is not None) != (self.config.architecture == "encoder_decoder"):
            raise UsageError("a source belongs to an encoder_decoder, and to nothing else.")
        x_ND = self.embed(batch)
        if self.decoder is None:
            assert self.encoder is not None
            x_ND = self.encoder(x_ND, batch)
        else:
            memory_MD = None if batch.source is None else self.encode(batch.source)
            x_ND = self.decoder(x_ND, batch, memory_MD)
        if batch.num_filler:
            x_ND = x_ND[: batch.num_tokens - batch.num_filler]
        return self.score(x_ND, batch.unfilled_layout)

    @property
    def stacks(self) -> list[Stack]:
        """The encoder, the decoder or both."""
        return [stack for stack in (self.encoder, self.decoder) if stack is not None]

    @property
    def blocks(self) -> list[nn.Module]:
        """All blocks, the encoder's first: what may be gathered one at a time."""
        return [block for stack in self.stacks for block in stack.blocks]

    def embed(self, batch: PackedBatch) -> Tensor:
        """Returns the embeddings (N, D) of a batch."""
        return self.embedding(batch.token_ids, batch.positions, batch.token_types)

    def encode(self, source: PackedBatch) -> Tensor:
        """Returns the encoded source (M, D) of an encoder-decoder."""
        assert self.encoder is not None
        embedding = self.embedding if self.source_embedding is None else self.source_embedding
        x_MD = embedding(source.token_ids, source.positions, source.token_types)
        return self.encoder(x_MD, source)

    def score(self, x_ND: Tensor, layout: SequenceLayout) -> Tensor | TokenOutputs:
        """Maps final hidden states to the head's outputs."""
        if isinstance(self.head, TokenHead):
            return self.head(x_ND, self.embedding.tokens.weight)
        if isinstance(self.head, ClassificationHead):
            return self.head(x_ND, layout)
        return self.head(x_ND)

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
        for stack in self.stacks:
            for block in stack.blocks:
                assert isinstance(block, Block)
                for matrix in _branch_ends(block):
                    if self.config.zero_init_residual:
                        nn.init.zeros_(matrix.weight)
                    else:
                        # Keeps the residual stream's variance independent of depth (GPT-2).
                        nn.init.normal_(matrix.weight, std=std / (2 * len(stack.blocks)) ** 0.5)


_HEADS: dict[str, Callable[[TransformerConfig], nn.Module]] = {
    "classification": ClassificationHead,
    "language_modelling": TokenHead,
    "span": SpanHead,
}


def _branch_ends(block: Block) -> list[nn.Linear]:
    """Returns the last matrix of every residual branch."""
    ends = [block.attention.output, block.feed_forward.down]
    if block.source_attention is not None:
        ends.append(block.source_attention.output)
    return ends
