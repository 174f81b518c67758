"""`hasten convert`: weights in pickle become safetensors, the one format that is read elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from hasten.cli.console import count, say


def convert(
    folder: str = typer.Argument(..., help="Model folder with pytorch_model.bin."),
    output: str = typer.Option(
        None, "-o", "--output", metavar="FOLDER", help="New folder [the same]."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object and nothing else."),
) -> None:
    """Turn pickled weights, which can hold code, into safetensors, which cannot.

    Names and values stay as they are. Code in the pickle is not run: such a file is refused.
    """
    from hasten.training.conversion import convert as convert_folder

    done = convert_folder(Path(folder), None if output is None else Path(output))
    if as_json:
        content = {"folder": str(done.folder), "files": done.files, "num_tensors": done.num_tensors}
        typer.echo(json.dumps(content, ensure_ascii=False))
        return
    files = done.files[0] if len(done.files) == 1 else count(len(done.files), "file")
    say(f"{done.folder}: {count(done.num_tensors, 'tensor')} written to {files}")
