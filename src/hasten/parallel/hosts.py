"""Signs of life among processes that no launcher of ours watches: of torchrun, srun, several hosts.

    each process --a thread, once a second--> its count, in the store of rank 0 (or of torchrun)
    rank 0       --reads the counts of all--> one stands still for too long: it is named, all end
    the others   --read that of rank 0------> it stands still, or the store is silent: they end

A link that is cut closes no connection: whoever waits for others would wait for the time limit of
collectives. The thread ends the process at once, since the main thread may not be able to.
"""

# pyright: reportPrivateImportUsage=false
# The stores have no other public name as of torch 2.13.

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import torch

from hasten.core.errors import DivergenceError, HastenError, LostProcessError
from hasten.parallel.agreement import TIMEOUT
from hasten.parallel.heartbeat import is_watched, lost

_INTERVAL_SECONDS = 1.0
_POLL_SECONDS = 0.02
_SLEEP_SECONDS = 5 * _INTERVAL_SECONDS
_LEFT = b"left"
# What gloo, NCCL and the store say when the other end of a connection has gone.
CLOSED = re.compile(r"Connection (closed|reset|refused)|Broken pipe|failed to (recv|send)", re.I)
_LOST = re.compile(rf"gloo|NCCL|TCPStore|{CLOSED.pattern}", re.I)


class Watch:
    """The signs of life that a process gives and looks for.

    Args:
        store: that all processes have, prepared by ``prepare``.
        rank: of this process.
        hosts: of all processes, in the order of ranks.
        timeout_seconds: longest time without a sign of life.
    """

    def __init__(
        self,
        store: torch.distributed.Store,
        rank: int,
        hosts: Sequence[str],
        timeout_seconds: float,
    ) -> None:
        # A connection answers one question at a time. torch's stubs do not know of it (2.13).
        self._store: torch.distributed.Store = store.clone()  # pyright: ignore[reportAttributeAccessIssue]
        self._rank, self._hosts = rank, hosts
        self._timeout = max(timeout_seconds, 3 * _INTERVAL_SECONDS)
        self._watched = [0] if rank else list(range(1, len(hosts)))
        self._signs: dict[int, bytes] = {}
        self._since: dict[int, float] = {}
        self._answered = time.monotonic()
        self._ended = threading.Event()
        self._talking = threading.Thread(target=self._talk, daemon=True)
        self._talking.start()
        threading.Thread(target=self._judge, daemon=True).start()

    def leave(self, *, waits: bool) -> None:
        """Ends the signs of a process without a failure of its own.

        Args:
            waits: whether rank 0 waits until the others have left; its store may go with it.
        """
        if self._rank == 0:
            seconds = TIMEOUT.total_seconds() if waits else 2 * _INTERVAL_SECONDS
            end, keys = time.monotonic() + seconds, [_key(rank) for rank in self._watched]
            while time.monotonic() < end:
                if all(sign == _LEFT for sign in self._store.multi_get(keys)):
                    break
                time.sleep(_POLL_SECONDS)
        self._ended.set()
        self._talking.join()
        with suppress(RuntimeError):
            self._store.set(_key(self._rank), _LEFT.decode())

    def end(self, error: BaseException) -> None:
        """Ends the signs of a process that ends by an error, of which it tells the others.

        Args:
            error: its own, or one that all processes have agreed on.
        """
        agreed = (KeyboardInterrupt, SystemExit, DivergenceError, LostProcessError)
        if not isinstance(error, agreed) and not hasattr(error, "signal_number"):
            text = (
                str(error) if isinstance(error, HastenError) else f"{type(error).__name__}: {error}"
            )
            why = f"{self._name(self._rank)} failed: {text.partition(chr(10))[0]}"
            with suppress(RuntimeError):
                self._store.compare_set("lost", "", why)
        self.leave(waits=False)

    def find_lost(self) -> None:
        """Ends this process, whose connections have been closed, when it is known who has gone.

        Returns where nobody is found.
        """
        with suppress(RuntimeError):
            self._store.set("hurry", "yes")
        self._ended.wait(6 * _INTERVAL_SECONDS)

    def _talk(self) -> None:
        """Gives signs and looks for those of others, until the work has ended."""
        count, keys = 0, [*map(_key, self._watched), "lost", "hurry"]
        while not self._ended.is_set():
            count += 1
            try:
                self._store.set(_key(self._rank), str(count))
                *signs, why, hurry = self._store.multi_get(keys)
            except RuntimeError:
                if not self._ended.is_set():
                    self._end(f"{self._name(0)} cannot be reached any more")
                return
            self._answered = now = time.monotonic()
            if why:
                self._hear()
                self._end(why.decode() if self._rank == 0 else None)
            for rank, sign in zip(self._watched, signs, strict=True):
                silent = now - self._since.get(rank, now)
                if sign != self._signs.get(rank):
                    self._signs[rank], self._since[rank] = sign, now
                elif sign != _LEFT and silent > (3 * _INTERVAL_SECONDS if hurry else self._timeout):
                    self._lose(rank, silent)
            self._ended.wait(_INTERVAL_SECONDS)

    def _judge(self) -> None:
        """Ends the process where the store is silent, in which the other thread is stuck then."""
        woken = time.monotonic()
        while not self._ended.wait(_INTERVAL_SECONDS):
            now = time.monotonic()
            if now - woken > _SLEEP_SECONDS:  # this one was stopped: everyone gets another chance
                self._answered, self._since = now, {}
                self._signs = {}
            woken, silent = now, now - self._answered
            if silent > self._timeout:
                self._end(f"nothing was heard of {self._name(0)} for {silent:.0f} s")

    def _lose(self, rank: int, silent: float) -> None:
        why = f"{self._name(rank)} gave no sign of life for {silent:.0f} s"
        if self._rank == 0:
            with suppress(RuntimeError):
                self._store.compare_set("lost", "", why)
        self._hear()
        self._end(why)

    def _hear(self) -> None:
        """Gives the others time to hear of a loss: the store may go with rank 0."""
        if self._rank == 0:
            time.sleep(2 * _INTERVAL_SECONDS)  # they all look once a second

    def _end(self, why: str | None) -> None:
        """Ends the process; rank 0 speaks for all that hear of it."""
        if why is not None:
            who = "all others stop" if self._rank == 0 else f"{self._name(self._rank)} stops"
            os.write(2, f"hasten: {why}; {who}.\n".encode())
        os._exit(LostProcessError.exit_code)

    def _name(self, rank: int) -> str:
        return f"rank {rank} on {self._hosts[rank]}"


def prepare(store: torch.distributed.Store, rank: int) -> None:
    """Writes what watches look at, for each process before any of them begins to watch."""
    store.set(_key(rank), "")
    if rank == 0:
        store.set("lost", "")
        store.set("hurry", "")


@contextmanager
def watched(
    store: torch.distributed.Store, rank: int, hosts: Sequence[str], timeout_seconds: float
) -> Iterator[None]:
    """Watches the others for the time of a ``with`` block, unless a launcher does.

    A process that has lost others may end in it without unwinding, with the exit code of
    ``LostProcessError``.

    Args:
        store: as for ``Watch``.
        rank: of this process.
        hosts: of all processes.
        timeout_seconds: longest time without a sign of life.

    Raises:
        LostProcessError: in place of what torch says of connections that were closed.
    """
    watch = None if is_watched() else Watch(store, rank, hosts, timeout_seconds)
    try:
        yield
    except RuntimeError as error:
        if _LOST.search(str(error)):
            if watch is not None:
                watch.find_lost()
            raise lost("another process of the run", rank) from error
        if watch is not None:
            watch.end(error)
        raise
    except BaseException as error:
        if watch is not None:
            watch.end(error)
        raise
    if watch is not None:
        watch.leave(waits=True)


def _key(rank: int) -> str:
    return f"sign/{rank}"
