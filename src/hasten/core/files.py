"""Files that are either wholly there or not there at all.

    write into NAME.partial-PID -> fsync every file -> one rename -> fsync the parent folder

A reader never sees a half-written file or folder, whatever kills the writer. ``RunLock`` keeps
a second process out of a run folder; the kernel drops the lock when its holder dies.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from hasten.core.errors import DamagedError, MachineError

_MOST_JSON_BYTES = 64 << 20  # of a config.json or an index, which are a few kB


def file_hash(path: Path) -> str:
    """Returns the SHA-256 of a file's bytes as hexadecimal text."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_object(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file that somebody else has written.

    Raises:
        DamagedError: it is missing, far too large, or holds something else.
    """
    try:
        if path.stat().st_size > _MOST_JSON_BYTES:
            raise DamagedError(f"{path}: far too large.")
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DamagedError(f"{path}: missing.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedError(f"{path}: not JSON: {error}.") from None
    if not isinstance(content, dict):
        raise DamagedError(f"{path}: not a JSON object.")
    return content


def sync_folder(folder: Path) -> None:
    """Makes renames inside ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Flushes every file under ``folder`` and the folders themselves to the disk."""
    for parent, _, names in os.walk(folder):
        for name in names:
            with (Path(parent) / name).open("rb+") as file:
                os.fsync(file.fileno())
        sync_folder(Path(parent))


def write_text(path: Path, text: str) -> None:
    """Replaces the file at ``path`` by ``text`` in one step."""
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextmanager
def committed_folder(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """Yields an empty folder that becomes ``path`` when the block ends without an error.

    An existing folder at ``path`` is replaced, or with ``replace`` off raises ``OSError``
    (ENOTEMPTY). After an error nothing remains.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        sync_tree(partial)
        if replace and path.exists():
            # A folder cannot be renamed onto a full one: move the old one aside first.
            old = path.with_name(f"{path.name}.partial-old-{os.getpid()}")
            path.rename(old)
            partial.rename(path)
            shutil.rmtree(old, ignore_errors=True)
        else:
            partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync_folder(path.parent)


def remove_partials(folder: Path) -> None:
    """Removes what writers that were killed left behind in ``folder``."""
    for entry in folder.glob("*.partial-*"):
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


class FileLock:
    """An exclusive lock on a file, held until ``release`` or the end of the process."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[str] | None = None

    def acquire(self, *, wait: bool = False) -> bool:
        """Takes the lock; returns False where another process holds it and ``wait`` is off."""
        file = self._path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            file.close()
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            raise
        file.seek(0)
        file.truncate()
        file.write(f"{os.getpid()}\n")
        file.flush()
        self._file = file
        return True

    def holder(self) -> str:
        """Returns what the holding process wrote about itself: its process number."""
        return self._path.read_text(encoding="utf-8").strip() if self._path.exists() else ""

    def release(self) -> None:
        """Gives the lock back; does nothing where it is not held."""
        if self._file is not None:
            fcntl.flock(self._file, fcntl.LOCK_UN)
            self._file.close()
            self._file = None


@contextmanager
def machine_errors(doing: str) -> Iterator[None]:
    """Turns a full disk or a missing permission into a ``MachineError`` that says where.

    Args:
        doing: what was tried, for example "writing the checkpoint".
    """
    try:
        yield
    except OSError as error:
        advice = {
            errno.ENOSPC: "free some space and resume",
            errno.EDQUOT: "free some space and resume",
            errno.EACCES: "choose another place with --output",
            errno.EPERM: "choose another place with --output",
            errno.EROFS: "choose another place with --output",
        }.get(error.errno or 0)
        if advice is None:
            raise
        where = f" {error.filename}:" if error.filename else ""
        raise MachineError(f"{doing}:{where} {error.strerror}; {advice}.") from error
