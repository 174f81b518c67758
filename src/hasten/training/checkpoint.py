"""Checkpoints: written whole or not at all, checked when written and when read.

    checkpoints/step-00001200/
      model.safetensors  optimizer.safetensors  pace.safetensors
      [average.safetensors]  [best.safetensors]
      manifest.json      format_version, scalars, SHA-256 and size of each file and of itself

Of several processes each writes files of its own, ``model-00002-of-00004.safetensors``, with the
parts of tensors that it holds. The format is that of ``torch.distributed.checkpoint``'s safetensors
storage, whose reader and planner find the parts that a process needs, in any layout. Its writer is
not used: as of torch 2.13 it makes two more copies of what it writes in memory, and holds Python's
lock meanwhile, so that training would stand still.

How one comes about is in ``saving``.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hasten.core.errors import DamagedError, MachineError
from hasten.core.files import file_hash, remove_partials, sync_folder, sync_tree
from hasten.core.ranks import ALONE, Ranks
from hasten.core.shards import copy_whole_, whole

if TYPE_CHECKING:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import Metadata

FORMAT_VERSION = 2
_KEPT = 2

FileFacts = dict[str, dict[str, Any]]
"""By a file's name: its ``group``, ``sha256`` and ``size``."""


@dataclass(frozen=True)
class Part:
    """What one process writes of a tensor.

    Attributes:
        tensor: on the host and contiguous.
        offsets: where it begins in the whole tensor, along each dim.
    """

    tensor: Tensor
    offsets: tuple[int, ...]


class Checkpoint:
    """A checkpoint to read from; each process takes what it needs of it.

    Args:
        path: of the checkpoint.
        files: those to read, verified.
        scalars: JSON values.
        ranks: the processes that read.

    Attributes:
        scalars: JSON values.
        tensors: shape and type of each whole tensor by group and name, without content.
    """

    def __init__(
        self, path: Path, files: FileFacts, scalars: dict[str, Any], ranks: Ranks = ALONE
    ) -> None:
        self.scalars, self._ranks = scalars, ranks
        self.tensors: dict[str, dict[str, Tensor]] = {}
        self._stored: dict[str, tuple[HuggingFaceStorageReader, Metadata]] = {}
        for group in sorted({facts["group"] for facts in files.values()}):
            names = [str(path / name) for name, facts in files.items() if facts["group"] == group]
            reader, metadata = _open_files(path, names)
            self._stored[group] = reader, metadata
            self.tensors[group] = {
                name: torch.empty(one.size, dtype=one.properties.dtype, device="meta")
                for name, one in sorted(_tensors_of(metadata).items())
            }

    @torch.no_grad()
    def read(self, group: str, targets: Mapping[str, Tensor]) -> None:
        """Copies tensors of a group into others, of which a process may have only parts.

        All processes have to take part, each with the names it has; nothing but the names is sent.

        Args:
            group: of the checkpoint.
            targets: by name; they keep their storage, type and place.

        Raises:
            DamagedError: names of all processes together, or a shape, differ from the saved ones.
        """
        # Loaded here: it takes a second, which a process that only predicts need not pay.
        from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

        saved = self.tensors.get(group, {})
        wanted = {name for names in self._ranks.gather(list(targets)) for name in names}
        for name in sorted(wanted ^ saved.keys()):
            problem = "is missing from" if name in wanted else "is not part of the model but in"
            _refuse(f"tensor '{name}' {problem} the checkpoint.", self._ranks)
        for name, target in targets.items():
            _check_shape(name, target, saved[name], "the checkpoint")
        if not targets:
            return
        reader, metadata = self._stored[group]
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(dict(targets), metadata)
        reader.set_up_storage_reader(metadata, is_coordinator=True)
        reader.read_data(planner.create_local_plan(), planner)


def open_newest_checkpoint(folder: Path, ranks: Ranks = ALONE) -> Checkpoint | None:
    """Verifies the newest checkpoint and opens it; None where there is none.

    Rank 0 decides which it is; the files are hashed by all processes, a share each.

    Raises:
        DamagedError: naming the file that is missing or altered, and what to do.
    """
    found = ranks.on_main(lambda: _read_newest_manifest(folder))
    if found is None:
        return None
    name, manifest, older = found
    files: FileFacts = manifest.pop("files")
    own = [_problem(folder / name / file, facts) for file, facts in ranks.share([*files.items()])]
    for problems in ranks.gather([problem for problem in own if problem]):
        for problem in problems:
            _refuse(f"{problem}{older}.", ranks)
    return Checkpoint(folder / name, files, manifest, ranks)


def committed_checkpoints(folder: Path) -> list[Path]:
    """Returns the checkpoints in a folder, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.name[5:].isdigit())


def write_parts(folder: Path, groups: Mapping[str, Mapping[str, Part]], suffix: str) -> FileFacts:
    """Writes one process's parts, a file for each group, and reads them back.

    Args:
        folder: that is not yet a checkpoint.
        groups: parts by group and name.
        suffix: of the files' names, by which processes differ.

    Raises:
        OSError, SafetensorError: the disk is full or cannot be written.
        MachineError: it did not keep what was written.
    """
    files: FileFacts = {}
    for group, parts in groups.items():
        file = folder / f"{group}{suffix}.safetensors"
        _write_file(file, parts)
        with file.open("rb+") as written:
            os.fsync(written.fileno())
        size = file.stat().st_size
        files[file.name] = {"group": group, "sha256": file_hash(file), "size": size}
        _check_written(file, parts)
    return files


def commit_checkpoint(
    partial: Path, path: Path, files: FileFacts, scalars: Mapping[str, Any]
) -> None:
    """Makes a folder in which all files are written a checkpoint; removes all but the newest two.

    Args:
        partial: the folder.
        path: what it becomes, in one rename.
        files: in it.
        scalars: JSON values.

    Raises:
        OSError: the disk is full or cannot be written; then nothing is left of the folder.
    """
    try:
        manifest = {"format_version": FORMAT_VERSION, "files": files, **scalars}
        manifest["sha256"] = _own_hash(manifest)
        (partial / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        sync_tree(partial)
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync_folder(path.parent)
    for old in committed_checkpoints(path.parent)[:-_KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def gather_tensors(tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """Returns whole tensors, on rank 0 only where there are several processes.

    They are gathered one by one, so that rank 0 alone holds them all, on the host.
    """
    if ranks.size == 1:
        return dict(tensors)
    gathered: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        one = whole(tensor)
        if ranks.rank % ranks.stage_size == 0:
            gathered[name] = one.detach().cpu().contiguous()
    return gathered if ranks.stage_size == ranks.size else ranks.collect(gathered)


def copy_into(module: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    """Copies tensors into a module's own storage: where a matrix starts changes its products.

    Raises:
        DamagedError: names or shapes differ from the module's.
    """
    own = dict(module.state_dict())
    for name in sorted(set(own) ^ set(tensors)):
        problem = "is missing from" if name in own else "is not part of the model but in"
        raise DamagedError(f"tensor '{name}' {problem} {what}.")
    with torch.no_grad():
        for name, target in own.items():
            _check_shape(name, target, tensors[name], what)
            copy_whole_(target, tensors[name])


def _check_shape(name: str, target: Tensor, given: Tensor, what: str) -> None:
    if target.shape != given.shape:
        raise DamagedError(
            f"tensor '{name}' in {what} has shape {tuple(given.shape)}, "
            f"the model expects {tuple(target.shape)}."
        )


def _refuse(problem: str, ranks: Ranks) -> None:
    """Ends all processes for something that all of them know; one says so."""

    def refuse() -> NoReturn:
        raise DamagedError(problem)

    ranks.on_main(refuse)


def _open_files(path: Path, names: list[str]) -> tuple[HuggingFaceStorageReader, Metadata]:
    """Opens the files of one group, and no others that may have come into the folder."""
    from torch.distributed.checkpoint.filesystem import FileSystem
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    class Listed(FileSystem):
        def ls(self, path: str | os.PathLike[str]) -> list[str]:
            del path
            return names

    reader = HuggingFaceStorageReader(str(path))
    reader.fs = Listed()
    return reader, reader.read_metadata()


def _tensors_of(metadata: Metadata) -> dict[str, Any]:
    return metadata.state_dict_metadata


def _read_newest_manifest(folder: Path) -> tuple[str, dict[str, Any], str] | None:
    """Returns the newest checkpoint's name and manifest, and what to do should it be damaged."""
    if folder.is_dir():
        remove_partials(folder)
    found = committed_checkpoints(folder)
    if not found:
        return None
    newest = found[-1]
    older = f"; remove {newest} to go on from {found[-2].name}" if len(found) > 1 else ""
    return newest.name, _read_manifest(newest, older), older


def _read_manifest(path: Path, older: str) -> dict[str, Any]:
    file = path / "manifest.json"
    try:
        text = file.read_text(encoding="utf-8")
        manifest = json.loads(text)
    except (OSError, ValueError):
        raise DamagedError(f"{file}: missing or not JSON{older}.") from None
    # A digit too many to matter to a number is damage too.
    is_as_written = isinstance(manifest, dict) and json.dumps(manifest) == text
    if not is_as_written or manifest.pop("sha256", None) != _own_hash(manifest):
        raise DamagedError(f"{file}: not what was written (its SHA-256 differs){older}.")
    version = manifest.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise DamagedError(f"{file}: format version {version}; this hasten reads {FORMAT_VERSION}.")
    return manifest


def _own_hash(manifest: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of the manifest's content, without the hash itself."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _problem(file: Path, expected: Mapping[str, Any]) -> str:
    """Says in what a file is not the one that was written; nothing where it is."""
    if not file.is_file():
        return f"{file}: missing from the checkpoint"
    if file.stat().st_size != expected["size"] or file_hash(file) != expected["sha256"]:
        return f"{file}: not what was written (its SHA-256 differs)"
    return ""


def _write_file(file: Path, parts: Mapping[str, Part]) -> None:
    """Writes parts as torch's ``HuggingFaceStorageWriter`` does: their places in the header."""
    places = {name: {"saved_offsets": part.offsets} for name, part in parts.items()}
    header = {"DCP_SHARDING_INFO": json.dumps(places), "DCP_VERSION": "1.0", "format": "pt"}
    save_file({name: part.tensor for name, part in parts.items()}, file, metadata=header)


def _check_written(file: Path, parts: Mapping[str, Part]) -> None:
    """Reads a file back and compares it bit for bit."""
    with safe_open(file, framework="pt") as read:
        for name, part in parts.items():
            if not torch.equal(_bits(read.get_tensor(name)), _bits(part.tensor)):
                raise MachineError(f"{file}: the disk did not keep what was written to '{name}'.")


def _bits(tensor: Tensor) -> Tensor:
    # Compared as bytes, since NaN differs from itself and -0.0 equals 0.0. The dim that is cut into
    # bytes is a new one: those of a tensor of no or one element may have a stride other than 1.
    return tensor.unsqueeze(-1).view(torch.uint8)
