"""The processes of a run: who they are and what they tell each other.

    Place --join--> World

Objects travel as bytes between processes of one program; nothing of that is written to a file.
"""

# pyright: reportPrivateImportUsage=false
# The stores have no other public name as of torch 2.13.

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from hasten.core.errors import HastenError, MachineError, UsageError
from hasten.core.ranks import ALONE, Ranks
from hasten.parallel.heartbeat import lost
from hasten.parallel.layout import Layout, choose_layout
from hasten.parallel.place import Place, find_place

T = TypeVar("T")

# How far processes may fall behind each other. What one does for all may take longer: see on_main.
_TIMEOUT = timedelta(minutes=10)
_POLL_SECONDS = 0.02


class World(Ranks):
    """Several processes, joined.

    Args:
        place: of this one.
        layout: what each is for.
        device_type: cpu or cuda.

    Attributes:
        weights_mesh: axes ``pipeline``, ``replicate`` and ``shard``, whose processes have examples
            or rows of their own, and ``tensor``.
        rows_mesh: axes ``pipeline``, ``share`` (of a batch), ``context`` and ``tensor``.
    """

    def __init__(self, place: Place, layout: Layout, device_type: str) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        self.rank, self.size = place.rank, place.size
        self.place, self.layout = place, layout
        shares, context, tensor = layout.num_batch_shares, layout.context, layout.tensor
        # Processes with other examples or other rows are one axis for weights and gradients.
        self.weights_mesh = init_device_mesh(
            device_type,
            (layout.pipeline, layout.replicate, layout.shard * context, tensor),
            mesh_dim_names=("pipeline", "replicate", "shard", "tensor"),
        )
        self.rows_mesh = init_device_mesh(
            device_type,
            (layout.pipeline, shares, context, tensor),
            mesh_dim_names=("pipeline", "share", "context", "tensor"),
        )
        self._device = torch.device(device_type)
        self._store = torch.distributed.distributed_c10d._get_default_store()
        self._num_waits = 0
        main: list[Any] = [_process_table(), os.getpid()]
        torch.distributed.broadcast_object_list(main)
        # Processes of other hosts and containers cannot be looked at; the store tells of those.
        self._main_process = main[1] if main[0] == _process_table() else None

    @property
    def stage_size(self) -> int:
        """See ``Ranks.stage_size``."""
        return self.size // self.layout.pipeline

    @property
    def of_batch(self) -> Ranks:
        """See ``Ranks.of_batch``."""
        return _BatchRanks(self)

    @property
    def speaks_for_share(self) -> bool:
        """See ``Ranks.speaks_for_share``."""
        is_last_stage = self.rank // self.stage_size == self.layout.pipeline - 1
        return is_last_stage and self.rank % (self.layout.context * self.layout.tensor) == 0

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

    def collect(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """See ``Ranks.collect``."""
        is_first = self.rank % self.stage_size == 0
        facts = {name: (t.shape, t.dtype) for name, t in tensors.items()} if is_first else {}
        collected = dict(tensors) if self.is_main else {}
        seen: set[str] = set()
        for rank, held in enumerate(self.gather(facts)):
            for name in sorted(held.keys() - seen):
                if rank and rank == self.rank:
                    torch.distributed.send(tensors[name], dst=0)
                elif rank and self.is_main:
                    collected[name] = torch.empty(held[name][0], dtype=held[name][1])
                    torch.distributed.recv(collected[name], src=rank)
            seen |= held.keys()
        return collected

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
            while not self._is_set(key):
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

    def _is_set(self, key: str) -> bool:
        """Looks whether rank 0 has set a key of the store.

        Raises:
            LostProcessError: rank 0 has gone, or the store with it.
        """
        try:
            if self._main_process is not None:
                os.kill(self._main_process, 0)
            return self._store.check([key])
        except (ProcessLookupError, RuntimeError):
            raise lost("rank 0", self.rank) from None


class _BatchRanks(Ranks):
    """Processes numbered by the share of a batch that they have."""

    def __init__(self, world: World) -> None:
        self._world = world
        layout = world.layout
        self.rank = world.rank % world.stage_size // (layout.context * layout.tensor)
        self.size = layout.num_batch_shares

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes files and speaks."""
        return self._world.is_main

    def gather(self, value: T) -> list[T]:
        """Returns one value for each share, in their order, on all processes."""
        found = self._world.gather((self._world.speaks_for_share, value))
        return [one for counts, one in found if counts]

    def sum(self, tensor: Tensor) -> Tensor:
        """Returns the sum of one tensor for each share, on all processes."""
        return self._world.sum(tensor if self._world.speaks_for_share else tensor * 0)

    def any(self, values: Sequence[bool]) -> list[bool]:
        """Returns for each value whether it is true on some process."""
        return self._world.any(values)

    def on_main(self, work: Callable[[], T]) -> T:
        """See ``Ranks.on_main``."""
        return self._world.on_main(work)


def _process_table() -> tuple[str, str]:
    """Returns what two processes have in common that can look at each other."""
    namespace = Path("/proc/self/ns/pid")  # containers may share a host's name
    return socket.gethostname(), str(namespace.readlink()) if namespace.is_symlink() else ""


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
