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

    With D the hidden size, K the width of all keys, F the inner size, V the vocabulary and T the
    length of a sequence, a matrix of m x n costs 2 m n:

        block       4 D D + 4 D K + 2 D F (3 D F with a gate, twice) + 4 D T (2 D T where causal)
        head        2 D V of tokens, 4 D of spans; of classes 2 D, since labels are few
        embedding   D for each table that is looked up

    Args:
        config: of the model.
        length: tokens of a typical sequence; with 0 scores of attention are left out.
    """
    width, keys = config.hidden_size, config.kv_heads * config.head_size
    num_inner = 3 if config.activation == "swiglu" else 2
    scores = (2 if config.architecture == "decoder" else 4) * width * length
    tables = 1 + (config.positions != "rotary") + bool(config.num_token_types)
    heads = {"language_modelling": 2 * width * config.vocab_size, "span": 4 * width}
    return StageCosts(
        embedding=width * tables,
        block=4 * width * (width + keys) + 2 * num_inner * width * config.inner_size + scores,
        head=heads.get(config.head, 2 * width),
    )


def own_stack(model: Transformer) -> Stack:
    """Returns the one stack of a model that can be cut.

    Raises:
        UsageError: the model is an encoder-decoder.
    """
    if model.encoder is not None and model.decoder is not None:
        raise UsageError("an encoder_decoder cannot be cut into stages: leave out pipeline.")
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
        stack.embedding_norm = None
    if not has_last:
        model.head = Elsewhere()
        stack.final_norm = None
