"""The weights that a fine-tuned run begins with, in its folder.

Transformer --write_start--> start.safetensors --read_start--> Transformer of each process

They are written before the first step, adapters included, so that nothing needs the folder of the
pretrained model any more: not the other processes, and not a run that is gone on with before its
first checkpoint. They are removed when the run is finished.
"""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hasten.core.errors import DamagedError
from hasten.model.transformer import Transformer
from hasten.training.checkpoint import committed_checkpoints, copy_into

_FILE = "start.safetensors"


def write_start(folder: Path, model: Transformer) -> None:
    """Writes the weights that a run begins with.

    Raises:
        OSError, SafetensorError: they cannot be written.
    """
    tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    save_file(tensors, folder / _FILE, metadata={"format": "pt"})


def read_start(folder: Path, model: Transformer) -> None:
    """Reads the weights that a run begins with, where they are still needed.

    Raises:
        DamagedError: they are not those of the model.
    """
    file = folder / _FILE
    if not file.is_file() or committed_checkpoints(folder / "checkpoints"):
        return
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise DamagedError(f"{file}: cannot be read: {error}.") from None
    copy_into(model, tensors, str(file))


def remove_start(folder: Path) -> None:
    """Removes the weights that a run began with."""
    (folder / _FILE).unlink(missing_ok=True)
