"""Where a model may be cut into stages, what they cost, and how a process keeps its own only.

    embedding | block 0 | block 1 | ... | block L-1 | head      cut at the bars between blocks

What stays keeps its name, so that weights are called the same however a model is cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from hasten.core.errors import UsageError
from hasten.model.config import TransformerConfig
from hasten.model.transformer import Stack, Transformer

TIED_NAME = "embedding.tokens.weight"
"""The weight that the first and the last stage both hold where embeddings are tied."""


@dataclass(frozen=True)
class StageCosts:
    """What the parts of a model cost to run, in products and sums for one token forward.

    The backward pass costs twice as much everywhere, which changes no proportion.

    Attributes:
        embedding: before the first block.
        block: each of them.
        head: after the last block, scores and loss included.
    """

    embedding: float
    block: float
    head: float


def stage_costs(config: TransformerConfig, length: int = 0) -> StageCosts:
    """Returns what the parts of a model cost.

    With D the hidden size, Q the width of all queries, K that of all keys, F the inner size, E the
    width of the embeddings, V the vocabulary and T the length of a sequence, a matrix of m x n
    costs 2 m n:

        block       4 D Q + 4 D K + 2 D F (3 D F with a gate, twice) + 4 Q T (2 Q T where causal)
        head        2 D V of tokens, 4 D of spans (2 D D more with a matrix before it); of classes
                    2 D, since labels are few
        embedding   E for each table that is looked up, and 2 E D where E is not D

    Args:
        config: of the model.
        length: tokens of a typical sequence; with 0 scores of attention are left out.
    """
    width, inner = config.hidden_size, config.embedding_width
    queries, keys = (n * config.head_size for n in (config.num_heads, config.kv_heads))
    num_inner = 3 if config.is_gated else 2
    scores = (2 if config.architecture == "decoder" else 4) * queries * length
    tables = 1 + (config.positions in ("learned", "sinusoidal")) + bool(config.num_token_types)
    dense = 2 * width * width * (config.head_activation != "none")
    heads = {"language_modelling": 2 * width * config.vocab_size, "span": 4 * width + dense}
    return StageCosts(
        embedding=inner * tables + 2 * inner * width * (inner != width),
        block=4 * width * (queries + keys) + 2 * num_inner * width * config.inner_size + scores,
        head=heads.get(config.head, 2 * width),
    )


def check_stages(config: TransformerConfig) -> None:
    """Refuses a model that cannot be cut into stages.

    Raises:
        UsageError: it is an encoder-decoder, or its blocks share a weight.
    """
    if config.architecture == "encoder_decoder":
        raise UsageError("an encoder_decoder cannot be cut into stages: leave out pipeline.")
    if config.positions == "relative":
        raise UsageError(
            "blocks with relative positions share a weight and cannot be cut into stages: leave "
            "out pipeline."
        )


def own_stack(model: Transformer) -> Stack:
    """Returns the one stack of a model that can be cut.

    Raises:
        UsageError: the model cannot be.
    """
    check_stages(model.config)
    stack = model.encoder or model.decoder
    assert stack is not None
    return stack


class Elsewhere(nn.Module):
    """Stands for a part that another process holds."""

    weight: Tensor | None = None


def keep_stages(
    model: Transformer, blocks: Sequence[int], *, has_first: bool, has_last: bool
) -> None:
    """Removes from a model, in place, what stages of other processes hold.

    Blocks that stay keep their numbers as names, and ``Stack.blocks`` lists them alone. A tied
    head keeps the embeddings of tokens.

    Args:
        model: the whole one.
        blocks: numbers of those that stay.
        has_first: whether the embedding stays.
        has_last: whether the head stays.
    """
    stack = own_stack(model)
    for name, _ in list(stack.blocks.named_children()):
        if int(name) not in blocks:
            delattr(stack.blocks, name)
    if not has_first:
        is_tied = model.config.head == "language_modelling" and model.config.tie_embeddings
        for name, _ in list(model.embedding.named_children()):
            if name == "tokens":
                if not (is_tied and has_last):
                    model.embedding.register_module(name, Elsewhere())
            else:
                model.embedding.register_module(name, None)
        stack.positions = stack.embedding_norm = stack.projection = None
    if not has_last:
        model.head = Elsewhere()
        stack.final_norm = None
