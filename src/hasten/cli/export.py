"""`hasten export`: a run as a folder for transformers, or as ONNX."""

from __future__ import annotations

import json

import typer

from hasten.cli.console import say


def export(
    run: str = typer.Argument(..., help="Run folder."),
    to: str = typer.Option(..., metavar="FORMAT", help="huggingface or onnx."),
    output: str = typer.Option(
        None, "-o", "--output", metavar="FOLDER", help="New folder [RUN/FORMAT]."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object and nothing else."),
) -> None:
    """Write a run for other programs: transformers, or whatever runs ONNX.

    For transformers there is a model card too. ONNX is compared with the model before it is kept.
    """
    from hasten.training.export import export_run

    done = export_run(run, to, output)
    if as_json:
        content = {"folder": str(done.folder), "files": done.files, "note": done.note}
        typer.echo(json.dumps(content, ensure_ascii=False))
        return
    say(f"{done.folder}: {', '.join(done.files)}")
    say(done.note)
