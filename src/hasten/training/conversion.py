"""`hasten convert`: a model folder whose weights are pickle gets them as safetensors.

    pytorch_model.bin                     --> model.safetensors
    pytorch_model.bin.index.json, shards  --> model-00001-of-00002.safetensors ..., their index

Each file is read in a process of its own (``unpickling.py``), which a damaged or hostile one may
take down with it. What is written appears by renaming, wholly or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hasten.core.errors import DamagedError, UsageError
from hasten.core.files import committed_folder, machine_errors, sync_folder, sync_tree
from hasten.model.pretrained.reading import INDEX, PICKLED, WEIGHTS

# What Python and torch take before they read anything, and some room to work in.
_OWN_MEMORY = 4 << 30
# A file is mapped; copied at worst once when it is read and once when it is written.
_COPIES = 3
_SECONDS_PER_GIB = 600


@dataclass(frozen=True)
class Converted:
    """What was written.

    Attributes:
        folder: where.
        files: names, the index last.
        num_tensors: in all of them.
    """

    folder: Path
    files: tuple[str, ...]
    num_tensors: int


def convert(folder: Path, output: Path | None = None) -> Converted:
    """Writes the pickled weights of a folder as safetensors.

    Args:
        folder: a model folder.
        output: new folder for them and copies of the other files; None for beside the pickle.

    Raises:
        UsageError: there is nothing to convert, or it is done already.
        DamagedError: a file is not whole, holds code, or holds no dictionary of tensors.
        MachineError: disk or permission.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder.")
    done = next((name for name in (WEIGHTS, INDEX) if (folder / name).is_file()), None)
    if done is not None:
        raise UsageError(f"{folder}: its weights are safetensors already ({done}).")
    parts = _pickled_files(folder)
    if output is None:
        with machine_errors("converting"), _appearing_in(folder) as partial:
            return _convert_into(partial, folder, parts, folder)
    if output.exists():
        raise UsageError(f"{output} exists already: choose another --output.")
    with machine_errors("converting"), committed_folder(output, replace=False) as partial:
        for path in sorted(folder.iterdir()):
            if path.is_file() and not path.name.startswith("pytorch_model"):
                shutil.copyfile(path, partial / path.name)
        return _convert_into(partial, folder, parts, output)


def _pickled_files(folder: Path) -> Mapping[str, set[str] | None]:
    """Returns the names of the pickled files, each with those of the tensors said to be in it."""
    single, index = PICKLED
    if (folder / single).is_file():
        return {single: None}
    if not (folder / index).is_file():
        raise UsageError(f"{folder}: there is neither {single} nor {index} to convert.")
    try:
        content = json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"]
        shards: dict[str, set[str]] = {}
        for name, file in content.items():
            if Path(file).name != file or file in ("", ".", ".."):
                raise DamagedError(
                    f"{folder / index}: names a file outside of the folder: {file!r}."
                )
            if not (folder / file).is_file():
                raise DamagedError(f"{folder / file}: missing, but the index names it.")
            shards.setdefault(file, set()).add(name)
    except DamagedError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DamagedError(f"{folder / index}: has no weight_map of names and files.") from None
    if not shards:
        raise DamagedError(f"{folder / index}: names no file.")
    return dict(sorted(shards.items()))


def _convert_into(
    partial: Path, folder: Path, parts: Mapping[str, set[str] | None], final: Path
) -> Converted:
    """Writes into ``partial`` what is to be in ``final``."""
    names = [WEIGHTS]
    if len(parts) > 1 or None not in parts.values():
        names = [
            f"model-{number:05d}-of-{len(parts):05d}.safetensors"
            for number in range(1, len(parts) + 1)
        ]
    places: dict[str, str] = {}
    total = 0
    for (file, expected), name in zip(parts.items(), names, strict=True):
        found = _in_own_process(folder / file, partial / name)
        if missing := sorted((expected or set()) - {*found["names"]}):
            raise DamagedError(
                f"{folder / file}: has no tensor '{missing[0]}', which the index puts there."
            )
        if twice := sorted(places.keys() & {*found["names"]}):
            raise DamagedError(f"{folder / file}: tensor '{twice[0]}' is in another file too.")
        places |= dict.fromkeys(found["names"], name)
        total += found["num_bytes"]
    if names != [WEIGHTS]:
        content = {"metadata": {"total_size": total}, "weight_map": places}
        text = json.dumps(content, ensure_ascii=False, indent=2) + "\n"
        (partial / INDEX).write_text(text, encoding="utf-8")
        names.append(INDEX)
    return Converted(final, tuple(names), len(places))


@contextmanager
def _appearing_in(folder: Path) -> Iterator[Path]:
    """Yields an empty folder inside of one, whose files move into that when the block has ended."""
    partial = folder / f"{WEIGHTS}.partial-{os.getpid()}"
    partial.mkdir()
    try:
        yield partial
        sync_tree(partial)
        # The index, by which the others are found, comes last.
        for path in sorted(partial.iterdir(), key=lambda path: path.name == INDEX):
            path.rename(folder / path.name)
        sync_folder(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _in_own_process(source: Path, target: Path) -> dict[str, Any]:
    """Converts one file; returns the names of its tensors and their bytes."""
    size = source.stat().st_size
    memory = _OWN_MEMORY + _COPIES * size
    # Without -P, Python would look for modules in the working folder: the model's, perhaps.
    module = [sys.executable, "-P", "-m", "hasten.training.unpickling"]
    seconds = 120 + _SECONDS_PER_GIB * size / 2**30
    try:
        done = subprocess.run(
            [*module, str(source.absolute()), str(target.absolute()), str(memory)],
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        raise DamagedError(f"{source}: reading it took over {seconds:.0f} seconds.") from None
    try:
        found = json.loads(done.stdout)
    except ValueError:
        how = f"exit code {done.returncode}"
        if done.returncode < 0:
            how = signal.Signals(-done.returncode).name
        raise DamagedError(f"{source}: the process that read it ended with {how}.") from None
    if "errno" in found:
        raise OSError(found["errno"], os.strerror(found["errno"]))
    if "error" in found:
        raise DamagedError(f"{source}: {found['error']}.")
    return found
