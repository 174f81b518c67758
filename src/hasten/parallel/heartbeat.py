"""A sign of life of each process, so that one that hangs is found and named.

    process --a thread, once a second--> file RANK in a folder, with its number
    launcher --a thread--> no sign for too long -> SIGKILL, after which the others end as well

A process that waits for others in a collective still gives signs; one that was stopped does not.
One whose launcher has gone ends: nobody would watch it, and it would hold the run's lock.
That holds among the processes that ``hasten --processes`` has started on one machine.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hasten.core.errors import LostProcessError

FOLDER_VARIABLE = "HASTEN_HEARTBEAT"
_INTERVAL_SECONDS = 1.0
_LAUNCHER = os.getppid()


@contextmanager
def beating(rank: int) -> Iterator[None]:
    """Gives signs of life for the time of a ``with`` block, where somebody watches.

    Args:
        rank: of this process.
    """
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder is None:
        yield
        return
    path, ended = Path(folder) / str(rank), threading.Event()

    def beat() -> None:
        while not ended.wait(_INTERVAL_SECONDS):
            if _has_lost_launcher():
                os.write(2, f"hasten: {lost('another process', rank)}\n".encode())
                # At once: the main thread may wait for others in a collective.
                os._exit(LostProcessError.exit_code)
            _sign(path)

    _sign(path)
    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        path.unlink(missing_ok=True)


def lost(what: str, rank: int) -> LostProcessError:
    """Returns the error of a process that finds others gone.

    Args:
        what: seems to have gone: "rank 0", for example. The launcher is named instead where it
            has gone, since the store through which processes meet is lost with it.
        rank: of this process.
    """
    end = time.monotonic() + _INTERVAL_SECONDS
    # A killed process closes its connections a moment before it counts as gone.
    while not (has_gone := _has_lost_launcher()) and time.monotonic() < end:
        time.sleep(_INTERVAL_SECONDS / 20)
    return LostProcessError(
        f"rank {rank} has lost {'its launcher' if has_gone else what} and stops."
    )


@contextmanager
def watching(folder: Path, timeout_seconds: float) -> Iterator[dict[int, float]]:
    """Kills processes that give no sign of life any more, for the time of a ``with`` block.

    Args:
        folder: of their signs, which they find in the environment variable ``FOLDER_VARIABLE``.
        timeout_seconds: longest time between signs.

    Yields:
        Ranks that were killed, with the seconds since their last sign.
    """
    timeout_seconds = max(timeout_seconds, 3 * _INTERVAL_SECONDS)
    killed: dict[int, float] = {}
    ended = threading.Event()

    def watch() -> None:
        woken = time.time()
        while not ended.wait(_INTERVAL_SECONDS):
            # A machine that slept has stopped the watcher as well: everyone gets another chance.
            slept, woken = time.time() - woken > 5 * _INTERVAL_SECONDS, time.time()
            for path in () if slept else folder.iterdir():
                _check(path, timeout_seconds, killed)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield killed
    finally:
        ended.set()
        thread.join()


def _has_lost_launcher() -> bool:
    return FOLDER_VARIABLE in os.environ and os.getppid() != _LAUNCHER


def _sign(path: Path) -> None:
    path.write_text(str(os.getpid()), encoding="ascii")


def _check(path: Path, timeout_seconds: float, killed: dict[int, float]) -> None:
    try:
        silent = time.time() - path.stat().st_mtime
        if silent > timeout_seconds and (number := path.read_text(encoding="ascii")):
            path.unlink()
            os.kill(int(number), signal.SIGKILL)
            killed[int(path.name)] = silent
    except (FileNotFoundError, ProcessLookupError):
        pass  # it has ended in the meantime
