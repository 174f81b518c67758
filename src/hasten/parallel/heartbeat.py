"""A sign of life of each process, so that one that hangs is found and named.

    process --a thread, once a second--> touches the file RANK, which holds its number
    launcher --a thread--> no sign for too long -> SIGKILL, after which the others end as well
                           one has gone         -> those that cannot end are killed a little later

A process that waits for others in a collective still gives signs; one that was stopped does not.
One whose launcher has gone ends: nobody would watch it, and it would hold the run's lock.
That holds among the processes that ``hasten --processes`` has started on one machine; ``hosts``
is for others.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from hasten.core.errors import LostProcessError

FOLDER_VARIABLE = "HASTEN_HEARTBEAT"
SIGN_FIRST = ("/bin/sh", "-c", f'echo $$ > "${FOLDER_VARIABLE}/$RANK"; exec "$0" "$@"')
"""Before a command: signs once before Python starts, which may be stopped while it imports."""
_INTERVAL_SECONDS = 1.0
_GRACE_SECONDS = 5.0
_LAUNCHER = os.getppid()
_ORDERLY = (None, 0, 128 + signal.SIGINT, 128 + signal.SIGTERM)


@contextmanager
def beating() -> Iterator[None]:
    """Gives signs of life for the time of a ``with`` block, where somebody watches."""
    folder, rank = os.environ.get(FOLDER_VARIABLE), os.environ.get("RANK")
    if folder is None or rank is None:
        yield
        return
    path, ended = Path(folder) / rank, threading.Event()

    def beat() -> None:
        while not ended.wait(_INTERVAL_SECONDS):
            if _has_lost_launcher():
                os.write(2, f"hasten: {lost('another process', int(rank))}\n".encode())
                # At once: the main thread may wait for others in a collective.
                os._exit(LostProcessError.exit_code)
            with suppress(OSError):  # it has been given up
                os.utime(path)

    path.write_text(str(os.getpid()), encoding="ascii")
    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    except BaseException as error:
        # The sign of one that fails stays behind: the others have to end then.
        if not isinstance(error, SystemExit) or error.code in _ORDERLY:
            path.unlink(missing_ok=True)
        raise
    else:
        path.unlink(missing_ok=True)
    finally:
        ended.set()
        thread.join()


def is_watched() -> bool:
    """Returns whether the launcher watches this process."""
    return FOLDER_VARIABLE in os.environ


def tell_launcher(why: str) -> None:
    """Leaves word why this process fails, where somebody watches.

    Args:
        why: the error; its first line is kept.
    """
    if is_watched() and "RANK" in os.environ:
        path = Path(os.environ[FOLDER_VARIABLE]) / f"{os.environ['RANK']}.cause"
        with suppress(OSError):
            path.write_text(why.partition("\n")[0], encoding="utf-8")


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
        f"rank {rank} on {socket.gethostname()} has lost {'its launcher' if has_gone else what} "
        "and stops."
    )


@dataclass
class Watched:
    """What a watcher has done and seen.

    Attributes:
        hung: ranks that were killed because they gave no sign of life, and for how many seconds.
        stopped: ranks that were killed because others had gone and they did not end.
        causes: why ranks fail that could still say so.
    """

    hung: dict[int, float] = field(default_factory=dict[int, float])
    stopped: set[int] = field(default_factory=set[int])
    causes: dict[int, str] = field(default_factory=dict[int, str])


@contextmanager
def watching(folder: Path, timeout_seconds: float) -> Iterator[Watched]:
    """Kills processes that give no sign of life any more, for the time of a ``with`` block.

    Args:
        folder: of their signs, which they find in the environment variable ``FOLDER_VARIABLE``.
        timeout_seconds: longest time between signs.

    Yields:
        What was done; complete when the block has ended.
    """
    timeout_seconds = max(timeout_seconds, 3 * _INTERVAL_SECONDS)
    found = Watched()
    ended = threading.Event()

    def watch() -> None:
        woken, gone_at = time.time(), math.inf
        while not ended.wait(_INTERVAL_SECONDS):
            # A machine that slept has stopped the watcher as well: everyone gets another chance.
            slept, woken = time.time() - woken > 5 * _INTERVAL_SECONDS, time.time()
            for rank, pid, signed in () if slept else _signs(folder):
                if not _is_there(pid):
                    gone_at = min(gone_at, woken)
                elif woken - signed > timeout_seconds:
                    found.hung[rank] = woken - signed
                elif woken - gone_at > _GRACE_SECONDS:
                    found.stopped.add(rank)
                else:
                    continue
                (folder / str(rank)).unlink(missing_ok=True)
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    gone_at = min(gone_at, woken)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()
        for path in folder.glob("*.cause"):
            found.causes[int(path.stem)] = path.read_text(encoding="utf-8")


def _has_lost_launcher() -> bool:
    return is_watched() and os.getppid() != _LAUNCHER


def _signs(folder: Path) -> Iterator[tuple[int, int, float]]:
    """Yields rank, process and time of the last sign of each process."""
    for path in folder.iterdir():
        with suppress(FileNotFoundError, ValueError):  # it ends, or is about to write its number
            yield int(path.name), int(path.read_text(encoding="ascii")), path.stat().st_mtime


def _is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
