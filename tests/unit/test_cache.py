"""The cache and the files beneath it: wholly there or not at all, whoever else is at work."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
from hasten.data.cache import (
    cache_folder,
    cached,
    clear_leftovers,
    content_key,
    folder_for_stdin,
)


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


SPOOLER = """
import sys, time
from hasten.data.cache import folder_for_stdin
with folder_for_stdin() as folder:
    (folder / "standard-input.csv").write_text("text,label")
    print(folder.name, flush=True)
    time.sleep(60)
"""


def test_standard_input_is_kept_while_its_reader_lives_and_no_longer(own_cache: Path):
    readers = [
        subprocess.Popen([sys.executable, "-c", SPOOLER], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        killed, living = (reader.stdout.readline().strip() for reader in readers if reader.stdout)
        with folder_for_stdin() as own:
            readers[0].kill()
            readers[0].wait()
            assert names(own_cache) == sorted([killed, living, own.name])
            clear_leftovers()
            assert names(own_cache) == sorted([living, own.name])
            assert names(own_cache / living) == ["standard-input.csv"]
        assert names(own_cache) == [living]
    finally:
        for reader in readers:
            reader.kill()
            reader.communicate()
    clear_leftovers()
    assert names(own_cache) == []


@pytest.mark.parametrize("moment", ["before it is opened", "before it is locked"])
def test_a_folder_that_is_swept_away_before_it_is_locked_is_made_again(
    moment: str, own_cache: Path, monkeypatch: pytest.MonkeyPatch
):
    swept = []

    owner, name = (os, "open") if moment == "before it is opened" else (fcntl, "flock")
    then = getattr(owner, name)

    def sweep_first(*arguments: Any) -> Any:
        if not swept:
            swept.extend(names(own_cache))
            clear_leftovers()
        return then(*arguments)

    monkeypatch.setattr(owner, name, sweep_first)
    with folder_for_stdin() as folder:
        assert swept == [folder.name] and folder.is_dir()
        clear_leftovers()
        assert names(own_cache) == [folder.name]


def test_where_folders_cannot_be_locked_none_is_taken_for_a_leftover(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
):
    def cannot(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", cannot)
    with folder_for_stdin() as folder:
        clear_leftovers()
        assert names(own_cache) == [folder.name]
    assert names(own_cache) == []


# Trimming


def fill(folder: Path) -> None:
    (folder / "a").write_bytes(b"x" * 1000)


def entries(folder: Path) -> list[str]:
    return [name for name in names(folder) if not name.endswith(".lock")]


def let_go() -> None:
    """Ends the use of every entry, as the end of this process would."""
    while cache._held:
        os.close(cache._held.popitem()[1])


def asked_for_in_turn(*keys: str) -> None:
    """Builds entries of 1000 bytes, the first one the least recently used; none stays in use."""
    for number, key in enumerate(keys):
        os.utime(cached("kind", key, fill), (1000 + number, 1000 + number))
    let_go()


def test_the_least_recently_used_entries_go_first(own_cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cache, "_CAP_BYTES", 2500)
    (own_cache / "stdin-1").mkdir()  # no entry: what another process reads from a pipe
    (own_cache / "stdin-1" / "a").write_bytes(b"x" * 5000)
    asked_for_in_turn("one", "two")
    cached("kind", "one", fill)  # used again: now the newer
    let_go()
    cached("kind", "three", fill)
    assert entries(own_cache) == ["kind-one", "kind-three", "stdin-1"]


def test_no_more_is_removed_than_is_needed(own_cache: Path, monkeypatch: pytest.MonkeyPatch):
    asked_for_in_turn("one", "two", "three")
    monkeypatch.setattr(cache, "_CAP_BYTES", 3000)
    cached("kind", "four", fill)
    assert entries(own_cache) == ["kind-four", "kind-three", "kind-two"]


def test_what_this_process_asked_for_stays(own_cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cache, "_CAP_BYTES", 500)
    for key in ("one", "two", "three"):
        cached("kind", key, fill)
    assert entries(own_cache) == ["kind-one", "kind-three", "kind-two"]
    let_go()
    cached("kind", "four", fill)
    assert entries(own_cache) == ["kind-four"]


def test_what_is_in_use_makes_others_go(own_cache: Path, monkeypatch: pytest.MonkeyPatch):
    asked_for_in_turn("one", "two", "three")
    cached("kind", "one", fill)
    os.utime(own_cache / "kind-one", (0, 0))
    monkeypatch.setattr(cache, "_CAP_BYTES", 3000)
    cached("kind", "four", fill)
    assert entries(own_cache) == ["kind-four", "kind-one", "kind-three"]


def test_of_very_many_entries_the_last_are_held(own_cache: Path, monkeypatch: pytest.MonkeyPatch):
    let_go()
    monkeypatch.setattr(cache, "_MAX_HELD", 2)
    monkeypatch.setattr(cache, "_CAP_BYTES", 2000)
    for key in ("one", "two", "one", "three", "four"):
        cached("kind", key, fill)
    assert entries(own_cache) == ["kind-four", "kind-one", "kind-three"]
    assert [path.name for path in cache._held] == ["kind-three", "kind-four"]


OTHER = """
import sys, time
from pathlib import Path
from hasten.core.files import FileLock
from hasten.data.cache import cache_folder, cached
entry = cache_folder() / "kind-one"
if sys.argv[1] == "uses":
    assert cached("kind", "one", lambda folder: None) == entry
else:
    lock = FileLock(entry.with_name("kind-one.lock"))
    assert lock.acquire()
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("how", ["uses", "locks"])
def test_what_another_process_holds_stays_until_its_end(
    how: str, own_cache: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(cache, "_CAP_BYTES", 500)
    asked_for_in_turn("one")
    process = subprocess.Popen([sys.executable, "-c", OTHER, how], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        asked_for_in_turn("two")
        assert entries(own_cache) == ["kind-one", "kind-two"]
    finally:
        process.kill()
        process.communicate()
    asked_for_in_turn("three")
    assert entries(own_cache) == ["kind-three"]


@pytest.mark.parametrize("moment", ["listed", "looked into", "measured"])
def test_an_entry_that_vanishes_while_it_is_looked_at(
    moment: str, own_cache: Path, monkeypatch: pytest.MonkeyPatch
):
    """Two processes that trim at once meet in this way; which of them removes it is all one."""
    asked_for_in_turn("one", "two", "three")
    monkeypatch.setattr(cache, "_CAP_BYTES", 2000)
    gone = own_cache / "kind-one"
    iterdir, remove = Path.iterdir, cache._remove

    def vanish() -> None:
        shutil.rmtree(gone, ignore_errors=True)

    def iterdir_late(path: Path) -> Iterator[Path]:
        if path == gone and moment == "listed":
            vanish()
        files = list(iterdir(path))
        if path == gone and moment == "looked into":
            vanish()
        return iter(files)

    def remove_late(path: Path) -> None:
        if path == gone and moment == "measured":
            vanish()
        remove(path)

    monkeypatch.setattr(Path, "iterdir", iterdir_late)
    monkeypatch.setattr(cache, "_remove", remove_late)
    entry = cached("kind", "four", fill)
    monkeypatch.undo()
    assert names(entry) == ["a"] and not gone.exists()
    assert entries(own_cache) == ["kind-four", "kind-three"]


def test_an_entry_that_is_removed_as_it_is_asked_for_is_built_again(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
):
    """The trimmer has the folder's lock; who asks for the entry waits and then finds it gone."""
    asked_for_in_turn("one")
    entry = own_cache / "kind-one"
    trimmer = os.open(entry, os.O_RDONLY)
    fcntl.flock(trimmer, fcntl.LOCK_EX)
    flock = fcntl.flock

    def waits(descriptor: int, operation: int) -> None:
        if operation == fcntl.LOCK_SH and trimmer in still_there:
            still_there.remove(trimmer)
            with pytest.raises(BlockingIOError):
                flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            shutil.rmtree(entry)
            os.close(trimmer)
        flock(descriptor, operation)

    still_there = [trimmer]
    monkeypatch.setattr(fcntl, "flock", waits)
    again = cached("kind", "one", lambda folder: (folder / "new").touch())
    assert not still_there and again == entry and names(entry) == ["new"]


def test_a_trimmer_that_is_killed_leaves_no_half_entry(own_cache: Path):
    asked_for_in_turn("one")
    child = """
import os, shutil, signal
from pathlib import Path
from hasten.data import cache
rmtree = shutil.rmtree
def die(folder, ignore_errors):
    if "kind-one" not in str(folder):
        return rmtree(folder, ignore_errors)
    (Path(folder) / "a").unlink()
    os.kill(os.getpid(), signal.SIGKILL)
shutil.rmtree = die
cache._CAP_BYTES = 10
cache.cached("kind", "two", lambda folder: None)
"""
    assert subprocess.run([sys.executable, "-c", child]).returncode == -9
    assert "kind-one" not in entries(own_cache)
    clear_leftovers()
    assert entries(own_cache) == ["kind-two"]
    assert names(cached("kind", "one", fill)) == ["a"]


def _use_and_trim(cache_path: str, number: int) -> None:
    os.environ["HASTEN_CACHE"] = cache_path
    cache._CAP_BYTES, cache._MAX_HELD = 3500, 2
    draw = random.Random(number)
    for _ in range(150):
        key = str(draw.randrange(12))
        entry = cached("kind", key, fill)
        assert (entry / "a").stat().st_size == 1000


def test_processes_that_trim_at_once(own_cache: Path):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_use_and_trim, args=(str(own_cache), i)) for i in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0] * 3
    assert not [name for name in names(own_cache) if ".partial-" in name]


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
