"""Pickled weights become safetensors, tensor for tensor; nothing in them ever runs."""

from __future__ import annotations

import json
import os
import pickle
import resource
import signal
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hasten.cli.main import main
from hasten.core.errors import DamagedError, MachineError, UsageError
from hasten.training.conversion import convert
from hasten.training.unpickling import RefusedError, read_tensors, separate

SINGLE, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


def some_tensors(seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    matrix = torch.randn(6, 4)
    return {
        "embeddings": matrix,
        "tied": matrix,
        "part": matrix[2:4],
        "turned": matrix.T,
        "half": torch.randn(3).to(torch.bfloat16),
        "numbers": torch.arange(5),
        "flags": torch.tensor([True, False]),
        "scalar": torch.tensor(2.0),
        "empty": torch.zeros(0, 3),
    }


def model_folder(folder: Path, content: Any, name: str = SINGLE, **options: Any) -> Path:
    folder.mkdir(exist_ok=True)
    torch.save(content, folder / name, **options)
    (folder / "config.json").write_text("{}")
    return folder


def sharded_folder(folder: Path, shards: list[dict[str, Tensor]]) -> Path:
    names = [f"pytorch_model-{i + 1:05d}-of-{len(shards):05d}.bin" for i in range(len(shards))]
    for name, content in zip(names, shards, strict=True):
        model_folder(folder, content, name)
    places = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))
    return folder


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def files_of(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


class Runs:
    """What a hostile pickle holds: a call, made while it is read."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
def test_every_tensor_keeps_its_name_and_value(tmp_path: Path, zipped: bool):
    tensors = some_tensors()
    folder = model_folder(
        tmp_path / "model", OrderedDict(tensors), _use_new_zipfile_serialization=zipped
    )
    done = convert(folder)
    assert done.files == ("model.safetensors",) and done.num_tensors == len(tensors)
    assert_same(load_file(folder / "model.safetensors"), tensors)
    assert files_of(folder) == {SINGLE, "config.json", "model.safetensors"}


def test_shards_become_shards_with_an_index(tmp_path: Path):
    shards = [{"a": torch.ones(2), "b": torch.zeros(3)}, {"c": torch.arange(4)}]
    folder = sharded_folder(tmp_path / "model", shards)
    done = convert(folder, tmp_path / "out")
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert done.files == (*names, "model.safetensors.index.json")
    assert files_of(tmp_path / "out") == {*done.files, "config.json"}
    for name, expected in zip(names, shards, strict=True):
        assert_same(load_file(tmp_path / "out" / name), expected)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {"a": names[0], "b": names[0], "c": names[1]}
    assert index["metadata"] == {"total_size": 8 + 12 + 32}
    assert not list(folder.glob("*.safetensors*"))


def test_code_in_a_pickle_is_refused_and_does_not_run(tmp_path: Path):
    trace = tmp_path / "trace"
    for number, content in enumerate(
        [
            Runs(os.system, f"touch {trace}"),
            {"weight": torch.ones(2), "other": Runs(os.system, f"touch {trace}")},
            {"weight": Runs(eval, f"open({str(trace)!r}, 'w')")},
            Runs(exec, f"open({str(trace)!r}, 'w')"),
        ]
    ):
        for zipped in (True, False):
            folder = model_folder(
                tmp_path / f"{number}{zipped}", content, _use_new_zipfile_serialization=zipped
            )
            with pytest.raises(RefusedError, match="holds code"):
                read_tensors(folder / SINGLE)
    bare = tmp_path / "bare.bin"
    bare.write_bytes(pickle.dumps(Runs(os.system, f"touch {trace}")))
    with pytest.raises(RefusedError):
        read_tensors(bare)
    assert not trace.exists()
    pickle.loads(bare.read_bytes())
    assert trace.exists()  # it would have


def test_a_hostile_file_is_one_line_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    trace = tmp_path / "trace"
    folder = model_folder(tmp_path / "model", {"a": Runs(os.system, f"touch {trace}")})
    # Nor are modules that lie beside it taken for those that they are called after.
    for name in ("torch.py", "json.py", "safetensors.py"):
        (folder / name).write_text(f"open({str(trace)!r}, 'w')")
    monkeypatch.chdir(folder)
    before = files_of(folder)
    with pytest.raises(SystemExit) as end:
        main(["convert", "."])
    said = capsys.readouterr()
    assert end.value.code == DamagedError.exit_code
    assert said.err.count("\n") == 1 and "holds code" in said.err and "system" in said.err
    assert not said.out and not trace.exists() and files_of(folder) == before


@pytest.mark.parametrize("place", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_truncated_file_is_refused(tmp_path: Path, zipped: bool, place: float):
    folder = model_folder(tmp_path / "model", some_tensors(), _use_new_zipfile_serialization=zipped)
    whole = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(whole[: int(len(whole) * place)])
    with pytest.raises(RefusedError):
        read_tensors(folder / SINGLE)


@pytest.mark.parametrize(
    "content",
    [
        torch.ones(2),
        [torch.ones(2)],
        {"a": torch.ones(2), "b": 3},
        {"state": {"a": torch.ones(2)}},
        {1: torch.ones(2)},
        {},
        {"a": torch.ones(2).to_sparse()},
        {"a": torch.ones(1).expand(10**9)},
        {"a": torch.ones(2, device="meta")},
    ],
    ids=lambda content: str(content)[:30],
)
def test_what_is_no_dictionary_of_tensors_is_refused(tmp_path: Path, content: Any):
    folder = model_folder(tmp_path / "model", content)
    with pytest.raises(RefusedError, match=r"it holds|no plain tensor|more elements"):
        read_tensors(folder / SINGLE)


def test_compressed_archives_are_refused(tmp_path: Path):
    folder = model_folder(tmp_path / "model", {"a": torch.zeros(1000)})
    packed = tmp_path / "packed.bin"
    with (
        zipfile.ZipFile(folder / SINGLE) as old,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    with pytest.raises(RefusedError, match="compressed"):
        read_tensors(packed)


def test_separate_tensors_share_nothing():
    tensors = some_tensors()
    found = separate(tensors)
    assert_same(found, tensors)
    places = [t.untyped_storage().data_ptr() for t in found.values() if t.numel()]
    assert len(set(places)) == len(places)


def test_a_pickle_that_asks_for_all_memory_gets_none(tmp_path: Path):
    """`bytearray(2**40)` is allowed by torch; the process has a limit."""
    folder = model_folder(tmp_path / "model", {"a": Runs(bytearray, 2**40)})
    with pytest.raises(DamagedError, match=r"memory|ended with|holds"):
        convert(folder)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 4 << 20
    assert files_of(folder) == {SINGLE, "config.json"}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("[]", "no weight_map"),
        ('{"weight_map": {}}', "names no file"),
        ('{"weight_map": {"a": "../other.bin"}}', "outside"),
        ('{"weight_map": {"a": "gone.bin"}}', "missing"),
        ('{"weight_map": {"a": 3}}', "no weight_map"),
        ('{"weight_map": {"a": "part.bin", "z": "part.bin"}}', "no tensor 'z'"),
    ],
)
def test_a_wrong_index_is_refused(tmp_path: Path, content: str, problem: str):
    folder = model_folder(tmp_path / "model", {"a": torch.ones(1)}, "part.bin")
    (folder / INDEX).write_text(content)
    torch.save({"a": torch.ones(1)}, tmp_path / "other.bin")
    with pytest.raises(DamagedError, match=problem):
        convert(folder)
    assert files_of(folder) == {"part.bin", "config.json", INDEX}


def test_what_there_is_nothing_to_convert_of(tmp_path: Path):
    with pytest.raises(UsageError, match="no such folder"):
        convert(tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="neither"):
        convert(tmp_path / "empty")
    folder = model_folder(tmp_path / "model", {"a": torch.ones(1)})
    with pytest.raises(UsageError, match="exists already"):
        convert(folder, tmp_path / "empty")
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(UsageError, match="safetensors already"):
        convert(folder)


def test_a_disk_without_room_is_one_line(tmp_path: Path):
    """Found out before anything is written, and by whoever writes where others write too."""
    folder = model_folder(tmp_path / "model", {"a": torch.ones(100_000)})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the limit is then an error of writing
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            convert(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert files_of(folder) == {SINGLE, "config.json"}


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path):
    folder = model_folder(tmp_path / "model", {"a": torch.ones(2)})
    (tmp_path / "file").write_text("")
    with pytest.raises((MachineError, OSError)):
        convert(folder, tmp_path / "file" / "out")
    assert files_of(folder) == {SINGLE, "config.json"}
