"""What processes that were started together have to have in common before they begin.

    facts of each --store--> rank 0 --disagreement--> go on | one line that names who differs
    data files of each host -------'

Facts travel through the store alone, as JSON: processes of other versions may not understand each
other's collectives, and one that never comes is named.
"""

# pyright: reportPrivateImportUsage=false
# The stores have no other public name as of torch 2.13.

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from itertools import groupby, pairwise
from typing import Any

import torch

from hasten.core.errors import HastenError, MachineError, UsageError
from hasten.parallel.place import Place

JOIN_SECONDS = 300.0
"""How long processes wait for each other to come: hosts of a cluster start at their own pace."""
TIMEOUT = timedelta(minutes=10)
"""How far processes may fall behind each other, once they have joined."""
_ANSWER_SECONDS = 20.0
_POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Facts:
    """What a process says of itself.

    Attributes:
        host: that it runs on.
        hasten: its version.
        torch: its version.
        python: its version, major and minor.
        layout: as it was asked for.
        device: cpu or cuda.
    """

    host: str
    hasten: str
    torch: str
    python: str
    layout: str
    device: str


def disagreement(facts: Sequence[Facts]) -> HastenError | None:
    """Returns what processes differ in that they must have in common; None where they agree.

    Args:
        facts: of all processes, in the order of ranks.
    """
    hosts = [one.host for one in facts]
    for name in ("hasten", "torch", "python"):
        versions = [f"{name} {getattr(one, name)}" for one in facts]
        if len(set(versions)) > 1:
            return MachineError(
                f"the processes run different versions: {by_value(versions, hosts)}. Install the "
                "same on all hosts."
            )
    for name, flag in (("device", "--device"), ("layout", "--parallel")):
        values = [f"{flag} {getattr(one, name)}" for one in facts]
        if len(set(values)) > 1:
            return UsageError(
                f"the processes were started differently: {by_value(values, hosts)}. Give all the "
                "same command."
            )
    return None


def by_value(values: Sequence[str], hosts: Sequence[str]) -> str:
    """Returns who has which value: ``torch 2.13 (ranks 0-3 on a), torch 2.11 (rank 4 on b)``.

    Args:
        values: one for each rank.
        hosts: the same.
    """
    first = dict.fromkeys(values)
    return ", ".join(
        f"{value} ({named([r for r, own in enumerate(values) if own == value], hosts)})"
        for value in first
    )


def named(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """Returns some ranks and their hosts as a person writes them: ``ranks 0-2, 5 on a``.

    Args:
        ranks: in ascending order.
        hosts: of all ranks.
    """
    parts: list[str] = []
    for host, group in groupby(ranks, lambda rank: hosts[rank]):
        some = list(group)
        starts = [some[0], *(b for a, b in pairwise(some) if b > a + 1)]
        ends = [*(a for a, b in pairwise(some) if b > a + 1), some[-1]]
        spans = [str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True)]
        parts.append(f"rank{'s' * (len(some) > 1)} {', '.join(spans)} on {host}")
    return ", ".join(parts)


def open_store(place: Place) -> torch.distributed.Store:
    """Connects to where the processes find each other.

    torchrun keeps its own for all attempts, and what an earlier attempt left there would lead to
    processes that have gone.

    Raises:
        MachineError: rank 0 cannot be reached, or its port is taken.
    """
    is_own = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    is_master = is_own and place.rank == 0
    if not is_master:
        _wait_for_listener(place)
    found: list[torch.distributed.Store | Exception] = []

    def connect() -> None:
        try:
            found.append(
                torch.distributed.TCPStore(
                    place.address, place.port, place.size, is_master, TIMEOUT, False
                )
            )
        except (RuntimeError, OSError, ValueError) as error:
            found.append(error)

    # A program of another kind that listens there may never answer, and torch would wait for ever.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(_ANSWER_SECONDS)
    if not found:
        raise cannot_join(place, "what listens there is no run of hasten")
    if isinstance(found[0], Exception):
        if is_master and "EADDRINUSE" in str(found[0]):
            raise MachineError(
                f"port {place.port}, on which rank 0 on {socket.gethostname()} is to listen, is in "
                f"use by another program: set MASTER_PORT to a free one, such as {_free_port()}, "
                "for all processes."
            )
        raise cannot_join(place, str(found[0]).splitlines()[0]) from found[0]
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return torch.distributed.PrefixStore(f"hasten/attempt {attempt}", found[0])


def meet(
    store: torch.distributed.Store,
    place: Place,
    own: Facts,
    check: Callable[[], object],
) -> list[str]:
    """Waits until all processes have come and agree; returns their hosts, in the order of ranks.

    Args:
        store: that all of them have.
        place: of this process.
        own: facts of this process.
        check: raises where the processes, once they agree, are not what was asked for.

    Raises:
        MachineError: some did not come in time, or run other versions.
        UsageError: they were started differently.
        SystemExit: so it is, and rank 0 says it.
    """
    text = json.dumps({**asdict(own), "process": os.getpid()})
    if store.compare_set(f"facts/{place.rank}", "", text).decode() != text:
        raise cannot_join(place, f"another process is rank {place.rank} there already")
    if place.rank:
        end = time.monotonic() + JOIN_SECONDS + _ANSWER_SECONDS
        while not store.check(["verdict"]) and time.monotonic() < end:
            time.sleep(_POLL_SECONDS)
        if not store.check(["verdict"]):
            raise cannot_join(place, "rank 0 does not answer")
        verdict = json.loads(store.get("verdict"))
        store.add("heard", 1)
        if verdict["exit_code"]:
            raise SystemExit(verdict["exit_code"])
        return verdict["hosts"]
    facts, error = _collect(store, place, check)
    code = 0 if error is None else error.exit_code
    store.set("verdict", json.dumps({"hosts": [one.host for one in facts], "exit_code": code}))
    if error is not None:
        # The store goes with this process; the others are to hear of it first.
        end = time.monotonic() + _ANSWER_SECONDS
        while store.add("heard", 0) < len(facts) - 1 and time.monotonic() < end:
            time.sleep(_POLL_SECONDS)
        raise error
    return [one.host for one in facts]


def _collect(
    store: torch.distributed.Store, place: Place, check: Callable[[], object]
) -> tuple[list[Facts], HastenError | None]:
    """Returns the facts of all that have come, and what keeps them from beginning."""
    missing = list(range(place.size))
    end = time.monotonic() + JOIN_SECONDS
    while missing and time.monotonic() < end:
        missing = [rank for rank in missing if not store.check([f"facts/{rank}"])]
        time.sleep(_POLL_SECONDS * bool(missing))
    come = [rank for rank in range(place.size) if rank not in missing]
    told = [json.loads(store.get(f"facts/{rank}")) for rank in come]
    names = Facts.__dataclass_fields__  # another version may tell less, or more
    facts = [Facts(**{name: one.get(name, "") for name in names}) for one in told]
    if missing:
        spans = named(missing, [""] * place.size).removesuffix(" on ")
        return facts, MachineError(
            f"{spans} of {place.size} did not join within {JOIN_SECONDS:.0f} s: were all started, "
            f"and can they reach {place.address}:{place.port}?"
        )
    error = disagreement(facts)
    if error is None:
        try:
            check()
        except HastenError as refused:
            error = refused
    return facts, error


def unequal_files(found: Sequence[Mapping[str, Any]], hosts: Sequence[str]) -> str | None:
    """Returns which file is not the same on all hosts, and where; None where all are.

    Args:
        found: what each rank has of each file, by path: anything that differs where the files do,
            None where there is none. A rank that did not look has nothing.
        hosts: of all ranks.
    """
    for path, wanted in found[0].items():
        for own in found:
            if own.get(path, wanted) != wanted:
                alike = [r for r, other in enumerate(found) if other.get(path, wanted) == own[path]]
                where = named(alike, hosts)
                if own[path] is None:
                    return f"{path} is not there for {where}"
                return f"{path} is another file for {where} than for rank 0 on {hosts[0]}"
    return None


def _wait_for_listener(place: Place) -> None:
    """Waits until somebody listens where rank 0 should; torch would write pages while it waits."""
    end = time.monotonic() + JOIN_SECONDS
    while True:
        try:
            socket.create_connection((place.address, place.port), timeout=10).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise cannot_join(place, error.strerror or str(error)) from error
            time.sleep(0.1)


def cannot_join(place: Place, why: str) -> MachineError:
    """Returns the error of a process that cannot come to the others."""
    return MachineError(
        f"rank {place.rank} on {socket.gethostname()} cannot join the run at "
        f"{place.address}:{place.port} (MASTER_ADDR and MASTER_PORT): {why}."
    )


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("", 0))
        return one.getsockname()[1]
