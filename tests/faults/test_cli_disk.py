"""Full and read-only disks, real ones: small file systems in a mount namespace of their own.

One child makes them all, so that nothing stays mounted whatever happens to it.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from typing import Any

import pytest

from builders import labelled_rows, write_rows

CHILD = """
import contextlib, io, json, os, subprocess, sys
from pathlib import Path

from hasten.cli.main import main

here = Path(sys.argv[1])
tiny = ["--model.num_layers", "1", "--model.hidden_size", "16", "--model.num_heads", "2",
        "--epochs", "2", "--eval.baseline", "false", "--quiet"]
found = {}

def mount(name, options):
    disk = here / name
    disk.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)], check=True)
    return disk

def remount(disk, options):
    subprocess.run(["mount", "-o", "remount," + options, str(disk)], check=True)

def run(name, *arguments, disk=None, stdin=b""):
    out, err = io.StringIO(), io.StringIO()
    sys.stdin = io.TextIOWrapper(io.BytesIO(stdin))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code
    left = sorted(str(p.relative_to(disk)) for p in disk.rglob("*")) if disk else []
    found[name] = {"code": code, "out": out.getvalue(), "err": err.getvalue(), "left": left}

data = here / "train.csv"
train = ["train", data, *tiny]
run("good", *train, "-o", here / "good")

disk = mount("full", "size=20k")
run("folder", *train, "-o", disk / "run", disk=disk)
disk = mount("fuller", "size=88k")
run("checkpoint", *train, "-o", disk / "run", disk=disk)
remount(disk, "size=4m")
run("resumed", "train", "--resume", disk / "run", disk=disk)
disk = mount("fullest", "size=8k")
(disk / "out.csv").write_text("of old")
run("labels", "predict", here / "good", "--input", data, "-o", disk / "out.csv", disk=disk)
run("zipped", "predict", here / "good", "--input", here / "long.csv", "-o", disk / "x.jsonl.gz",
    disk=disk)
cache = os.environ["HASTEN_CACHE"]
os.environ["HASTEN_CACHE"] = str(mount("cache", "size=12k"))
run("cache", *train, "-o", here / "never", disk=here / "cache")
run("spool", "train", "-", *tiny, "-o", here / "never", disk=here / "cache",
    stdin=data.read_bytes() * 5)
remount(here / "cache", "ro")
run("read-only cache", *train, "-o", here / "never", disk=here / "cache")
os.environ["HASTEN_CACHE"] = cache

disk = here / "fuller"
remount(disk, "ro")
run("read-only output", *train, "-o", disk / "other", disk=disk)
run("read-only labels", "predict", disk / "run", "--input", data, "-o", disk / "x.csv", disk=disk)
run("read-only resume", "train", "--resume", disk / "run", disk=disk)
run("read-only run", "predict", disk / "run", "some text", disk=disk)
found["never"] = (here / "never").exists()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the child saw."""
    probe = "mount -t tmpfs -o size=8k tmpfs /mnt"
    unshare = shutil.which("unshare")
    if (
        unshare is None
        or subprocess.run([unshare, "-m", "sh", "-c", probe], capture_output=True).returncode
    ):
        pytest.skip("mounting a file system in a namespace of its own is not permitted here")
    here = tmp_path_factory.mktemp("disks")
    write_rows(here / "train.csv", labelled_rows(90), ("text", "label"))
    write_rows(here / "long.csv", labelled_rows(3000), ("text", "label"))
    done = subprocess.run(
        [unshare, "-m", sys.executable, "-c", CHILD, str(here)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def refused(ended: dict[str, Any], *parts: str) -> None:
    assert ended["code"] == 8 and ended["out"] == "", ended
    (line,) = ended["err"].splitlines()
    assert line.startswith("hasten: ") and line.endswith("."), line
    for part in parts:
        assert part in line, (part, line)
    assert not [name for name in ended["left"] if ".partial" in name or "stdin-" in name], ended


def test_a_full_disk_before_the_run_folder_is_there(found: dict[str, Any]):
    assert found["good"]["code"] == 0
    refused(found["folder"], "creating the run folder", "No space left on device", "free some")
    assert found["folder"]["left"] == []


def test_a_full_disk_at_a_checkpoint_leaves_a_run_that_goes_on(found: dict[str, Any]):
    refused(found["checkpoint"], "No space left on device", "free some space and resume")
    assert "run/config.yaml" in found["checkpoint"]["left"]
    assert not [name for name in found["checkpoint"]["left"] if "/step-" in name]
    resumed = found["resumed"]
    assert resumed["code"] == 0 and "resumed at step" not in resumed["err"]  # there was none
    assert "run/model/model.safetensors" in resumed["left"]


def test_a_full_disk_while_labelling_keeps_what_was_there(found: dict[str, Any]):
    for name in ("labels", "zipped"):
        refused(found[name], "writing the labelled rows", "No space left on device")
        assert found[name]["left"] == ["out.csv"]


def test_a_full_cache(found: dict[str, Any]):
    refused(found["cache"], "HASTEN_CACHE", "No space left on device")
    refused(found["spool"], "No space left on device")
    refused(found["read-only cache"], "HASTEN_CACHE", "Read-only file system")
    assert found["never"] is False
    for name in ("cache", "spool"):
        assert all(entry.endswith(".lock") for entry in found[name]["left"]), found[name]["left"]


def test_a_read_only_disk(found: dict[str, Any]):
    before = found["resumed"]["left"]
    for name, where in (
        ("read-only output", "creating the run folder"),
        ("read-only labels", "writing the labelled rows"),
        ("read-only resume", "locking the run folder"),
    ):
        refused(found[name], where, "Read-only file system")
        assert found[name]["left"] == before
    used = found["read-only run"]
    assert used["code"] == 0 and used["out"].endswith("some text\n") and used["err"] == ""
