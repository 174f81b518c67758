"""The run folder: what is written before the first step, and reading it back.

    runs/NAME/  config.yaml architecture.json plan.json data.json environment.json rejected.jsonl
                tokenizer.json metrics.jsonl checkpoints/ model/ result.json
                [start.safetensors, until it is finished: what a pretrained model begins with]

The folder appears in one rename, complete; a run that fails before its first step leaves nothing.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hasten.config.load import build_config, config_to_yaml, replace_values, unsettled_keys
from hasten.config.schema import DataConfig, RunConfig
from hasten.core.errors import (
    DamagedError,
    DataError,
    HastenError,
    MachineError,
    UsageError,
)
from hasten.core.files import FileLock, committed_folder, file_hash, machine_errors, write_text
from hasten.data.cache import cache_folder
from hasten.model.transformer import Transformer
from hasten.training.architecture import save_architecture
from hasten.training.inherited import write_inherited
from hasten.training.machine import describe_machine
from hasten.training.planned import Plan
from hasten.training.prepare import PreparedData
from hasten.training.saved import save_tokenizers
from hasten.training.sources import aligned_paths, expand
from hasten.training.start import write_start

_LOCK_NAME = ".lock"
_SUFFIXES = r"(\.(csv|tsv|jsonl|ndjson|json|parquet|txt|text|gz))+$"
_SPLITS = ("train", "validation", "test")


def choose_folder(output: str | Path | None, config: DataConfig) -> Path:
    """Returns the folder of a new run: ``output``, else runs/<data>-<n>.

    Raises:
        UsageError: it exists already.
    """
    if output is not None:
        folder = Path(output)
        if folder.exists():
            going_on = f", or go on with --resume {folder}" * (folder / "config.yaml").is_file()
            raise UsageError(f"{folder} exists already: choose another --output{going_on}.")
        _refuse_under_file(folder)
        return folder
    _refuse_under_file(Path("runs") / "x")
    first = next(iter(config.train or ()), config.source) or ""
    stem = re.sub(_SUFFIXES, "", Path(first).name)
    stem = re.sub(r"[^\w.-]+", "", stem) or "stdin"
    number = 1
    while (folder := Path("runs") / f"{stem}-{number}").exists():
        number += 1
    return folder


def _refuse_under_file(folder: Path) -> None:
    parent = next(parent for parent in folder.absolute().parents if parent.exists())
    if not parent.is_dir():
        raise UsageError(f"{parent} is a file, not a folder: choose another --output.")


def create_folder(folder: Path, plan: Plan, start: Transformer | None = None) -> RunConfig:
    """Writes a new run folder; returns the configuration with the final paths of its data.

    Args:
        folder: to be made.
        plan: of the run.
        start: the model with the weights to begin with, where they are not to be drawn anew.

    Raises:
        MachineError: the folder cannot be written.
        UsageError: another process has created it in the meantime.
    """
    data = plan.data
    with _refuse_taken(folder), committed_folder(folder, replace=False) as partial:
        config = _settle_paths(plan.config, folder, partial)
        (partial / "config.yaml").write_text(config_to_yaml(config), encoding="utf-8")
        save_architecture(partial, plan.architecture)
        _write_json(partial / "plan.json", [asdict(choice) for choice in plan.choices])
        content = describe_data(config, data, partial, folder)
        if plan.pretrained is not None:
            content["pretrained"] = plan.pretrained.describe()
            begun = plan.pretrained
            write_inherited(partial, begun.folder, begun.framing, begun.names)
        _write_json(partial / "data.json", content)
        _write_json(partial / "environment.json", describe_machine(plan.device))
        with (partial / "rejected.jsonl").open("w", encoding="utf-8") as file:
            for rejected in data.sources.rejected:
                file.write(json.dumps(asdict(rejected), ensure_ascii=False) + "\n")
        with library_errors():
            save_tokenizers(partial, data.task.tokenizers)
            if start is not None:
                write_start(partial, start)
        (partial / "checkpoints").mkdir()
    return config


@contextmanager
def _refuse_taken(folder: Path) -> Iterator[None]:
    with machine_errors("creating the run folder"):
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            raise UsageError(
                f"{folder} has been created by another process in the meantime: start again, or "
                "choose another --output."
            ) from None


def read_folder(folder: Path) -> tuple[RunConfig, dict[str, Any]]:
    """Reads the configuration and data.json of a run.

    Raises:
        UsageError: it is not a run folder.
        DamagedError: a file in it cannot be read.
    """
    if not (folder / "config.yaml").is_file():
        raise UsageError(f"{folder} is not a run folder (it has no config.yaml).")
    try:
        config = build_config(file=folder / "config.yaml")
        data = json.loads((folder / "data.json").read_text(encoding="utf-8"))
    except (UsageError, OSError, ValueError) as error:
        raise DamagedError(f"{folder} cannot be read: {error}") from None
    if left := unsettled_keys(config):
        raise DamagedError(
            f"{folder} cannot be read: config.yaml is not whole, {left[0]} has no value."
        )
    return config, data


def check_data_unchanged(data: dict[str, Any]) -> None:
    """Compares the data files with what the run began with.

    Raises:
        DataError: naming the file that is gone or changed.
    """
    for entry in data["files"]:
        path = Path(entry["path"])
        if not path.is_file():
            raise DataError(f"{path}: the run's data file is gone; put it back to resume.")
        if file_hash(path) != entry["sha256"]:
            raise DataError(
                f"{path} has changed since the run began (its SHA-256 differs); put the old file "
                "back to resume, or start a new run."
            )


def lock_folder(folder: Path) -> FileLock:
    """Keeps other processes out of a run folder until the lock is released.

    Raises:
        MachineError: another process holds it, or the folder is read-only.
    """
    with machine_errors("locking the run folder"):
        lock = FileLock(folder / _LOCK_NAME)
        if not lock.acquire():
            raise MachineError(
                f"{folder} is in use by process {lock.holder()}; wait for it or stop it first."
            )
    return lock


@contextmanager
def library_errors() -> Iterator[None]:
    """Raises as ``OSError`` what safetensors and tokenizers report of a disk in their own types.

    Needed as long as the text of their errors (safetensors 0.8, tokenizers 0.23) is all that says
    so.
    """
    try:
        yield
    except Exception as error:
        found = re.search(r"\(os error (\d+)\)", str(error))
        if found is None or isinstance(error, OSError | HastenError):
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1]))) from error


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """Replaces result.json."""
    with machine_errors("writing the result"):
        write_text(folder / "result.json", to_json(result, indent=2) + "\n")


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Returns JSON text; a number that is not finite becomes null, as JSON has none."""
    return json.dumps(_finite(value), ensure_ascii=False, indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def describe_data(
    config: RunConfig, data: PreparedData, partial: Path, folder: Path
) -> dict[str, Any]:
    """Returns what the run read, as JSON values: files with their hashes, columns, counts."""
    files = []
    for split in data.sources.corpora:
        for path in map(Path, _paths(config.data, split)):
            inside = path.parent == folder.absolute()  # it came from standard input
            digest = file_hash(partial / path.name if inside else path)
            files.append({"split": split, "path": str(path), "sha256": digest})
    reading = data.sources.reading
    return {
        "files": files,
        "rows": {
            name: {
                "read": corpus.num_read,
                "used": len(corpus),
                "rejected": len(corpus.rejected),
            }
            for name, corpus in data.sources.corpora.items()
        },
        "columns": list(reading.columns),
        "label_column": reading.label,
        "num_examples": {name: len(split) for name, split in data.splits.items()},
        "num_tokens": {name: int(split.lengths.sum()) for name, split in data.splits.items()},
        **data.task.to_json(),
    }


def _paths(config: DataConfig, split: str) -> list[str]:
    """Returns the files of a split; patterns are expanded already."""
    return [*(getattr(config, split) or ()), *aligned_paths(config, split)]


def _settle_paths(config: RunConfig, folder: Path, partial: Path) -> RunConfig:
    """Makes paths absolute; what came from standard input moves into the run folder."""
    values: dict[str, Any] = {}
    for split in _SPLITS:
        if paths := getattr(config.data, split):
            settled = [_settle(Path(path), folder, partial) for path in expand(paths)]
            values[f"data.{split}"] = tuple(settled)
        prefix = "" if split == "train" else f"{split}_"
        for side, path in zip(
            ("source", "target"), aligned_paths(config.data, split), strict=False
        ):
            values[f"data.{prefix}{side}"] = str(Path(path).absolute())
    if config.model.pretrained is not None and Path(config.model.pretrained).is_dir():
        values["model.pretrained"] = str(Path(config.model.pretrained).absolute())
    return replace_values(config, values)


def _settle(path: Path, folder: Path, partial: Path) -> str:
    path = path.absolute()
    if path.is_relative_to(cache_folder().absolute()):
        shutil.copyfile(path, partial / path.name)
        path = folder.absolute() / path.name
    return str(path)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
