"""One of several processes: runs cases as pipelines and leaves what came of them.

python pipeline_worker.py FOLDER PROCESSES      -> found.json, found.safetensors
"""

from __future__ import annotations

import faulthandler
import json
import sys
from pathlib import Path
from typing import Any

import torch
from pipeline_cases import (
    CASES,
    LEARNING_RATE,
    NUM_TOKENS,
    PipelineCase,
    PipelineFound,
    note_outputs,
    scores_of,
)
from safetensors.torch import save_file
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from hasten.core.batch import PackedBatch
from hasten.core.seeds import derive_seed
from hasten.core.shards import whole
from hasten.parallel.pipeline import Pipeline
from hasten.parallel.pipeline_plan import find_schedule
from hasten.parallel.pipeline_stage import cut_model
from hasten.parallel.world import World, joined

# Processes that wait for each other would wait for ever.
_SECONDS = 120


class Watch:
    """Stands where ``torch.autocast`` does, and knows whether something runs inside."""

    is_inside = False

    def __enter__(self) -> None:
        self.is_inside = True

    def __exit__(self, *_: object) -> None:
        self.is_inside = False


def build(case: PipelineCase, mesh: DeviceMesh, watch: Watch) -> Pipeline:
    """Returns this process's part of a case's model."""
    group = mesh["pipeline"]
    schedule = find_schedule(case.schedule)
    model = case.build_model()
    stages = cut_model(model, schedule, group.get_local_rank(), group.size(), case.stages_per_rank)
    for part in (part for stage in stages for part in (*stage.blocks, stage)):
        if "shard" in case.axes:
            # Zero-bubble needs the weights of its forward; the others would gather more often.
            fully_shard(part, mesh=mesh["shard"], reshard_after_forward=False)
            assert isinstance(part, FSDPModule)
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
    return Pipeline(
        model,
        stages,
        schedule,
        group,
        num_tokens=[NUM_TOKENS - 20],  # some steps need twice as many
        device=torch.device("cpu"),
        computing=lambda: watch,
    )


def run_case(case: PipelineCase, world: World) -> PipelineFound:
    """Runs a case; on rank 0 everything is there afterwards."""
    mesh = init_device_mesh("cpu", case.degrees, mesh_dim_names=case.axes)
    share, shares = 0, 1
    for axis in set(case.axes) - {"pipeline"}:
        share, shares = mesh.get_local_rank(axis), mesh[axis].size()
    found, watch = PipelineFound(), Watch()
    pipeline = build(case, mesh, watch)
    model = pipeline.model
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
    for step in range(len(case.counts)):
        batches = case.build_batches(step)
        model.eval()
        with torch.inference_mode():  # as in evaluation
            outputs = pipeline.forward(batches, lambda outputs, _: scores_of(outputs).clone())
        model.train()
        note_outputs(found, step, outputs or [])
        loss, problems = take_step(
            case, pipeline, step, batches[share::shares], -(-len(batches) // shares), watch
        )
        found.losses.append(sum(one for one in world.gather(loss) if one is not None))
        found.problems += [f"step {step}: {problem}" for problem in problems]
        if "replicate" in case.axes:
            for parameter in model.parameters():
                assert parameter.grad is not None
                torch.distributed.all_reduce(parameter.grad, group=mesh.get_group("replicate"))
        note(found, f"{step}", pipeline, {n: p.grad for n, p in model.named_parameters()}, world)
        optimizer.step()
        if not case.accumulates:
            optimizer.zero_grad()
    note(found, "last", pipeline, dict(model.named_parameters()), world)
    for other in world.gather((found.tensors, found.problems)):
        found.tensors |= other[0]
        found.problems += other[1]
    return found


def take_step(
    case: PipelineCase,
    pipeline: Pipeline,
    step: int,
    batches: list[PackedBatch],
    at_least: int,
    watch: Watch,
) -> tuple[float | None, list[str]]:
    """Leaves the gradients of a step; returns its loss, where it is known, and what is wrong."""
    calls: list[tuple[int, int]] = []
    problems: list[str] = []

    def before_each(number: int, stage: int) -> None:
        calls.append((number, stage))
        torch.manual_seed(derive_seed("dropout", step, number, stage))

    def loss_of(outputs: Any, batch: PackedBatch) -> torch.Tensor:
        if not watch.is_inside:
            problems.append("the loss is outside of what surrounds each forward")
        return case.loss(step)(outputs, batch)

    loss = pipeline.step(batches, loss_of, before_each, at_least=at_least)
    own = [stage.number for stage in pipeline.stages]
    if sorted(calls) != [(number, stage) for number in range(len(batches)) for stage in own]:
        problems.append(f"before_each was called for {calls}")
    if watch.is_inside or (loss is None) == pipeline.has_last or (loss and loss.requires_grad):
        problems.append(f"the loss is {loss}")
    return None if loss is None else loss.item(), problems


def note(
    found: PipelineFound, when: str, pipeline: Pipeline, own: dict[str, Any], world: World
) -> None:
    """Notes tensors of all processes, each told by the one that speaks for it."""
    owned = set(pipeline.owned_names())
    told: dict[str, tuple[torch.Tensor, int]] = {}
    parts = {name: whole(tensor.detach()) for name, tensor in own.items()}
    for tensors, names in world.gather((parts, owned)):
        for name, tensor in tensors.items():
            known, count = told.get(name, (tensor, 0))
            told[name] = known, count + (name in names)
            if not torch.equal(known.nan_to_num(7.0), tensor.nan_to_num(7.0)):
                found.problems.append(f"{when}: {name} is not the same on all that have it")
    copies = world.size * len(pipeline.stages) // pipeline.stages[0].num_stages
    for name, (tensor, count) in told.items():
        found.tensors[f"{when}/{name}"] = tensor
        if count != copies:
            found.problems.append(f"{when}: {name} is owned {count} times of {copies}")


def main(folder: Path, num_processes: int) -> None:
    """Runs all cases; rank 0 writes."""
    faulthandler.dump_traceback_later(_SECONDS, exit=True)
    torch.set_num_threads(1)
    found, tensors = [], {}
    with joined("auto", None, "cpu") as world:
        assert isinstance(world, World)
        for number, case in enumerate(CASES[num_processes]):
            try:
                one = run_case(case, world)
            except Exception as error:
                error.add_note(f"in {case}, rank {world.rank}")
                raise
            tensors |= {f"{number}/{n}": t.contiguous().clone() for n, t in one.tensors.items()}
            found.append({"losses": one.losses, "problems": one.problems})
        if world.is_main:
            save_file(tensors, folder / "found.safetensors")
            (folder / "found.json").write_text(json.dumps(found))
        world.gather(None)  # none leaves before the others are done


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
