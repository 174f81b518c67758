"""The cache and the files beneath it: wholly there or not at all, whoever else is at work."""

from __future__ import annotations

import errno
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from hasten.core.errors import MachineError
from hasten.core.files import (
    FileLock,
    committed_folder,
    machine_errors,
    remove_partials,
    write_text,
)
from hasten.data import cache
from hasten.data.cache import cache_folder, cached, clear_leftovers, content_key


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_an_entry_is_built_once(own_cache: Path):
    built = []

    def build(folder: Path) -> None:
        built.append(folder)
        (folder / "a").write_text("content")

    first = cached("kind", "key", build)
    assert first == own_cache / "kind-key" and (first / "a").read_text() == "content"
    assert cached("kind", "key", build) == first
    assert len(built) == 1
    assert cached("kind", "other", build) != first
    assert len(built) == 2


def test_a_builder_that_raises_leaves_nothing_and_may_be_tried_again(own_cache: Path):
    def fail(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        cached("kind", "key", fail)
    assert [n for n in names(own_cache) if not n.endswith(".lock")] == []
    entry = cached("kind", "key", lambda folder: (folder / "whole").touch())
    assert names(entry) == ["whole"]


def _build_slowly(cache_path: str, log: str, number: int) -> None:
    os.environ["HASTEN_CACHE"] = cache_path

    def build(folder: Path) -> None:
        with Path(log).open("a") as file:
            file.write(f"{number}\n")
        for i in range(20):
            (folder / f"{i}").write_text("x" * 100)
            time.sleep(0.01)

    clear_leftovers()  # as every run does when it starts
    entry = cached("kind", "key", build)
    assert len(list(entry.iterdir())) == 20


def test_of_several_processes_one_builds_and_all_see_the_whole(own_cache: Path, tmp_path: Path):
    log = tmp_path / "log"
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=_build_slowly, args=(str(own_cache), str(log), i)) for i in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert len(log.read_text().splitlines()) == 1


def test_a_starting_run_does_not_sweep_away_what_another_is_writing(own_cache: Path):
    def build(folder: Path) -> None:
        (folder / "a").write_text("a")
        child = "from hasten.data.cache import clear_leftovers; clear_leftovers()"
        subprocess.run([sys.executable, "-c", child], check=True)
        (folder / "b").write_text("b")

    assert names(cached("kind", "key", build)) == ["a", "b"]


def test_what_a_killed_builder_left_is_swept_away(own_cache: Path):
    child = """
import os, signal
from hasten.data.cache import cached
def build(folder):
    (folder / "half").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
cached("kind", "key", build)
"""
    killed = subprocess.run([sys.executable, "-c", child])
    assert killed.returncode == -9
    assert any(".partial-" in name for name in names(own_cache))
    clear_leftovers()
    assert not any(".partial-" in name for name in names(own_cache))
    assert names(cached("kind", "key", lambda folder: (folder / "whole").touch())) == ["whole"]


def test_the_least_recently_used_entries_go_first(own_cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cache, "_CAP_BYTES", 2500)

    def fill(folder: Path) -> None:
        (folder / "a").write_bytes(b"x" * 1000)

    (own_cache / "stdin-1").mkdir()  # no entry: what another process reads from a pipe
    (own_cache / "stdin-1" / "a").write_bytes(b"x" * 5000)
    for number, key in enumerate(["one", "two"]):
        os.utime(cached("kind", key, fill), (1000 + number, 1000 + number))
    cached("kind", "one", fill)  # used again: now the newer
    cached("kind", "three", fill)
    entries = [n for n in names(own_cache) if not n.endswith(".lock")]
    assert entries == ["kind-one", "kind-three", "stdin-1"]


def test_the_newest_entry_stays_even_above_the_cap(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(cache, "_CAP_BYTES", 10)
    entry = cached("kind", "key", lambda folder: (folder / "a").write_bytes(b"x" * 1000))
    assert (entry / "a").stat().st_size == 1000


def test_an_unwritable_cache_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def no_space(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(folder / "a"))

    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path))
    with pytest.raises(MachineError, match=r"HASTEN_CACHE.*No space left"):
        cached("kind", "key", no_space)


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path / "a"))
    assert cache_folder() == tmp_path / "a"
    monkeypatch.delenv("HASTEN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert cache_folder() == tmp_path / "b" / "hasten"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "c"))
    assert cache_folder() == tmp_path / "c" / ".cache" / "hasten"


def test_keys_depend_on_every_part():
    base = {"a": [1, 2], "b": "x"}
    keys = {
        content_key(**base),
        content_key(**{**base, "a": [2, 1]}),
        content_key(**{**base, "b": "y"}),
        content_key(a=[1, 2], b="x", c=None),
        content_key(a=[1, 2], c="x"),
    }
    assert len(keys) == 5
    assert content_key(b="x", a=[1, 2]) == content_key(**base)


def test_a_committed_folder_replaces_the_old_one(tmp_path: Path):
    target = tmp_path / "deep" / "folder"
    for text in ("first", "second"):
        with committed_folder(target) as partial:
            assert not target.exists() or (target / "a").read_text() == "first"
            (partial / "a").write_text(text)
    assert (target / "a").read_text() == "second"
    with pytest.raises(KeyError), committed_folder(target) as partial:
        (partial / "a").write_text("third")
        raise KeyError
    assert (target / "a").read_text() == "second"
    assert names(tmp_path / "deep") == ["folder"]


def test_write_text_replaces_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.json"
    write_text(path, "old é")
    assert path.read_text(encoding="utf-8") == "old é"

    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="full"):
        write_text(path, "new")
    assert path.read_text(encoding="utf-8") == "old é"
    assert names(tmp_path) == ["a.json"]


def test_partials_are_removed_and_nothing_else(tmp_path: Path):
    (tmp_path / "step-1.partial-77").mkdir()
    (tmp_path / "step-1.partial-77" / "f").touch()
    (tmp_path / "a.json.partial-5").touch()
    (tmp_path / "partial-1").touch()
    (tmp_path / "step-1").mkdir()
    remove_partials(tmp_path)
    assert names(tmp_path) == ["partial-1", "step-1"]


def test_a_lock_keeps_others_out_until_its_holder_is_gone(tmp_path: Path):
    child = f"""
import sys, time
from pathlib import Path
from hasten.core.files import FileLock
assert FileLock(Path({str(tmp_path / "lock")!r})).acquire()
lock = FileLock(Path({str(tmp_path / "lock2")!r})); assert lock.acquire()
print("held", flush=True)
time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        lock = FileLock(tmp_path / "lock2")
        assert not lock.acquire()
        assert lock.holder() == str(process.pid)
    finally:
        process.kill()
        process.wait()
    assert lock.acquire()
    assert not FileLock(tmp_path / "lock2").acquire()
    lock.release()
    lock.release()
    again = FileLock(tmp_path / "lock2")
    assert again.acquire()
    again.release()


def test_waiting_for_a_lock_ends_when_it_is_released(tmp_path: Path):
    first, second = FileLock(tmp_path / "lock"), FileLock(tmp_path / "lock")
    assert first.acquire()
    thread = threading.Thread(target=lambda: second.acquire(wait=True))
    thread.start()
    time.sleep(0.05)
    assert thread.is_alive()
    first.release()
    thread.join(10)
    assert not thread.is_alive()
    second.release()


@pytest.mark.parametrize(
    ("number", "advice"), [(errno.ENOSPC, "free some space"), (errno.EACCES, "--output")]
)
def test_disk_and_permission_errors_say_where_and_what_to_do(number: int, advice: str):
    with (
        pytest.raises(MachineError, match=rf"writing it: /x/y: .*{advice}"),
        machine_errors("writing it"),
    ):
        raise OSError(number, os.strerror(number), "/x/y")
    with pytest.raises(OSError, match="Input/output"), machine_errors("writing it"):
        raise OSError(errno.EIO, "Input/output error")
