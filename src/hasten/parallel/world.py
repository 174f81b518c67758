"""The processes of a run: who they are and what they tell each other.

    Place --join--> World

Objects travel as bytes between processes of one program; nothing of that is written to a file.
"""

# pyright: reportPrivateImportUsage=false
# The stores have no other public name as of torch 2.13.

from __future__ import annotations

import json
import os
import platform
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from hasten import __version__
from hasten.core.errors import HastenError, UsageError
from hasten.core.ranks import ALONE, Ranks
from hasten.parallel.agreement import TIMEOUT, Facts, cannot_join, meet, open_store
from hasten.parallel.heartbeat import lost
from hasten.parallel.hosts import CLOSED, prepare, watched
from hasten.parallel.layout import Layout, choose_layout
from hasten.parallel.place import Place, find_place

T = TypeVar("T")

_POLL_SECONDS = 0.02


class World(Ranks):
    """Several processes, joined.

    Args:
        place: of this one.
        layout: what each is for.
        device_type: cpu or cuda.
        hosts: of all of them, in the order of ranks.

    Attributes:
        weights_mesh: axes ``pipeline``, ``replicate`` and ``shard``, whose processes have examples
            or rows of their own, and ``tensor``.
        rows_mesh: axes ``pipeline``, ``share`` (of a batch), ``context`` and ``tensor``.
    """

    def __init__(
        self, place: Place, layout: Layout, device_type: str, hosts: Sequence[str]
    ) -> None:
        self.rank, self.size = place.rank, place.size
        self.place, self.hosts = place, hosts
        self._device = torch.device(device_type)
        self.arrange(layout)
        self._store = torch.distributed.distributed_c10d._get_default_store()
        self._num_waits = 0
        main: list[Any] = [_process_table(), os.getpid()]
        torch.distributed.broadcast_object_list(main)
        # Processes of other hosts and containers cannot be looked at; the store tells of those.
        self._main_process = main[1] if main[0] == _process_table() else None

    def arrange(self, layout: Layout) -> None:
        """Gives all processes, at once, what each is for."""
        from torch.distributed.device_mesh import init_device_mesh

        self.layout = layout
        shares, context, tensor = layout.num_batch_shares, layout.context, layout.tensor
        # Processes with other examples or other rows are one axis for weights and gradients.
        self.weights_mesh = init_device_mesh(
            self._device.type,
            (layout.pipeline, layout.replicate, layout.shard * context, tensor),
            mesh_dim_names=("pipeline", "replicate", "shard", "tensor"),
        )
        self.rows_mesh = init_device_mesh(
            self._device.type,
            (layout.pipeline, shares, context, tensor),
            mesh_dim_names=("pipeline", "share", "context", "tensor"),
        )
        for mesh in (self.weights_mesh, self.rows_mesh):
            for group in mesh.get_all_groups():  # which would wait for half an hour
                torch.distributed.distributed_c10d._set_pg_timeout(TIMEOUT, group)

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

    def assemble(self, value: T) -> list[T]:
        """As ``gather``, for values that some have long before others.

        Args:
            value: as JSON can hold it.
        """
        self._num_waits += 1
        keys = [f"hasten/assemble/{self._num_waits}/{rank}" for rank in range(self.size)]
        self._store.set(keys[self.rank], json.dumps(value))

        def collect() -> list[T]:
            for key in keys:
                while not self._store.check([key]):
                    time.sleep(_POLL_SECONDS)
            return [json.loads(self._store.get(key)) for key in keys]

        return self.on_main(collect)

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


@contextmanager
def joined(
    layout: str, num_processes: int | None, device_type: str, timeout_seconds: float = 20.0
) -> Iterator[Ranks]:
    """Joins the processes that were started together, for the time of a ``with`` block.

    Args:
        layout: as for ``choose_layout``.
        num_processes: how many were asked for; None where that was left open.
        device_type: cpu or cuda.
        timeout_seconds: longest time without a sign of life of another process.

    Raises:
        UsageError: the layout does not fit the processes, these are not those asked for, or they
            were started differently.
        MachineError: rank 0 cannot be reached, its port is taken, or versions differ.
        LostProcessError: another process has gone.
        SystemExit: rank 0 says why.
    """
    place = find_place()
    if place is None or place.size == 1:
        choose_layout(layout, 1)
        yield ALONE
        return
    own = Facts(
        host=socket.gethostname(),
        hasten=__version__,
        torch=torch.__version__,
        python=".".join(platform.python_version_tuple()[:2]),
        layout=layout,
        device=device_type,
    )
    store = open_store(place)
    try:
        prepare(store, place.rank)
        hosts = meet(store, place, own, lambda: _check_number(place.size, layout, num_processes))
    except RuntimeError as error:
        raise lost("rank 0", place.rank) from error
    if device_type == "cuda":
        torch.cuda.set_device(place.local_rank)
    with watched(store, place.rank, hosts, timeout_seconds):
        try:
            _begin(place, store, device_type)
            yield World(place, choose_layout(layout, place.size), device_type, hosts)
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()


def _begin(place: Place, store: torch.distributed.Store, device_type: str) -> None:
    """Makes the group of all processes.

    Raises:
        MachineError: there is no way between them.
    """
    try:
        torch.distributed.init_process_group(
            "gloo" if device_type == "cpu" else "cpu:gloo,cuda:nccl",
            store=store,
            rank=place.rank,
            world_size=place.size,
            timeout=TIMEOUT,
        )
    except (RuntimeError, OSError) as error:
        if CLOSED.search(str(error)):
            raise  # it is another that has gone
        raise cannot_join(place, str(error).splitlines()[0]) from error


def _check_number(size: int, layout: str, wanted: int | None) -> None:
    """Refuses another number of processes than was asked for.

    Raises:
        UsageError: saying what would fit.
    """
    if wanted not in (None, size):
        raise UsageError(
            f"--processes {wanted}, but {size} processes were started together: leave it out under "
            "torchrun or srun."
        )
    choose_layout(layout, size)
