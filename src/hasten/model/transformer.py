"""One configurable Block, stacks of it, and the public ``Transformer``.

    encoder            PackedBatch -> Embedding -> encoder -> head -> outputs
    decoder            PackedBatch -> Embedding -> decoder -> head -> outputs
    encoder_decoder    PackedBatch.source -> Embedding -> encoder --memory--.
                       PackedBatch        -> Embedding -> decoder <---------' -> head -> outputs

    a stack            (N, E) + positions -> norm, dropout, matrix -> (N, D) -> blocks -> norm

Shapes: N tokens, M tokens of the source, D hidden size, E width of the embeddings, S sequences.
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
from hasten.model.attention import Attention, Biases, WantedRows
from hasten.model.config import TransformerConfig
from hasten.model.heads import ClassificationHead, SpanHead, TokenHead, TokenOutputs
from hasten.model.layers import (
    Dropout,
    Embedding,
    FeedForward,
    StochasticDepth,
    build_norm,
)
from hasten.model.positions import (
    UNTURNED,
    RelativeBias,
    Rotary,
    RotaryTable,
    Rotations,
    build_positions,
    check_positions,
)


@dataclasses.dataclass(frozen=True)
class Surroundings:
    """What a block needs to know about its stream besides the stream itself.

    Attributes:
        layout: where the sequences begin and end.
        plan: groups in which they are looked at; formed outside of what is compiled.
        rotations: of queries and keys.
        biases: for each group what is added to the scores; None without relative positions.
        memory_MD: encoded source; None without one.
        memory_plan: groups in which sequences look at their source.
    """

    layout: SequenceLayout
    plan: GroupPlan
    rotations: Rotations = UNTURNED
    biases: Biases | None = None
    memory_MD: Tensor | None = None
    memory_plan: GroupPlan | None = None
    wanted: WantedRows | None = None


class Block(nn.Module):
    """Attention and feed-forward, each a residual branch with its norms before or after.

    Args:
        config: of the model.
        number: in its stack.
        causal: whether a token sees only itself and what comes before it.
        reads_source: whether it looks at a source.
        stochastic_depth: rate at which a sequence skips a branch.

    Attributes:
        is_local: whether a token sees only those near it.
    """

    def __init__(
        self,
        config: TransformerConfig,
        number: int = 0,
        *,
        causal: bool = False,
        reads_source: bool = False,
        stochastic_depth: float = 0.0,
    ) -> None:
        super().__init__()
        placement = config.norm_placement
        self.norm_first = placement != "post"
        may_be_local = causal or config.architecture == "encoder"
        window = config.sliding_window if may_be_local else 0
        self.is_local = window > 0 and number not in config.global_layers
        self.attention = Attention(config, causal=causal, window=window * self.is_local)
        has_norm = config.first_norm or number > 0
        self.attention_norm = build_norm(config) if has_norm else None
        self.source_attention = Attention(config) if reads_source else None
        self.source_norm = build_norm(config) if reads_source else None
        self.feed_forward = FeedForward(config)
        self.feed_forward_norm = build_norm(config)
        is_sandwich = placement == "sandwich"
        self.attention_end_norm = build_norm(config) if is_sandwich else None
        self.source_end_norm = build_norm(config) if is_sandwich and reads_source else None
        self.feed_forward_end_norm = build_norm(config) if is_sandwich else None
        self.dropout = Dropout(config.dropout)
        self.stochastic_depth = StochasticDepth(stochastic_depth)

    def forward(self, x_ND: Tensor, around: Surroundings) -> Tensor:
        """Maps the residual stream (N, D) to (N, D)."""
        rotary, wanted = self.rotary(around.rotations), around.wanted
        if wanted is not None:
            return self.run_wanted(x_ND, wanted, rotary)
        return self.run(
            x_ND,
            around.layout,
            lambda attention, h: attention(h, around.plan, rotary, biases=around.biases),
            lambda attention, h: attention(h, around.memory_plan, None, around.memory_MD),
        )

    def run_wanted(self, x_ND: Tensor, wanted: WantedRows, rotary: Rotary | None) -> Tensor:
        """Maps the stream (N, D) to its wanted rows (S, D): the others are only looked at."""
        norm = self.attention_norm if self.norm_first else None
        memory_ND = x_ND if norm is None else norm(x_ND)
        return self.run(
            x_ND.index_select(0, wanted.rows),
            wanted.layout,
            lambda attention, h: attention.ask(h, memory_ND, wanted, rotary),
            lambda attention, h: h,
        )

    def rotary(self, rotations: Rotations) -> Rotary | None:
        """Returns the cosines and sines that are this block's."""
        return rotations.nearby if self.is_local else rotations.everywhere

    def run(
        self,
        x_ND: Tensor,
        layout: SequenceLayout,
        attend: Callable[[Attention, Tensor], Tensor],
        attend_to_source: Callable[[Attention, Tensor], Tensor],
    ) -> Tensor:
        """The block with attention as the caller does it: packed, or from a cache in decoding."""
        own, source = self.attention, self.source_attention
        norms = self.attention_norm, self.attention_end_norm
        x_ND = self._residual(x_ND, norms, layout, lambda h: attend(own, h))
        if source is not None:
            norms = self.source_norm, self.source_end_norm
            x_ND = self._residual(x_ND, norms, layout, lambda h: attend_to_source(source, h))
        norms = self.feed_forward_norm, self.feed_forward_end_norm
        return self._residual(x_ND, norms, layout, self.feed_forward)

    def _residual(
        self,
        x_ND: Tensor,
        norms: tuple[nn.Module | None, nn.Module | None],
        layout: SequenceLayout,
        branch: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Adds a branch, with its norm and that at its end."""
        norm, end_norm = norms
        branch_ND = branch(norm(x_ND) if norm is not None and self.norm_first else x_ND)
        if end_norm is not None:
            branch_ND = end_norm(branch_ND)
        x_ND = x_ND + self.stochastic_depth(self.dropout(branch_ND), layout)
        return x_ND if norm is None or self.norm_first else norm(x_ND)


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
        width = config.embedding_width
        self.max_positions = config.max_positions
        self.positions = build_positions(config)
        self.embedding_norm = build_norm(config, width) if config.has_embedding_norm else None
        self.dropout = Dropout(config.dropout)
        self.projection = (
            nn.Linear(width, config.hidden_size) if width != config.hidden_size else None
        )
        self.rotary = RotaryTable(config) if config.positions == "rotary" else None
        base = config.local_rotary_base
        self.local_rotary = None if base is None else RotaryTable(config, base)
        is_relative = config.positions == "relative"
        self.relative_bias = RelativeBias(config, causal=causal) if is_relative else None
        self.blocks = nn.ModuleList(
            Block(
                config,
                i,
                causal=causal,
                reads_source=reads_source,
                stochastic_depth=config.stochastic_depth * i / max(num_layers - 1, 1),
            )
            for i in range(num_layers)
        )
        self.final_norm = None if config.norm_placement == "post" else build_norm(config)
        # Between them processes that share a stream hold some of its rows each.
        self.divide, self.unite = nn.Identity(), nn.Identity()
        self.recompute = False

    def forward(
        self,
        x_NE: Tensor,
        batch: PackedBatch,
        memory_MD: Tensor | None = None,
        wanted: WantedRows | None = None,
    ) -> Tensor:
        """Maps embeddings (N, E) to hidden states (N, D), or to those of the wanted rows (S, D).

        Raises:
            UsageError: a sequence is longer than ``max_positions``.
        """
        check_positions(batch.layout, self.max_positions)
        x_ND = self.divide(self.enter(x_NE, batch.positions))
        return self.unite(self.leave(self.advance(x_ND, batch, memory_MD, wanted=wanted)))

    @property
    def can_end_early(self) -> bool:
        """Whether the last block can do with the rows that are wanted of it."""
        last = self.blocks[-1]
        assert isinstance(last, Block)
        return not last.is_local and self.relative_bias is None

    def advance(
        self,
        x_ND: Tensor,
        batch: PackedBatch,
        memory_MD: Tensor | None = None,
        blocks: Iterable[nn.Module] | None = None,
        wanted: WantedRows | None = None,
    ) -> Tensor:
        """Runs the blocks that are here; ``recompute`` trades their activations for time.

        Args:
            x_ND: what goes into the first of them.
            batch: that it belongs to.
            memory_MD: encoded source; None without one.
            blocks: to run instead of all that are here.
            wanted: rows to which the last of them is confined; None for all.

        Raises:
            UsageError: a sequence is longer than ``max_positions``.
        """
        check_positions(batch.layout, self.max_positions)
        plan = batch.layout.group_plan
        around = Surroundings(
            batch.layout,
            plan,
            self.rotate(batch.positions),
            self.biases(plan),
            memory_MD,
            None if memory_MD is None else batch.source_plan,
        )
        run = list(self.blocks if blocks is None else blocks)
        for number, block in enumerate(run, 1):
            if wanted is not None and number == len(run):
                around = dataclasses.replace(around, wanted=wanted)
            if self.recompute and self.training:
                # Stopping early would leave the block's last collective without a wait for it, and
                # torch holds its tensors until there is one.
                x_ND = checkpoint(  # pyright: ignore[reportAssignmentType]
                    block, x_ND, around, use_reentrant=False, early_stop=False
                )
            else:
                x_ND = block(x_ND, around)
        return x_ND

    def rotate(self, positions: Tensor) -> Rotations:
        """Returns the cosines and sines of (N,) positions, where they are rotary."""
        if self.rotary is None:
            return UNTURNED
        everywhere, local = self.rotary(positions), self.local_rotary
        return Rotations(everywhere, everywhere if local is None else local(positions))

    def biases(self, plan: GroupPlan) -> Biases | None:
        """Returns for each group what all blocks add to scores, where positions are relative."""
        bias = self.relative_bias
        if bias is None:
            return None
        return tuple(bias.between(group.queries.length) for group in plan.groups)

    def enter(self, x_NE: Tensor, positions: Tensor) -> Tensor:
        """What happens to embeddings (N, E) before the first block: (N, D)."""
        if self.positions is not None:
            x_NE = x_NE + self.positions(positions)
        if self.embedding_norm is not None:
            x_NE = self.embedding_norm(x_NE)
        x_NE = self.dropout(x_NE)
        return x_NE if self.projection is None else self.projection(x_NE)

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
        x_NE = self.embed(batch)
        memory_MD = None if batch.source is None else self.encode(batch.source)
        stack = self.decoder or self.encoder
        assert stack is not None
        if (wanted := self._wanted(stack, batch)) is not None:
            return self.score(stack(x_NE, batch, memory_MD, wanted), wanted.layout)
        x_ND = stack(x_NE, batch, memory_MD)
        if batch.num_filler:
            x_ND = x_ND[: batch.num_tokens - batch.num_filler]
        return self.score(x_ND, batch.unfilled_layout)

    def _wanted(self, stack: Stack, batch: PackedBatch) -> WantedRows | None:
        """Returns the rows that the head looks at, where they are few and nobody shares them."""
        if not isinstance(self.head, ClassificationHead) or self.row_multiple > 1:
            return None
        if batch.source is not None or not stack.can_end_early:
            return None
        return self.head.wanted_rows(batch.layout)

    @property
    def stacks(self) -> list[Stack]:
        """The encoder, the decoder or both."""
        return [stack for stack in (self.encoder, self.decoder) if stack is not None]

    @property
    def blocks(self) -> list[nn.Module]:
        """All blocks, the encoder's first: what may be gathered one at a time."""
        return [block for stack in self.stacks for block in stack.blocks]

    def embed(self, batch: PackedBatch) -> Tensor:
        """Returns the embeddings (N, E) of a batch's tokens."""
        return self.embedding(batch.token_ids, batch.token_types)

    def encode(self, source: PackedBatch) -> Tensor:
        """Returns the encoded source (M, D) of an encoder-decoder."""
        assert self.encoder is not None
        embedding = self.embedding if self.source_embedding is None else self.source_embedding
        return self.encoder(embedding(source.token_ids, source.token_types), source)

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
