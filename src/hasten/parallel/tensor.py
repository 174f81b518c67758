"""Tensor parallelism: each matrix, and the heads of attention, spread over processes.

    rows of the stream (N / T, D) --gather--> (N, D) --own columns--> --own rows--> sums
        --scatter--> (N / T, D) --norm, dropout, residual--> ...

Megatron's scheme (Shoeybi et al. 2019) with sequence parallelism (Korthikanti et al. 2022) and the
loss computed where each process has some of the vocabulary. PyTorch's DTensor does the work; here
the roles that a model declares become its styles.

Shapes: N rows of the stream, T processes, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from hasten.model.sharing import Role

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def apply_tensor_parallel(model: nn.Module, roles: Mapping[str, Role], mesh: DeviceMesh) -> None:
    """Turns the parameters of modules with a role into sharded ones.

    Args:
        model: the plain model, the same on all processes.
        roles: of its modules, by name.
        mesh: the processes, one dimension.
    """
    # Loaded here: it takes a second, which a run of one process need not pay.
    from torch.distributed.tensor.parallel import parallelize_module

    styles = _styles()
    plan = {name: styles[role] for name, role in roles.items() if role in styles}
    parallelize_module(model, mesh, plan)


def settle_gradients(model: nn.Module) -> None:
    """Sums gradients of which each process has a summand, such as those of norms."""
    for parameter in model.parameters():
        gradient: Any = parameter.grad
        placements = getattr(parameter, "placements", None)
        if gradient is not None and placements is not None and gradient.placements != placements:
            parameter.grad = gradient.redistribute(placements=placements)


def _styles() -> dict[Role, Any]:
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
    )

    rows, every = Shard(0), Replicate()

    def gathered(given: tuple[Any, ...], wanted: tuple[Any, ...]) -> PrepareModuleInput:
        return PrepareModuleInput(input_layouts=given, desired_input_layouts=wanted)

    return {
        Role.SPLIT_OUTPUTS: ColwiseParallel(),
        Role.SPLIT_INPUTS: RowwiseParallel(output_layouts=rows),
        Role.SPLIT_ENTRIES: RowwiseParallel(input_layouts=every, output_layouts=every),
        Role.VOCABULARY: ColwiseParallel(),
        Role.FEED_FORWARD: gathered((rows,), (every,)),
        Role.ATTENTION: gathered((rows, None, None), (every, None, None)),
        Role.SOURCE_ATTENTION: gathered((rows, None, None, rows), (every, None, None, every)),
        Role.ROW_NORM: SequenceParallel(sequence_dim=0, use_local_output=True),
        Role.HEAD_NORM: SequenceParallel(sequence_dim=1, use_local_output=True),
    }
