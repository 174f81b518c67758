"""The processes of a run: who they are and what they tell each other.

    torchrun, srun, Kubernetes, hasten --processes --environment--> Place --join--> World

Objects travel as bytes between processes of one program; nothing of that is written to a file.
"""

# pyright: reportPrivateImportUsage=false
# The stores have no other public name as of torch 2.13.

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from hasten.core.errors import HastenError, LostProcessError, MachineError, UsageError
from hasten.core.ranks import ALONE, Ranks
from hasten.parallel.layout import Layout, choose_layout

T = TypeVar("T")

# How far processes may fall behind each other. What one does for all may take longer: see on_main.
_TIMEOUT = timedelta(minutes=10)
_POLL_SECONDS = 0.02
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


class World(Ranks):
    """Several processes, joined.

    Args:
        place: of this one.
        layout: what each is for.
        device_type: cpu or cuda.
    """

    def __init__(self, place: Place, layout: Layout, device_type: str) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        self.rank, self.size = place.rank, place.size
        self.place, self.layout = place, layout
        self.mesh = init_device_mesh(
            device_type, (layout.replicate, layout.shard), mesh_dim_names=("replicate", "shard")
        )
        self._device = torch.device(device_type)
        self._store = torch.distributed.distributed_c10d._get_default_store()
        self._num_waits = 0
        main: list[Any] = [socket.gethostname(), os.getpid()]
        torch.distributed.broadcast_object_list(main)
        # Processes of other hosts cannot be looked at; whoever started them ends the waiting.
        self._main_process = main[1] if main[0] == socket.gethostname() else None

    def sum(self, tensor: Tensor) -> Tensor:
        """Returns the sum of every process's tensor, on all of them."""
        total = tensor.clone()
        torch.distributed.all_reduce(total)
        return total

    def gather(self, value: T) -> list[T]:
        """Returns every process's value, in the order of ranks, on all of them."""
        found: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(found, value)
        return found

    def any(self, values: Sequence[bool]) -> list[bool]:
        """Returns for each value whether it is true on some process."""
        counts = torch.tensor(values, dtype=torch.int32, device=self._device)
        torch.distributed.all_reduce(counts)
        return [count > 0 for count in counts.tolist()]

    def on_main(self, work: Callable[[], T]) -> T:
        """Returns on all processes what ``work`` returns on rank 0; see ``Ranks.on_main``."""
        told: list[Any] = [None, 1]
        self._num_waits += 1
        key = f"hasten/on_main/{self._num_waits}"
        if not self.is_main:
            # However long it takes to prepare data: a collective has a limit.
            while not self._store.check([key]):
                self._check_main()
                time.sleep(_POLL_SECONDS)
            torch.distributed.broadcast_object_list(told)
            if told[1]:
                raise SystemExit(told[1])
            return told[0]
        try:
            told = [work(), 0]
        except BaseException as error:
            told = [None, error.exit_code if isinstance(error, HastenError) else 1]
            raise
        finally:
            self._store.set(key, "1")
            torch.distributed.broadcast_object_list(told)
        return told[0]

    def _check_main(self) -> None:
        """Ends the waiting for rank 0 where it has gone."""
        if self._main_process is None:
            return
        try:
            os.kill(self._main_process, 0)
        except ProcessLookupError:
            raise LostProcessError(
                f"rank {self.rank} has lost rank 0 (process {self._main_process}) and stops."
            ) from None


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


def _open_store(place: Place) -> torch.distributed.Store:
    """Connects to where the processes find each other.

    torchrun keeps its own for all attempts, and what an earlier attempt left there would lead to
    processes that have gone.
    """
    is_own = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = torch.distributed.TCPStore(
        place.address,
        place.port,
        place.size,
        is_master=is_own and place.rank == 0,
        timeout=_TIMEOUT,
    )
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return torch.distributed.PrefixStore(f"hasten/attempt {attempt}", store)


@contextmanager
def joined(layout: str, num_processes: int | None, device_type: str) -> Iterator[Ranks]:
    """Joins the processes that were started together, for the time of a ``with`` block.

    Args:
        layout: as for ``choose_layout``.
        num_processes: how many were asked for; None where that was left open.
        device_type: cpu or cuda.

    Raises:
        UsageError: the layout does not fit the processes, or these are not those asked for.
        MachineError: rank 0 cannot be reached, or its port is taken.
    """
    place = find_place()
    if place is None or place.size == 1:
        choose_layout(layout, 1)
        yield ALONE
        return
    if num_processes not in (None, place.size):
        raise UsageError(
            f"--processes {num_processes}, but {place.size} processes were started together: "
            "leave it out under torchrun or srun."
        )
    chosen = choose_layout(layout, place.size)
    if device_type == "cuda":
        torch.cuda.set_device(place.local_rank)
    try:
        torch.distributed.init_process_group(
            "gloo" if device_type == "cpu" else "cpu:gloo,cuda:nccl",
            store=_open_store(place),
            rank=place.rank,
            world_size=place.size,
            timeout=_TIMEOUT,
        )
    except (RuntimeError, OSError) as error:
        raise MachineError(
            f"rank {place.rank} on {socket.gethostname()} cannot join the run at "
            f"{place.address}:{place.port}: {str(error).splitlines()[0]}"
        ) from error
    try:
        yield World(place, chosen, device_type)
    finally:
        torch.distributed.destroy_process_group()
