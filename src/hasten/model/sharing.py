"""What of a model processes may share: declared by names, interpreted elsewhere.

Transformer --declare_roles--> {name of a module: Role}

stack.divide                every process has some rows of the stream from here on
    attention               all rows are gathered; each process has some heads
    attention.core          where processes may exchange rows for heads
    feed_forward            all rows are gathered; each process has some inner columns
stack.unite                 all rows again
"""

from __future__ import annotations

from enum import Enum

from torch import nn

from hasten.core.errors import UsageError
from hasten.model.config import TransformerConfig
from hasten.model.heads import TokenHead
from hasten.model.transformer import Block, Transformer


class Role(Enum):
    """What may be done with a module where processes share a model."""

    SPLIT_OUTPUTS = "a matrix whose outputs may be split"
    SPLIT_INPUTS = "a matrix whose inputs may be split; its outputs are sums"
    SPLIT_ENTRIES = "a table whose entries may be split"
    VOCABULARY = "a matrix of which the loss takes the rows, which may be split"
    ATTENTION = "needs all rows of the first of its three inputs"
    SOURCE_ATTENTION = "needs all rows of the first and the last of its four inputs"
    FEED_FORWARD = "needs all rows of its only input"
    ROW_NORM = "a norm of each row"
    HEAD_NORM = "a norm of each head, (N, H, C)"
    CORE = "attention between its projections"
    DIVIDE = "rows may be split from here on"
    UNITE = "all rows have to be there again"
    END = "the end of a stack whose rows stay split, for another to look at"


def declare_roles(model: Transformer) -> dict[str, Role]:
    """Returns the modules that processes may share, by name; of a stage those that are here."""
    roles: dict[str, Role] = {}
    if isinstance(model.embedding.tokens, nn.Embedding):
        roles["embedding.tokens"] = Role.SPLIT_ENTRIES
    if model.source_embedding is not None:
        roles["source_embedding.tokens"] = Role.SPLIT_ENTRIES
    if isinstance(model.head, TokenHead) and model.head.scorer is not None:
        roles["head.scorer"] = Role.VOCABULARY
    for name, stack in (("encoder", model.encoder), ("decoder", model.decoder)):
        if stack is None:
            continue
        is_looked_at = name == "encoder" and model.decoder is not None
        roles[f"{name}.divide"] = Role.DIVIDE
        roles[f"{name}.unite"] = Role.END if is_looked_at else Role.UNITE
        if stack.final_norm is not None:
            roles[f"{name}.final_norm"] = Role.ROW_NORM
        for number, block in stack.blocks.named_children():
            assert isinstance(block, Block)
            roles |= {
                f"{name}.blocks.{number}.{part}": role for part, role in _roles_in(block).items()
            }
    return roles


def _roles_in(block: Block) -> dict[str, Role]:
    roles = {
        "attention": Role.ATTENTION,
        "feed_forward": Role.FEED_FORWARD,
        "feed_forward.up": Role.SPLIT_OUTPUTS,
        "feed_forward.down": Role.SPLIT_INPUTS,
    }
    norms = (name for name, _ in block.named_children() if name.endswith("_norm"))
    roles |= dict.fromkeys(norms, Role.ROW_NORM)
    if block.feed_forward.gate is not None:
        roles["feed_forward.gate"] = Role.SPLIT_OUTPUTS
    if block.source_attention is not None:
        roles["source_attention"] = Role.SOURCE_ATTENTION
    for part in ("attention", "source_attention"):
        if part not in roles:
            continue
        roles |= {f"{part}.{name}": Role.SPLIT_OUTPUTS for name in ("query", "key", "value")}
        roles |= {f"{part}.output": Role.SPLIT_INPUTS, f"{part}.core": Role.CORE}
        if block.attention.query_norm is not None:
            roles |= {f"{part}.{name}": Role.HEAD_NORM for name in ("query_norm", "key_norm")}
    return roles


def check_sharing(config: TransformerConfig, *, tensor: int, context: int) -> None:
    """Refuses degrees that a model cannot be split by.

    Args:
        config: of the model.
        tensor: processes that share each matrix.
        context: processes that share the rows of a stream.

    Raises:
        UsageError: saying what would fit.
    """
    heads, kv_heads = config.num_heads, config.kv_heads
    if heads % (tensor * context):
        fitting = [n for n in range(1, heads + 1) if heads % n == 0]
        raise UsageError(
            f"tensor={tensor} times context={context} must divide the {heads} heads of attention: "
            f"{', '.join(map(str, fitting))} would."
        )
    if kv_heads % tensor:
        fitting = [n for n in range(1, kv_heads + 1) if kv_heads % n == 0]
        raise UsageError(
            f"tensor={tensor} must divide the {kv_heads} key/value heads: "
            f"{', '.join(map(str, fitting))} would."
        )
    if config.inner_size % tensor:
        raise UsageError(
            f"tensor={tensor} must divide the {config.inner_size} inner columns of feed-forward; "
            f"--model.feed_forward_size {config.inner_size // tensor * tensor} would fit."
        )
    if context > config.max_positions:
        raise UsageError(
            f"context={context} shares the tokens of sequences of at most {config.max_positions}: "
            f"{config.max_positions} or less would fit."
        )
    if tensor * context == 1:
        return
    if config.stochastic_depth:
        raise UsageError("--model.stochastic_depth does not go with tensor or context above 1.")
    if config.positions == "relative":
        raise UsageError("relative positions do not go with tensor or context above 1.")
