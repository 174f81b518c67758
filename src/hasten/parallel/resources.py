"""What the processes of a run have: memory, and connections, measured in under a second.

    each process --free memory, all-reduce of a few MB; the least counts--> Resources

Of one host all processes take part; of several, those of each host among themselves as well. An
all-reduce of b bytes among n processes sends 2 b (n - 1) / n from each (see ``traffic``): of a few
bytes it takes the latency, and what more it takes for many gives their rate.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from hasten.parallel.world import World

_SMALL, _MIDDLE, _LARGE = 64, 256 << 10, 4 << 20
_ROUNDS = 3
_LARGE_SECONDS = 0.1
"""Longest that one large all-reduce may take; on a slower connection a smaller one tells enough."""


@dataclass(frozen=True)
class Link:
    """A connection as a collective finds it.

    Attributes:
        bytes_per_second: that each process sends.
        latency_seconds: of a collective of a few bytes.
    """

    bytes_per_second: float
    latency_seconds: float


@dataclass(frozen=True)
class Resources:
    """What the processes of a run have.

    Attributes:
        memory_bytes: free for each process, of the one that has least.
        local_size: processes of each host.
        within: connection between those of one host.
        across: connection between hosts; the same where there is one.
        is_measured: whether the connections are; else they are assumed.
    """

    memory_bytes: int
    local_size: int
    within: Link
    across: Link
    is_measured: bool = True


_ASSUMED = Link(1e9, 1e-4)


def assumed_resources(num_processes: int, device: torch.device) -> Resources:
    """Returns what processes of this host would have, before they are started."""
    memory = available_memory(device, num_processes)
    return Resources(memory, num_processes, _ASSUMED, _ASSUMED, is_measured=False)


def measure_resources(world: World, device: torch.device) -> Resources:
    """Returns what the processes have, the same on all of them; all at once.

    Args:
        world: the processes.
        device: of this one.
    """
    sizes = [len(list(group)) for _, group in groupby(world.hosts)]
    local_size = math.gcd(*sizes)  # hosts of different sizes: what each axis can count on
    own = available_memory(device, world.hosts.count(world.hosts[world.rank]))
    across = _measure_link(device, None, world.size)
    within = across
    if len(sizes) > 1 and local_size > 1:
        within = _measure_link(device, _group_of_neighbours(world, local_size), local_size)
    return Resources(min(world.gather(own)), local_size, within, across)


def _group_of_neighbours(world: World, local_size: int) -> Any:
    """Returns the group of the processes of this host; all make all groups."""
    own = None
    for start in range(0, world.size, local_size):
        ranks = list(range(start, start + local_size))
        group = torch.distributed.new_group(ranks)
        own = group if world.rank in ranks else own
    return own


def _measure_link(device: torch.device, group: Any, num_processes: int) -> Link:
    _time_all_reduce(_SMALL, device, group, rounds=1)  # the first one connects
    latency = _time_all_reduce(_SMALL, device, group)
    size = _MIDDLE
    seconds = _time_all_reduce(size, device, group, rounds=1)
    if seconds * _LARGE / _MIDDLE < _LARGE_SECONDS:
        size = _LARGE
        seconds = _time_all_reduce(size, device, group)
    sent = 2 * size * (num_processes - 1) / num_processes
    return Link(sent / max(seconds - latency, seconds / 10), latency)


def _time_all_reduce(
    num_bytes: int, device: torch.device, group: Any, rounds: int = _ROUNDS
) -> float:
    """Returns seconds of the shortest of some rounds, in the process where that is longest."""
    tensor = torch.zeros(num_bytes // 4, device=device)
    least = math.inf
    for _ in range(rounds):
        start = time.perf_counter()
        torch.distributed.all_reduce(tensor, group=group)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        least = min(least, time.perf_counter() - start)
    slowest = torch.tensor([least], dtype=torch.float64, device=device)
    torch.distributed.all_reduce(slowest, torch.distributed.ReduceOp.MAX)
    return float(slowest)


def available_memory(device: torch.device, num_local: int) -> int:
    """Returns the bytes that a process may still take.

    Args:
        device: of the process: a GPU of its own, or the CPU, whose memory all share.
        num_local: processes of this host.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min([_free_of_host(), *_free_of_groups()]) // num_local


def _free_of_host() -> int:
    """Returns free bytes as Linux counts them; elsewhere all that there are."""
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file() and (found := re.search(r"MemAvailable:\s+(\d+)", meminfo.read_text())):
        return int(found[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _free_of_groups(
    root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> list[int]:
    """Returns what limits of containers and batch systems leave, where there are any.

    Files that are mapped or cached count as used there, but give way.

    Args:
        root: where control groups are mounted, of version 2 or 1.
        own: file that names those of this process.
    """
    if not own.is_file():
        return []
    paths = dict.fromkeys(
        line.split(":", 2)[2].strip("/")
        for line in own.read_text().splitlines()
        if line.split(":", 2)[1] in ("", "memory")
    )
    free: list[int] = []
    for path in paths:
        parts = [part for part in path.split("/") if part]
        for depth in range(len(parts) + 1):
            inner = Path(*parts[:depth])
            free += _left(root / inner, ("memory.max", "memory.current", "inactive_file"))
            version_1 = ("limit_in_bytes", "usage_in_bytes")
            names = [f"memory.{name}" for name in version_1]
            free += _left(root / "memory" / inner, (*names, "total_inactive_file"))
    return free


def _left(folder: Path, names: Sequence[str]) -> list[int]:
    limit, used, cached = names
    try:
        most = (folder / limit).read_text().strip()
        if most == "max":
            return []
        found = re.search(rf"^{cached} (\d+)", (folder / "memory.stat").read_text(), re.MULTILINE)
        taken = int((folder / used).read_text()) - (int(found[1]) if found else 0)
        return [max(0, int(most) - taken)]
    except (OSError, ValueError):
        return []
