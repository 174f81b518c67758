"""What processes have to have in common, and what becomes of those that differ or never come."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hasten.core.errors import HastenError, MachineError, UsageError
from hasten.parallel import agreement
from hasten.parallel.agreement import Facts, disagreement, meet, named, open_store, unequal_files
from hasten.parallel.place import Place

OWN = Facts("a", "1.0", "2.13.0", "3.11", "auto", "cpu")


def facts(*changes: dict[str, str]) -> list[Facts]:
    """Returns facts of processes, each of which differs from the first in something."""
    return [Facts(**{**vars(OWN), **change}) for change in changes]


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        (
            [{}, {}, {"host": "b", "torch": "2.11.0"}],
            8,
            "torch 2.13.0 (ranks 0-1 on a), torch 2.11.0 (rank 2 on b). Install the same",
        ),
        ([{}, {"hasten": "0.9"}], 8, "hasten 1.0 (rank 0 on a), hasten 0.9 (rank 1 on a)"),
        ([{}, {"python": "3.13"}], 8, "python 3.11 (rank 0 on a), python 3.13 (rank 1 on a)"),
        ([{}, {"device": "cuda"}], 2, "--device cpu (rank 0 on a), --device cuda (rank 1 on a)"),
        ([{}, {"layout": "shard=2"}], 2, "--parallel auto (rank 0 on a), --parallel shard=2"),
    ],
)
def test_processes_that_differ_are_named(changes: Any, code: int, message: str):
    error = disagreement(facts(*changes))
    assert error is not None and error.exit_code == code and message in str(error)
    assert disagreement(facts({}, {"host": "b"})) is None


@given(st.lists(st.sampled_from("ab"), min_size=1, max_size=12), st.data())
def test_ranks_are_named_completely_and_in_order(hosts: list[str], data: st.DataObject):
    ranks = sorted(data.draw(st.sets(st.integers(0, len(hosts) - 1), min_size=1)))
    found: list[tuple[int, str]] = []
    for part in named(ranks, hosts).replace("ranks ", "rank ").split("rank ")[1:]:
        spans, _, host = part.rstrip(", ").partition(" on ")
        for span in spans.split(", "):
            first, _, last = span.partition("-")
            found += [(rank, host) for rank in range(int(first), int(last or first) + 1)]
    assert found == [(rank, hosts[rank]) for rank in ranks]


@pytest.mark.parametrize(
    ("own", "found"),
    [
        ({"x": "1", "y": "2"}, None),
        ({}, None),  # one that did not look
        ({"x": "1", "y": "3"}, "y is another file for rank 1 on b than for rank 0 on a"),
        ({"x": None, "y": "3"}, "x is not there for rank 1 on b"),
    ],
)
def test_files_that_differ_are_named(own: dict[str, str | None], found: str | None):
    assert unequal_files([{"x": "1", "y": "2"}, own], ["a", "b"]) == found


def meet_all(size: int, check: Any = lambda: None) -> list[Any]:
    """Returns what each rank gets when some processes meet: their hosts, or an error."""
    store, got = torch.distributed.HashStore(), [None] * 2

    def run(rank: int) -> None:
        try:
            got[rank] = meet(store, Place(rank, size, 0, 1, "a", 1), OWN, check)  # type: ignore[call-overload]
        except (HastenError, SystemExit) as error:
            got[rank] = error  # type: ignore[call-overload]

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return got


def test_processes_meet_and_rank_0_speaks_for_all(monkeypatch: pytest.MonkeyPatch):
    assert meet_all(2) == [["a", "a"], ["a", "a"]]

    def refuse() -> None:
        raise UsageError("not like this")

    first, second = meet_all(2, refuse)
    assert str(first) == "not like this" and (type(second), second.code) == (SystemExit, 2)
    monkeypatch.setattr(agreement, "JOIN_SECONDS", 0.2)
    first, second = meet_all(4)
    assert "ranks 2-3 of 4 did not join within" in str(first) and second.code == 8


def test_two_processes_of_one_rank_are_refused(monkeypatch: pytest.MonkeyPatch):
    store, place = torch.distributed.HashStore(), Place(0, 1, 0, 1, "a", 1)
    meet(store, place, OWN, lambda: None)
    pid = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: pid + 1)
    with pytest.raises(MachineError, match="another process is rank 0 there already"):
        meet(store, place, OWN, lambda: None)


@pytest.fixture
def taken() -> Iterator[int]:
    """A port on which a program listens that never answers."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        one.listen()
        yield one.getsockname()[1]


def test_a_port_in_use_is_refused_by_all(taken: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(agreement, "_ANSWER_SECONDS", 0.5)
    with pytest.raises(MachineError, match=f"port {taken}, .* in use .*set MASTER_PORT to a free"):
        open_store(Place(0, 2, 0, 1, "127.0.0.1", taken))
    with pytest.raises(MachineError, match="what listens there is no run of hasten"):
        open_store(Place(1, 2, 0, 1, "127.0.0.1", taken))


def test_a_host_that_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(agreement, "JOIN_SECONDS", 0.0)
    with pytest.raises(MachineError, match=r"rank 1 on .* cannot join the run at .*:9 .*refused"):
        open_store(Place(1, 2, 0, 1, "127.0.0.1", 9))
