"""The weights that a process of a layout holds, by their shapes alone.

    TransformerConfig, Layout --held_weights--> HeldWeight: shape, group, what becomes of gradients

The shapes are read off the model itself, made without memory (torch's meta device), so that nothing
here can differ from it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

from hasten.model.adapters import WHOLE, TrainedPart
from hasten.model.config import TransformerConfig
from hasten.model.sharing import Role, declare_roles
from hasten.model.stages import TIED_NAME, StageCosts, stage_costs
from hasten.model.transformer import Transformer
from hasten.parallel.layout import Layout
from hasten.parallel.pipeline_plan import cut_blocks, find_schedule, num_stages

_SPLIT_FIRST = (Role.SPLIT_OUTPUTS, Role.SPLIT_ENTRIES, Role.VOCABULARY)
_BEFORE_BLOCKS = ("positions", "embedding_norm", "projection")
_NORMS = (Role.ROW_NORM, Role.HEAD_NORM)


@dataclass(frozen=True)
class HeldWeight:
    """One weight as the processes of a tensor axis hold it.

    Attributes:
        name: in the model.
        shape: of the part that the first of them has, which has most.
        whole_shape: of all of it.
        split_dim: the dimension that is split; None where each has the whole.
        block: name of the block that it belongs to; empty for none.
        is_norm: whether it belongs to a norm of divided rows, of whose gradient each has a summand.
        is_trained: whether it has a gradient.
    """

    name: str
    shape: tuple[int, ...]
    whole_shape: tuple[int, ...]
    split_dim: int | None
    block: str
    is_norm: bool
    is_trained: bool

    @property
    def is_matrix_of_block(self) -> bool:
        """Whether Muon orthogonalises it."""
        return len(self.whole_shape) == 2 and bool(self.block)


@dataclass(frozen=True)
class HeldModel:
    """What one process of a layout holds of a model.

    Attributes:
        weights: those that its optimizer changes.
        num_blocks: of the encoder and the decoder.
        has_embedding: whether the embedding is here; where there is no pipeline it always is.
        has_head: whether the head is here.
        num_stages: of a pipeline's process, else 1.
    """

    weights: tuple[HeldWeight, ...]
    num_blocks: tuple[int, int]
    has_embedding: bool
    has_head: bool
    num_stages: int


def padded_size(shape: tuple[int, ...], num_parts: int, dim: int = 0) -> int:
    """Returns the elements of a tensor whose dimension is padded to a multiple of ``num_parts``."""
    if not shape:
        return num_parts
    rows = -(-shape[dim] // num_parts) * num_parts
    return rows * math.prod(shape) // shape[dim]


def held_model(
    config: TransformerConfig,
    layout: Layout,
    schedule: str = "1f1b",
    stage_rank: int = 0,
    part: TrainedPart = WHOLE,
    costs: StageCosts | None = None,
) -> HeldModel:
    """Returns what one process holds, before weights are sharded.

    Args:
        config: of the model.
        layout: of the processes.
        schedule: of a pipeline.
        stage_rank: place of the process in its pipeline.
        part: which weights are trained.
        costs: by which a pipeline is cut; None for those of sequences without a length.
    """
    model = _without_memory(config, part)
    roles = declare_roles(model)
    costs = costs or stage_costs(config)
    own, first, last, stages = _own_blocks(config, layout, schedule, stage_rank, costs)
    weights, num_blocks = [], [0, 0]
    for number, stack in enumerate((model.encoder, model.decoder)):
        blocks = 0 if stack is None else len(stack.blocks)
        num_blocks[number] = blocks if own is None else min(blocks, len(own))
    for name, parameter in model.named_parameters():
        owner, _, kind = name.rpartition(".")
        block = ".".join(name.split(".")[:3]) if ".blocks." in name else ""
        if own is not None and not _is_here(name, block, own, (first, last), config):
            continue
        role = roles.get(owner) if layout.tensor > 1 else None
        dim = _split_dim(role, kind)
        shape = list(parameter.shape)
        if dim is not None:
            shape[dim] = -(-shape[dim] // layout.tensor)
        weights.append(
            HeldWeight(
                name,
                tuple(shape),
                tuple(parameter.shape),
                dim,
                block,
                role in _NORMS,
                parameter.requires_grad,
            )
        )
    return HeldModel(tuple(weights), (num_blocks[0], num_blocks[1]), first, last, stages)


@lru_cache(maxsize=8)
def _without_memory(config: TransformerConfig, part: TrainedPart) -> Transformer:
    """Returns a model to look at; many layouts may be asked about."""
    with torch.device("meta"):
        model = Transformer.from_config(config)
        part.apply(model)
    return model


def _split_dim(role: Role | None, kind: str) -> int | None:
    if role in _SPLIT_FIRST:
        return 0
    return 1 if role is Role.SPLIT_INPUTS and kind == "weight" else None


def _own_blocks(
    config: TransformerConfig, layout: Layout, schedule: str, stage_rank: int, costs: StageCosts
) -> tuple[list[int] | None, bool, bool, int]:
    """Returns a process's blocks (None for all), whether it has the ends, and its stages."""
    if layout.pipeline == 1:
        return None, True, True, 1
    total = num_stages(find_schedule(schedule), layout.pipeline)
    spans = cut_blocks(
        [costs.block] * config.num_layers, total, before=costs.embedding, after=costs.head
    )
    own = range(stage_rank, total, layout.pipeline)
    blocks = [block for number in own for block in spans[number]]
    return blocks, 0 in own, total - 1 in own, len(own)


def _is_here(
    name: str, block: str, own: list[int], ends: tuple[bool, bool], config: TransformerConfig
) -> bool:
    """Says whether a stage holds a weight."""
    has_first, has_last = ends
    if block:
        return int(block.rpartition(".")[2]) in own
    if name == TIED_NAME and config.head == "language_modelling" and config.tie_embeddings:
        return has_first or has_last
    is_early = name.startswith("embedding.") or name.split(".")[1] in _BEFORE_BLOCKS
    return has_first if is_early else has_last
