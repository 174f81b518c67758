"""Reads one file of pickled tensors, in a process of its own, and writes it as safetensors.

    python -P -m hasten.training.unpickling FILE.bin OUT.safetensors MEMORY_BYTES
        -> one JSON object on standard output: {"names": [...], "num_bytes": n} or {"error": "..."}

A pickle is a program. Here only what builds tensors is run (``weights_only``), in a process without
the memory for anything else; whatever it does, the process that asked goes on. This is the one
place that reads pickle.
"""

from __future__ import annotations

import contextlib
import errno
import json
import re
import resource
import shutil
import sys
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


class RefusedError(Exception):
    """The file is not what it should be; the message says in what."""


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of a pickled file by name, mapped from it where that can be.

    Raises:
        RefusedError: it holds anything but a dictionary of tensors, or is not whole.
    """
    is_zip = zipfile.is_zipfile(path)
    if is_zip:
        _check_archive(path)
    try:
        # Formats of before torch 1.6 are no archives and cannot be mapped.
        content: Any = torch.load(path, weights_only=True, map_location="cpu", mmap=is_zip)
    except MemoryError:
        raise RefusedError("it asks for far more memory than its size explains") from None
    except Exception as error:  # of pickle, of torch and of whatever it calls
        raise RefusedError(_reason(str(error))) from None
    if not isinstance(content, Mapping):
        raise RefusedError(f"it holds a {type(content).__name__}, not names with their tensors")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            kind = type(value).__name__
            raise RefusedError(
                f"it holds a {kind} under {name!r:.60}, not names with their tensors"
            )
        _check_tensor(name, value)
    if not content:
        raise RefusedError("it holds no tensors")
    return dict(content)


def separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns tensors none of which shares memory, so that each is written under its own name."""
    seen: set[int] = set()
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        plain = tensor.detach()
        found[name] = plain.clone() if place in seen else plain.contiguous()
        seen.add(place)
    return {name: tensor.contiguous() for name, tensor in found.items()}


def _check_archive(path: Path) -> None:
    """Refuses archives that torch does not write: what is packed small may unpack to anything."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise RefusedError(f"it is damaged or cut short ({error})") from None
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise RefusedError("it is a compressed archive, which torch never writes")
    if not any(entry.filename.endswith("data.pkl") for entry in entries):
        raise RefusedError("it is an archive of something else")


def _check_tensor(name: str, tensor: Tensor) -> None:
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
    if not plain or tensor.is_quantized or tensor.device.type != "cpu":
        raise RefusedError(f"'{name}' is no plain tensor")
    # A shape with strides of 0 makes any size of a few bytes.
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise RefusedError(f"'{name}' has more elements than the file holds of it")


def _reason(said: str) -> str:
    """Returns what is wrong with a file, from what torch said of it."""
    if found := re.search(r"(?:[Uu]nsupported global: |unsupported )GLOBAL (\S+)", said):
        return f"it holds code ({found[1]}), which is never run here"
    if "weights_only" in said or "Weights only load failed" in said:
        return "it holds more than tensors, or is no file of torch's"
    return f"it is damaged or cut short ({' '.join(said.split())[:120]})"


def _convert(source: Path, target: Path) -> dict[str, Any]:
    try:
        tensors = read_tensors(source)
        num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if num_bytes > shutil.disk_usage(target.parent).free:
            return {"errno": errno.ENOSPC, "error": f"{num_bytes:,} bytes"}
        save_file(separate(tensors), target, metadata={"format": "pt"})
    except RefusedError as error:
        return {"error": str(error)}
    except MemoryError:
        return {"error": "it asks for far more memory than its size explains"}
    except OSError as error:
        return {"errno": error.errno or errno.EIO, "error": error.strerror}
    except SafetensorError as error:
        # It passes on the system's errors as text.
        number = re.search(r"\(os error (\d+)\)", str(error))
        return {"error": str(error), **({"errno": int(number[1])} if number else {})}
    except RuntimeError as error:  # torch's way of saying that memory ran out
        return {"error": " ".join(str(error).split())[:120]}
    return {"names": list(tensors), "num_bytes": num_bytes}


def _limit_memory(num_bytes: int) -> None:
    """Bounds what the process may take; a platform that does not know the limit has none."""
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_DATA, (num_bytes, num_bytes))
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    _limit_memory(int(sys.argv[3]))
    print(json.dumps(_convert(Path(sys.argv[1]), Path(sys.argv[2]))))
