"""`hasten export`: a finished run as a folder that other programs load.

    run --huggingface--> config.json, model.safetensors, tokenizer, README.md    (transformers)
        --onnx---------> model.onnx, inputs.json, tokenizer                      (ONNX runtimes)

The folder appears by one rename, wholly or not at all.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hasten.core.errors import UsageError, nearest
from hasten.core.files import committed_folder, machine_errors
from hasten.model.pretrained.writing import family_for
from hasten.training.card import model_card
from hasten.training.export_onnx import export_onnx
from hasten.training.folder import read_folder
from hasten.training.run import Run
from hasten.training.saved import CONFIG, OWN_FILE, WEIGHTS


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        folder: where.
        files: names of its files.
        note: what a person should know of it.
    """

    folder: Path
    files: tuple[str, ...]
    note: str


def export_run(run: str | Path, to: str, output: str | Path | None = None) -> Exported:
    """Exports a finished run.

    Args:
        run: its folder.
        to: huggingface or onnx.
        output: a new folder; that of the run and the name of the format by default.

    Raises:
        UsageError: no such format, not a finished run, a folder that exists, or options of the
            model that no transformers class has.
        DamagedError: a file of the run is missing or altered.
        MachineError: disk, permission, or a missing extra.
        MismatchError: an ONNX runtime computes something else.
    """
    if to not in _FORMATS:
        raise UsageError(
            f"--to {to}: choose one of {', '.join(_FORMATS)}.{nearest(to, list(_FORMATS))}"
        )
    loaded = Run(run, "cpu")
    folder = loaded.folder / to if output is None else Path(output)
    taken = UsageError(f"{folder} exists already: choose another --output.")
    if folder.exists():
        raise taken
    try:
        with machine_errors("exporting"), committed_folder(folder, replace=False) as partial:
            note = _FORMATS[to](loaded, partial)
            files = tuple(sorted(path.name for path in partial.iterdir()))
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise taken from None
        raise
    return Exported(folder, files, note)


_OWN_POOLING = "--model.pooling first, as the pretrained model's class does,"


def _to_huggingface(run: Run, folder: Path) -> str:
    """Copies the model folder, which is in this layout where that can be, and adds the card."""
    architecture = run.saved.model.config
    config, data = read_folder(run.folder)
    try:
        family = family_for(architecture)
    except UsageError as error:
        keeps_class = "--preset portable" if config.model.pretrained is None else _OWN_POOLING
        raise UsageError(
            f"{str(error).rstrip('.')}. A run with {keeps_class} can be exported; ONNX takes "
            "this one: --to onnx."
        ) from None
    for path in (run.folder / "model").iterdir():
        if path.name != OWN_FILE:
            shutil.copyfile(path, folder / path.name)
    card = model_card(run.folder.absolute().name, config, architecture, run.result, data)
    (folder / "README.md").write_text(card, encoding="utf-8")
    return f"{family.classes[architecture.head]} of transformers loads it"


def _to_onnx(run: Run, folder: Path) -> str:
    checked = export_onnx(run.saved, folder)
    for path in (run.folder / "model").iterdir():
        if path.name not in (OWN_FILE, CONFIG, WEIGHTS):
            shutil.copyfile(path, folder / path.name)
    return (
        f"onnxruntime gives the same scores to {checked.relative_error:.0e} of the largest, on "
        f"{checked.num_batches} ragged batches"
    )


_FORMATS: dict[str, Callable[[Run, Path], str]] = {
    "huggingface": _to_huggingface,
    "onnx": _to_onnx,
}
