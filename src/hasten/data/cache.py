"""The cache of prepared data: folders keyed by content, locked, capped in size.

    $HASTEN_CACHE, else $XDG_CACHE_HOME/hasten, else ~/.cache/hasten
      KIND-KEY/            written under a lock, committed by one rename
      KIND-KEY.lock        held by the process that builds or removes the entry
      stdin-RANDOM/        of one process, locked as long as it lives

A key is the hash of everything that the folder's content depends on, so an entry is never
stale. The least recently used entries go when the cache outgrows its cap, but none that a living
process has asked for: it may still open files in it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hasten.core.files import FileLock, committed_folder, machine_errors

_STDIN = "stdin-"
_CAP_BYTES = 20 << 30
_MAX_HELD = 32  # more than one run needs, fewer than a process may open
_held: dict[Path, int] = {}  # entry -> its open, locked folder; the last one asked for at the end


def cache_folder() -> Path:
    """Returns the folder of the cache; see the module's text for how it is chosen."""
    if chosen := os.environ.get("HASTEN_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "hasten"


def content_key(**parts: Any) -> str:
    """Returns a short hash of JSON-like ``parts``."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def cached(kind: str, key: str, build: Callable[[Path], None]) -> Path:
    """Returns the cache's folder for ``key``, building it where it is not there.

    Args:
        kind: what it holds, the first part of its name.
        key: see ``content_key``.
        build: fills the empty folder it is given; called at most once among all processes.

    Raises:
        MachineError: the cache cannot be written.
    """
    entry = cache_folder() / f"{kind}-{key}"
    with machine_errors("preparing the data in the cache (set HASTEN_CACHE to move it)"):
        while not _hold(entry):
            _build(entry, build)
    if os.access(entry, os.W_OK):
        os.utime(entry)
    return entry


def _build(entry: Path, build: Callable[[Path], None]) -> None:
    """Builds an entry unless another process did so while this one waited for the lock."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    lock = _lock_of(entry)
    lock.acquire(wait=True)
    try:
        if not entry.is_dir():
            with committed_folder(entry) as partial:
                build(partial)
            _trim(entry.parent)
    finally:
        lock.release()


def _lock_of(entry: Path) -> FileLock:
    return FileLock(entry.with_name(f"{entry.name}.lock"))


def _hold(entry: Path) -> bool:
    """Keeps every process from trimming ``entry`` as long as this one lives.

    Returns:
        Whether the entry is there.
    """
    descriptor = _open_locked(entry)
    if descriptor is None:
        return False
    if entry in _held:
        os.close(_held.pop(entry))
    _held[entry] = descriptor
    if len(_held) > _MAX_HELD:
        os.close(_held.pop(next(iter(_held))))
    return True


def _open_locked(folder: Path) -> int | None:
    """Opens a folder, which no process removes until it is closed; None where it is gone."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except (FileNotFoundError, NotADirectoryError):
        return None
    with contextlib.suppress(OSError):  # a file system that cannot lock folders
        fcntl.flock(descriptor, fcntl.LOCK_SH)  # waits while it is being removed
    if _is_at(descriptor, folder):
        return descriptor
    os.close(descriptor)
    return None


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _trim(folder: Path) -> None:
    """Removes the least recently used entries above the cap, except those locked or in use."""
    entries = sorted(_entries(folder))
    total = sum(size for _, size, _ in entries)
    for _, size, path in entries:
        if total <= _CAP_BYTES:
            return
        _remove(path)
        total -= 0 if path.exists() else size


def _entries(folder: Path) -> Iterator[tuple[float, int, Path]]:
    """Yields when each entry was last used, its size in bytes, and where it is."""
    for lock in folder.glob("*.lock"):
        path = lock.with_suffix("")
        with contextlib.suppress(OSError):  # it is still being built, or another process trims
            size = sum(file.stat().st_size for file in path.iterdir())
            yield path.stat().st_mtime, size, path


def _remove(entry: Path) -> None:
    """Removes an entry unless it is being built, in use, or gone already.

    Its lock file stays: a process that waits for it must not be left with one that has no name,
    while the next process makes and locks a new one.
    """
    lock = _lock_of(entry)
    with contextlib.suppress(OSError):  # gone, or not this person's
        try:
            if lock.acquire():
                _remove_unused(entry)
        finally:
            lock.release()


def _remove_unused(entry: Path) -> None:
    descriptor = os.open(entry, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if _is_in_use(descriptor):
            return
        # Renamed first: what a kill from here on leaves behind must not look whole.
        partial = entry.rename(entry.with_name(f"{entry.name}.partial-trim-{os.getpid()}"))
    finally:
        os.close(descriptor)
    shutil.rmtree(partial, ignore_errors=True)


def _is_in_use(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system that cannot lock folders
        return False
    return False


@contextlib.contextmanager
def folder_for_stdin() -> Iterator[Path]:
    """Yields a new, empty folder of the cache for standard input, and removes it afterwards.

    Where this process is killed, a later one does so: see ``clear_leftovers``.

    Raises:
        MachineError: the cache cannot be written.
    """
    with machine_errors("keeping standard input"):
        cache_folder().mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=_STDIN, dir=cache_folder()))
        while (descriptor := _open_locked(folder)) is None:  # it was taken for a leftover
            folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def clear_leftovers() -> None:
    """Removes what killed processes left half-written in the cache, and nothing that is in work."""
    for partial in cache_folder().glob("*.partial-*"):
        entry = partial.name.partition(".partial-")[0]
        lock = _lock_of(partial.with_name(entry))
        if os.access(partial.parent, os.W_OK) and lock.acquire():
            shutil.rmtree(partial, ignore_errors=True)
            lock.release()
    for folder in cache_folder().glob(f"{_STDIN}*"):
        with contextlib.suppress(OSError):  # in use, gone, another person's, or not to be locked
            _remove_unlocked(folder)


def _remove_unlocked(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(descriptor)
