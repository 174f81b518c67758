"""Spreads a model over the processes of a run, as their layout says, in one visible order.

    plain model -> stages -> rows divided, heads exchanged -> matrices split -> blocks compiled
                (pipeline)          (context, tensor)            (tensor)
                -> weights sharded or replicated
                   (replicate, shard, context)

Gradients are sums over processes with examples, or rows, of their own, so that the axes replicate,
shard and context are one for them.
"""

from __future__ import annotations

import logging
import shutil
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from hasten.core.errors import MachineError, UsageError
from hasten.core.ranks import Ranks
from hasten.model.config import TransformerConfig
from hasten.model.sharing import check_sharing, declare_roles
from hasten.model.stages import StageCosts, check_stages, stage_costs
from hasten.model.transformer import Block, Transformer
from hasten.parallel.data_parallel import Computing, DataParallel, Replicated, Sharded, shard
from hasten.parallel.divided import DividedRows
from hasten.parallel.layout import Layout
from hasten.parallel.pipeline import Pipeline
from hasten.parallel.pipeline_plan import cut_blocks, find_schedule, num_stages
from hasten.parallel.pipeline_stage import Stage, cut_model
from hasten.parallel.pipelined import Pipelined
from hasten.parallel.rows import divide_rows
from hasten.parallel.tensor import apply_tensor_parallel
from hasten.parallel.world import World

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_COMPILERS = ("g++", "clang++")


@dataclass(frozen=True)
class ParallelSettings:
    """What else there is to know where a model is spread.

    Attributes:
        device: of this process.
        computing: surrounds the forward of each micro-batch and its loss.
        schedule: by which a pipeline works.
        num_tokens: values of N that a pipeline fills micro-batches up to, see ``filled_tokens``.
        costs: by which a pipeline is cut; None for those of ``stage_costs``.
        compiles: whether blocks are compiled.
    """

    device: torch.device
    computing: Computing = nullcontext
    schedule: str = "1f1b"
    num_tokens: tuple[int, ...] = (1,)
    costs: StageCosts | None = None
    compiles: bool = False


def check_layout(
    config: TransformerConfig, layout: Layout, schedule: str, *, compiles: bool = False
) -> None:
    """Refuses a layout that a model cannot be spread by.

    Raises:
        UsageError: saying what would fit.
    """
    check_sharing(config, tensor=layout.tensor, context=layout.context)
    if layout.pipeline == 1:
        return
    if compiles and schedule == "zero-bubble":
        raise UsageError(
            "torch cannot cut the backward of compiled blocks in two: leave out train.compile or "
            "the schedule zero-bubble."
        )
    check_stages(config)
    costs = stage_costs(config)
    cut_blocks(
        [costs.block] * config.num_layers, num_stages(find_schedule(schedule), layout.pipeline)
    )


def apply_parallel(model: Transformer, ranks: Ranks, settings: ParallelSettings) -> DataParallel:
    """Spreads a model over processes.

    Args:
        model: the plain model, on its device, the same on all processes.
        ranks: the processes.
        settings: what else there is to know.

    Raises:
        UsageError: the model cannot be spread by this layout.
        MachineError: blocks are to be compiled, and there is nothing to do so with.
    """
    if isinstance(ranks, World):
        parallel = _spread(model, ranks, settings)
    else:
        _compile(model, settings)
        parallel = DataParallel(model, ranks)
    parallel.computing = settings.computing
    return parallel


def _spread(model: Transformer, ranks: World, settings: ParallelSettings) -> DataParallel:
    layout, mesh = ranks.layout, ranks.weights_mesh
    check_layout(model.config, layout, settings.schedule, compiles=settings.compiles)
    # torch warns where weights that are both sharded and split are gathered axis by axis.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    schedule = find_schedule(settings.schedule)
    stages: list[Stage] = []
    if layout.pipeline > 1:
        stage_rank = mesh["pipeline"].get_local_rank()
        stages = cut_model(model, schedule, stage_rank, layout.pipeline, costs=settings.costs)
    num_row_shares = layout.tensor * layout.context
    if num_row_shares > 1:
        roles = declare_roles(model)
        divide_rows(model, roles, ranks.rows_mesh["context"], ranks.rows_mesh["tensor"])
        model.row_multiple *= num_row_shares
        if layout.tensor > 1:
            apply_tensor_parallel(model, roles, mesh["tensor"])
    _compile(model, settings)
    if layout.pipeline == 1:
        inner = _apply_data_parallel(model, ranks)
        return DividedRows(model, ranks, inner) if num_row_shares > 1 else inner
    if layout.shard > 1:
        shard(_weights_mesh(ranks), [*model.blocks, *stages], reshard=False)
    pipeline = Pipeline(
        model,
        stages,
        schedule,
        mesh["pipeline"],
        num_tokens=settings.num_tokens,
        device=settings.device,
        num_shares=num_row_shares,
        computing=settings.computing,
    )
    return Pipelined(model, ranks, pipeline)


def _compile(model: Transformer, settings: ParallelSettings) -> None:
    """Compiles the blocks in place, for streams of any length.

    Raises:
        MachineError: there is nothing to compile with.
    """
    if not settings.compiles:
        return
    if settings.device.type == "cpu" and not any(map(shutil.which, _COMPILERS)):
        raise MachineError(
            f"train.compile needs a C++ compiler on a CPU ({' or '.join(_COMPILERS)}): install "
            "one, or leave it out."
        )
    # What it cannot put into its cache it compiles again in the next run; that is all.
    logging.getLogger("torch._functorch._aot_autograd.autograd_cache").setLevel(logging.ERROR)
    for block in model.blocks:
        assert isinstance(block, Block)
        for attention in filter(None, (block.attention, block.source_attention)):
            # Its groups differ from batch to batch, and its kernels have nothing left to fuse.
            plain = torch.compiler.disable(attention.core.forward)
            attention.core.forward = plain  # pyright: ignore[reportAttributeAccessIssue]
        block.compile(dynamic=True)


def _apply_data_parallel(model: Transformer, ranks: World) -> DataParallel:
    layout = ranks.layout
    if layout.num_batch_shares * layout.context == 1:
        return DataParallel(model, ranks)
    if layout.has_whole_weights:
        return Replicated(model, ranks)
    # DistributedDataParallel takes no matrices that are split. Shards among one process are whole.
    return Sharded(model, ranks, _weights_mesh(ranks), model.blocks)


def _weights_mesh(ranks: World) -> DeviceMesh:
    """Returns the processes that share weights, with groups of those before it where there are."""
    mesh = ranks.weights_mesh
    return mesh["replicate", "shard"] if ranks.layout.replicate > 1 else mesh["shard"]
