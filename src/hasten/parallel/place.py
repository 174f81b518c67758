"""Where a process stands among those that were started together.

torchrun, srun, Kubernetes, hasten --processes --environment--> Place

Nothing here needs torch: the command asks before it loads anything.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from hasten.core.errors import UsageError

_SLURM_PORT = 20_000  # ports from here on, by the number of the job


@dataclass(frozen=True)
class Place:
    """Where this process stands, from its environment.

    Attributes:
        rank: among all processes.
        size: how many there are.
        local_rank: among those of this host.
        local_size: how many of them are on this host.
        address: host of rank 0.
        port: on which rank 0 listens.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    address: str
    port: int


def find_place(environment: Mapping[str, str] = os.environ) -> Place | None:
    """Returns where this process stands among those that were started together.

    The variables are those of torchrun, which Kubernetes' training operator sets as well, or
    those that srun gives each task of a step. None where there are none: one process alone.

    Raises:
        UsageError: variables are missing or contradict each other.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment:
        names = {
            "rank": "RANK",
            "size": "WORLD_SIZE",
            "local_rank": "LOCAL_RANK",
            "local_size": "LOCAL_WORLD_SIZE",
            "port": "MASTER_PORT",
        }
        defaults = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_PORT": "29500"}
        address = environment.get("MASTER_ADDR", "127.0.0.1")
    elif int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        names = {
            "rank": "SLURM_PROCID",
            "size": "SLURM_STEP_NUM_TASKS",
            "local_rank": "SLURM_LOCALID",
            "local_size": "SLURM_STEP_TASKS_PER_NODE",
            "port": "MASTER_PORT",
        }
        job = int(environment.get("SLURM_JOB_ID", "0"))
        defaults = {"MASTER_PORT": str(_SLURM_PORT + job % 10_000)}
        nodes = environment.get("SLURM_STEP_NODELIST", "")
        address = environment.get("MASTER_ADDR") or first_node(nodes)
    else:
        return None
    values: dict[str, int] = {}
    for name, variable in names.items():
        text = environment.get(variable, defaults.get(variable))
        found = re.match(r"\d+", text or "")  # SLURM writes 4(x2) for two nodes of four
        if found is None:
            raise UsageError(
                f"the environment variable {variable} must be a number, not {text!r}: start the "
                "processes with torchrun, srun or --processes."
            )
        values[name] = int(found[0])
    if not values["rank"] < values["size"]:
        raise UsageError(f"rank {values['rank']} is none of {values['size']} processes.")
    return Place(address=address, **values)


def first_node(nodes: str) -> str:
    """Returns the first host of a list as SLURM writes it: gpu[03-07,9],login -> gpu03."""
    found = re.match(r"(?P<stem>[^\[,]+)(?:\[(?P<first>\d+))?", nodes)
    return "127.0.0.1" if found is None else found["stem"] + (found["first"] or "")
