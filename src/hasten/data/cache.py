"""The cache of prepared data: folders keyed by content, locked, capped in size.

    $HASTEN_CACHE, else $XDG_CACHE_HOME/hasten, else ~/.cache/hasten
      KIND-KEY/            written under a lock, committed by one rename
      KIND-KEY.lock

A key is the hash of everything that the folder's content depends on, so an entry is never
stale. The least recently used entries go when the cache outgrows its cap.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hasten.core.files import FileLock, committed_folder, machine_errors

_CAP_BYTES = 20 << 30


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
    folder = cache_folder()
    entry = folder / f"{kind}-{key}"
    with machine_errors("preparing the data in the cache (set HASTEN_CACHE to move it)"):
        if not entry.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder / f"{kind}-{key}.lock")
            lock.acquire(wait=True)
            try:
                if not entry.is_dir():
                    with committed_folder(entry) as partial:
                        build(partial)
                    _trim(folder, keep=entry)
            finally:
                lock.release()
    if os.access(entry, os.W_OK):
        os.utime(entry)
    return entry


def _trim(folder: Path, keep: Path) -> None:
    """Removes the least recently used entries above the cap; open files stay readable."""
    entries = [
        (path.stat().st_mtime, sum(f.stat().st_size for f in path.iterdir()), path)
        for path in folder.iterdir()
        if path.with_name(f"{path.name}.lock").exists()
    ]
    total = sum(size for _, size, _ in entries)
    for _, size, path in sorted(entries):
        if total <= _CAP_BYTES:
            return
        if path != keep:
            shutil.rmtree(path, ignore_errors=True)
            path.with_name(path.name + ".lock").unlink(missing_ok=True)
            total -= size


def clear_leftovers() -> None:
    """Removes what killed processes left half-written in the cache, and nothing that is in work."""
    for partial in cache_folder().glob("*.partial-*"):
        entry = partial.name.partition(".partial-")[0]
        lock = FileLock(partial.with_name(f"{entry}.lock"))
        if os.access(partial.parent, os.W_OK) and lock.acquire():
            shutil.rmtree(partial, ignore_errors=True)
            lock.release()
