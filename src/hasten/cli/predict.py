"""`hasten predict`: labels for texts, or for every row of a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from hasten.cli.console import count, say
from hasten.cli.settings import reading_from_flags
from hasten.config.schema import DataConfig
from hasten.core.errors import UsageError

if TYPE_CHECKING:
    from hasten.training.run import Run


def predict(
    run: str = typer.Argument(..., help="Run folder."),
    texts: list[str] = typer.Argument(
        None, help="Texts to label; -- comes before one that begins with a dash."
    ),
    input_file: str = typer.Option(
        None, "--input", help="File whose rows are labelled instead; - is stdin."
    ),
    output: str = typer.Option(
        None, "-o", "--output", help="Where to write it: .csv, .tsv or .jsonl, also .gz."
    ),
    text_column: list[str] = typer.Option(None, help="Text column, name or number; repeatable."),
    device: str = typer.Option("auto", help="auto, cpu or cuda."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object and nothing else."),
    assignments: list[str] = typer.Option(None, "--set", hidden=True),
) -> None:
    """Label texts with a trained run.

    With --input, the file's columns are kept and label and probability are added.
    """
    if bool(texts) == (input_file is not None):
        raise UsageError("give either texts or --input FILE.")
    if (input_file is None) != (output is None):
        raise UsageError(
            "--input and --output go together: rows are read from one, written to the other."
        )
    reading = reading_from_flags(assignments)
    if input_file is None and (text_column or assignments):
        raise UsageError("--text-column and --data.* keys tell how --input is read; give it too.")
    from hasten.training.run import load

    trained = load(run, device)
    if input_file is not None and output is not None:
        counts = _label_file(trained, input_file, output, text_column, reading)
        if as_json:
            typer.echo(json.dumps(counts, ensure_ascii=False))
        return
    columns = trained.saved.text_columns
    width = len(columns)
    if len(texts) % width:
        raise UsageError(f"this run takes {width} texts for each prediction: {', '.join(columns)}.")
    rows = [tuple(texts[i : i + width]) for i in range(0, len(texts), width)]
    found = trained.predict(rows)
    if as_json:
        typer.echo(json.dumps({"predictions": found}, ensure_ascii=False))
        return
    for row, prediction in zip(rows, found, strict=True):
        shown = " | ".join(" ".join(text.split()) for text in row)  # one line a prediction
        typer.echo(f"{prediction['label']}\t{prediction['probability']:.4f}\t{shown}")


def _label_file(
    trained: Run, input_file: str, output: str, text_column: list[str] | None, reading: DataConfig
) -> dict[str, Any]:
    from hasten.training.label import label_file

    counts = label_file(
        trained, input_file, Path(output), text_columns=text_column, reading=reading, warn=say
    )
    parts = [f"{count(counts['num_labelled'], 'row')} labelled"]
    if counts["num_unlabelled"]:
        parts.append(f"{counts['num_unlabelled']:,} without text kept unlabelled")
    if counts["num_rejected"]:
        parts.append(f"{counts['num_rejected']:,} unreadable left out")
    say(f"{output}: {', '.join(parts)}")
    return counts
