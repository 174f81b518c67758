"""Checkpoints: written whole or not at all, checked when written and when read.

    checkpoints/step-00001200/
      model.safetensors  optimizer.safetensors  pace.safetensors
      [average.safetensors]  [best.safetensors]
      manifest.json      format_version, scalars, SHA-256 and size of each file and of itself

A checkpoint is written to a new folder, every file flushed and read back, and committed by one
rename; older ones go only after that. Loaded tensors are copied into the model's own storage:
where a matrix starts in memory changes the last bits of its products.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hasten.core.errors import DamagedError, MachineError
from hasten.core.files import committed_folder, file_hash, machine_errors, remove_partials
from hasten.core.ranks import Ranks
from hasten.core.shards import copy_whole_, whole

FORMAT_VERSION = 1
_KEPT = 2


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds: groups of tensors by name, and scalars as JSON values."""

    tensors: dict[str, dict[str, Tensor]]
    scalars: dict[str, Any]


def save_checkpoint(folder: Path, step: int, checkpoint: Checkpoint) -> Path:
    """Writes ``folder/step-XXXXXXXX`` and removes all but the newest two.

    Raises:
        MachineError: the disk is full or cannot be written, or did not keep what was written.
    """
    path = folder / f"step-{step:08d}"
    with machine_errors("writing a checkpoint"), committed_folder(path) as partial:
        files = {}
        for name, tensors in checkpoint.tensors.items():
            file = partial / f"{name}.safetensors"
            _write_tensors(file, tensors)
            files[file.name] = {"sha256": file_hash(file), "size": file.stat().st_size}
            _check_written(file, tensors)
        manifest = {"format_version": FORMAT_VERSION, "files": files, **checkpoint.scalars}
        manifest["sha256"] = _own_hash(manifest)
        (partial / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    for old in committed_checkpoints(folder)[:-_KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return path


def committed_checkpoints(folder: Path) -> list[Path]:
    """Returns the checkpoints in a folder, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.name[5:].isdigit())


def load_newest_checkpoint(folder: Path) -> Checkpoint | None:
    """Reads the newest checkpoint; None where there is none.

    Raises:
        DamagedError: naming the file that is missing or altered, and what to do.
    """
    if folder.is_dir():
        remove_partials(folder)
    found = committed_checkpoints(folder)
    if not found:
        return None
    newest = found[-1]
    older = f"; remove {newest} to go on from {found[-2].name}" if len(found) > 1 else ""
    manifest = _read_manifest(newest, older)
    tensors = {}
    for name, expected in manifest.pop("files").items():
        file = newest / name
        if not file.is_file():
            raise DamagedError(f"{file}: missing from the checkpoint{older}.")
        if file.stat().st_size != expected["size"] or file_hash(file) != expected["sha256"]:
            raise DamagedError(f"{file}: not what was written (its SHA-256 differs){older}.")
        tensors[file.stem] = load_file(file)
    return Checkpoint(tensors, manifest)


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
    """Copies tensors into a module's own storage.

    Raises:
        DamagedError: names or shapes differ from the module's.
    """
    own = dict(module.state_dict())
    for name in sorted(set(own) ^ set(tensors)):
        problem = "is missing from" if name in own else "is not part of the model but in"
        raise DamagedError(f"tensor '{name}' {problem} {what}.")
    with torch.no_grad():
        for name, target in own.items():
            if target.shape != tensors[name].shape:
                raise DamagedError(
                    f"tensor '{name}' in {what} has shape {tuple(tensors[name].shape)}, "
                    f"the model expects {tuple(target.shape)}."
                )
            copy_whole_(target, tensors[name])


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
    if manifest.get("format_version") != FORMAT_VERSION:
        raise DamagedError(
            f"{file}: format version {manifest.get('format_version')}; this hasten reads "
            f"{FORMAT_VERSION}."
        )
    return manifest


def _own_hash(manifest: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of the manifest's content, without the hash itself."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    # safetensors refuses tensors that share storage, so each is written on its own.
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, file)


def _check_written(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Reads a file back and compares it bit for bit."""
    read = load_file(file)
    for name, tensor in tensors.items():
        if not torch.equal(_bits(read[name]), _bits(tensor)):
            raise MachineError(f"{file}: the disk did not keep what was written to '{name}'.")


def _bits(tensor: Tensor) -> Tensor:
    # Compared as bytes, since NaN differs from itself and -0.0 equals 0.0. The dim that is cut into
    # bytes is a new one: those of a tensor of no or one element may have a stride other than 1.
    return tensor.detach().cpu().unsqueeze(-1).view(torch.uint8)
