"""Checkpoints hold every tensor bit for bit, and none is there that is not whole."""

from __future__ import annotations

import copy
import errno
import json
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from hasten.core.errors import DamagedError, MachineError
from hasten.core.ranks import ALONE, Ranks
from hasten.training import checkpoint
from hasten.training.checkpoint import Checkpoint, committed_checkpoints, open_newest_checkpoint
from hasten.training.saving import CheckpointSaver

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool)


def as_bytes(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().clone().untyped_storage())


def read(opened: Checkpoint | None, group: str) -> dict[str, Tensor]:
    """Returns a group's tensors, newly made."""
    assert opened is not None
    found = {n: torch.empty_like(t, device="cpu") for n, t in opened.tensors[group].items()}
    opened.read(group, found)
    return found


def save(folder: Path, step: int, group: dict[str, Tensor]) -> None:
    with CheckpointSaver(folder, ALONE) as saver:
        saver.begin(step, {"model": group}, {"step": step})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Parts of a tensor of random bits: none of its elements, one, or more, some strided."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    size = torch.empty((), dtype=dtype).element_size()
    top = 2 if dtype == torch.bool else 256  # what a bool is of other bytes is not defined
    bits = torch.randint(top, (*shape, size), dtype=torch.uint8, generator=generator)
    tensor = bits.view(dtype).squeeze(-1)
    for dim in range(tensor.ndim):
        start, step = draw(st.integers(0, 4)), draw(st.integers(1, 3))
        tensor = tensor[(slice(None),) * dim + (slice(start, None, step),)]
    return tensor.mT if tensor.ndim > 1 and draw(st.booleans()) else tensor


@given(st.dictionaries(st.sampled_from(["a", "b.c", "d/e"]), tensors(), min_size=1))
def test_what_is_saved_is_loaded_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, group: dict[str, Tensor]
):
    folder = tmp_path_factory.mktemp("checkpoints")
    save(folder, 3, group)
    opened = open_newest_checkpoint(folder)
    assert opened is not None and opened.scalars == {"step": 3}
    found = read(opened, "model")
    assert found.keys() == group.keys()
    for name, tensor in group.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert as_bytes(found[name]) == as_bytes(tensor)


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_disk_that_alters_one_bit_is_found_out(
    value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Of a zero the sign, of a number that is none the last bit of what says which."""
    bits = torch.tensor([1.0, value]).view(torch.int32)
    altered = bits ^ torch.tensor([0, -(2**31) if value == 0 else 1], dtype=torch.int32)
    original = checkpoint.save_file

    def alter(tensors: dict[str, Tensor], *rest: Any, **options: Any) -> None:
        original({**tensors, "w": altered.view(torch.float32)}, *rest, **options)

    monkeypatch.setattr(checkpoint, "save_file", alter)
    with pytest.raises(MachineError, match=r"model.safetensors: the disk did not keep .* 'w'"):
        save(tmp_path, 1, {"w": bits.view(torch.float32)})
    assert names(tmp_path) == []


@contextmanager
def writing_stands_still(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Files are not written until the event is set, or the block ends."""
    may_write, original = threading.Event(), checkpoint._write_file

    def wait(*arguments: Any) -> None:
        assert may_write.wait(60)
        original(*arguments)

    monkeypatch.setattr(checkpoint, "_write_file", wait)
    try:
        yield may_write
    finally:
        may_write.set()


def test_training_goes_on_while_a_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    weight, entries = torch.arange(6.0), [1]
    saver = CheckpointSaver(tmp_path, ALONE)
    with writing_stands_still(monkeypatch) as may_write, saver:
        saver.begin(1, {"model": {"w": weight, "also": weight[2:]}}, {"entries": entries})
        assert saver.is_writing
        weight.zero_()
        entries.append(2)
        assert committed_checkpoints(tmp_path) == []
        may_write.set()
        saver.begin(2, {"model": {"w": weight}}, {})  # the first is finished before
        assert [path.name for path in committed_checkpoints(tmp_path)] == ["step-00000001"]
        opened = open_newest_checkpoint(tmp_path / "nowhere")
        assert opened is None
        first = checkpoint._read_manifest(tmp_path / "step-00000001", "")
        assert first["entries"] == [1]
        with safe_open(tmp_path / "step-00000001" / "model.safetensors", "pt") as file:
            assert file.get_tensor("w").tolist() == [0, 1, 2, 3, 4, 5]
            assert file.get_tensor("also").tolist() == [2, 3, 4, 5]
    assert read(open_newest_checkpoint(tmp_path), "model")["w"].tolist() == [0] * 6
    for step in (3, 4):
        save(tmp_path, step, {"w": weight})
    assert names(tmp_path) == ["step-00000003", "step-00000004"]


def test_a_run_that_fails_commits_nothing_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save(tmp_path, 1, {"w": torch.ones(3)})
    saver = CheckpointSaver(tmp_path, ALONE)
    for is_written in (False, True):
        with (
            writing_stands_still(monkeypatch) as may_write,
            pytest.raises(ZeroDivisionError),
            saver,
        ):
            saver.begin(2, {"model": {"w": torch.zeros(3)}}, {})
            threading.Timer(0 if is_written else 0.05, may_write.set).start()
            while is_written and saver.is_writing:
                pass
            raise ZeroDivisionError
        assert names(tmp_path) == ["step-00000001"]
    assert read(open_newest_checkpoint(tmp_path), "model")["w"].tolist() == [1] * 3


class Together(Ranks):
    """Threads that stand for the processes of a run."""

    def __init__(self, rank: int, told: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size = rank, len(told)
        self._told, self._barrier = told, barrier

    def gather(self, value: Any) -> list[Any]:
        self._told[self.rank] = value
        self._barrier.wait(60)
        found = copy.deepcopy(self._told)
        self._barrier.wait(60)
        return found

    def any(self, values: Any) -> list[bool]:
        return [any(of_ranks) for of_ranks in zip(*self.gather(list(values)), strict=True)]

    def on_main(self, work: Callable[[], Any]) -> Any:
        result, error = None, None
        if self.is_main:
            try:
                result = work()
            except BaseException as caught:
                error = caught
        result, error = self.gather((result, error))[0]
        if error is not None:
            raise error if self.is_main else SystemExit(getattr(error, "exit_code", 1))
        return result


def run_together(size: int, work: Callable[[Ranks], Any]) -> list[Any]:
    """Returns what each of several ranks returns or raises."""
    barrier, told = threading.Barrier(size), [None] * size

    def one(rank: int) -> Any:
        try:
            return work(Together(rank, told, barrier))
        except (Exception, SystemExit) as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))


def two_stages(rank: int) -> dict[str, Tensor]:
    """Of four ranks two hold the one half of a model, two the other, and all a matrix of both."""
    drawn = torch.Generator().manual_seed(rank // 2)
    tied = {"tied": torch.arange(100.0)}
    return tied | {f"block{rank // 2}.{i}": torch.rand(50, generator=drawn) for i in range(4)}


def test_several_write_each_tensor_once_and_each_reads_its_own(tmp_path: Path):
    def write_and_read(ranks: Ranks) -> dict[str, Tensor]:
        own = two_stages(ranks.rank)
        with CheckpointSaver(tmp_path, ranks) as saver:
            saver.begin(7, {"model": own}, {"of": ranks.rank})
        opened = open_newest_checkpoint(tmp_path, ranks)
        assert opened is not None and opened.scalars == {"of": 0}
        found = {name: torch.zeros_like(tensor) for name, tensor in own.items()}
        opened.read("model", found)
        return found

    for rank, found in enumerate(run_together(4, write_and_read)):
        wanted = two_stages(rank)
        assert found.keys() == wanted.keys()
        assert all(found[name].equal(wanted[name]) for name in wanted)
    files = sorted((tmp_path / "step-00000007").glob("*.safetensors"))
    assert [file.name for file in files] == [f"model-0000{n}-of-00004.safetensors" for n in "1234"]
    written = []
    for file in files:
        with safe_open(file, "pt") as opened:
            written.append(list(opened.keys()))
    assert sorted(n for some in written for n in some) == sorted(two_stages(0) | two_stages(3))
    assert all(1 <= len(some) <= 3 for some in written)
    whole = read(open_newest_checkpoint(tmp_path), "model")  # as one process alone
    assert all(whole[name].equal(tensor) for name, tensor in two_stages(2).items())


def test_a_disk_that_is_full_for_one_of_several_stops_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    original = checkpoint._write_file

    def full(file: Path, parts: Any) -> None:
        if "00003" in file.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
        original(file, parts)

    def write(ranks: Ranks) -> None:
        with CheckpointSaver(tmp_path, ranks) as saver:
            saver.begin(1, {"model": two_stages(ranks.rank)}, {})

    run_together(4, write)
    monkeypatch.setattr(checkpoint, "_write_file", full)
    main, *others = run_together(4, lambda ranks: write_step_two(tmp_path, ranks))
    assert isinstance(main, MachineError) and main.exit_code == 8
    assert str(main).startswith("rank 2: writing a checkpoint: ") and "No space left" in str(main)
    assert [(type(other), other.code) for other in others] == [(SystemExit, 8)] * 3
    assert names(tmp_path) == ["step-00000001"]


def write_step_two(folder: Path, ranks: Ranks) -> None:
    with CheckpointSaver(folder, ranks) as saver:
        saver.begin(2, {"model": two_stages(ranks.rank)}, {})


def test_a_file_that_one_of_several_finds_altered_stops_all(tmp_path: Path):
    run_together(4, lambda ranks: write_step_two(tmp_path, ranks))
    file = tmp_path / "step-00000002" / "model-00002-of-00004.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    for size in (1, 2, 3):
        main, *others = run_together(size, lambda ranks: open_newest_checkpoint(tmp_path, ranks))
        assert isinstance(main, DamagedError) and str(file) in str(main)
        assert [(type(other), other.code) for other in others] == [(SystemExit, 4)] * (size - 1)


def test_what_does_not_fit_is_named(tmp_path: Path):
    save(tmp_path, 1, {"a": torch.ones(2), "b": torch.ones(3)})
    opened = open_newest_checkpoint(tmp_path)
    assert opened is not None
    one, two, three = torch.zeros(1), torch.zeros(2), torch.zeros(3)
    for targets, message in (
        ({"a": two}, "'b' is not part of the model but in"),
        ({"a": two, "b": three, "c": one}, "'c' is missing from"),
        ({"a": two, "b": one}, r"'b' in the checkpoint has shape \(3,\), the model expects \(1,\)"),
    ):
        with pytest.raises(DamagedError, match=message):
            opened.read("model", targets)
    with pytest.raises(DamagedError, match="'a' is missing from"):
        opened.read("average", {"a": two})
    assert not torch.cat([one, two, three]).any()
    # Whatever else comes into the folder is not read.
    (tmp_path / "step-00000001" / "other.safetensors").write_text("{}")
    assert read(open_newest_checkpoint(tmp_path), "model").keys() == {"a", "b"}
    manifest = json.loads((tmp_path / "step-00000001" / "manifest.json").read_text())
    assert list(manifest["files"]) == ["model.safetensors"]
