"""`hasten inspect`: what is in a file, before any training."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from hasten.cli.settings import reading_from_flags

if TYPE_CHECKING:
    from hasten.config.schema import DataConfig
    from hasten.data.inspection import Inspection


def inspect(
    data: str = typer.Argument(
        ..., metavar="FILE", help="CSV, TSV, JSONL, Parquet, text, SQuAD JSON; - is stdin."
    ),
    task: str = typer.Option(None, help="What it is for; guessed otherwise."),
    text_column: list[str] = typer.Option(None, help="Text column, name or number; repeatable."),
    label_column: str = typer.Option(None, help="Label column, name or number."),
    delimiter: str = typer.Option(None, help="Cell separator; detected otherwise."),
    encoding: str = typer.Option(None, help="Text encoding; UTF-8 otherwise."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object and nothing else."),
    assignments: list[str] = typer.Option(None, "--set", hidden=True),
) -> None:
    """Show what a file holds: columns, classes, lengths, bad rows, duplicates."""
    from hasten.data.inspection import inspect_file
    from hasten.task.contract import WantedColumns
    from hasten.training.sources import choose_reading

    wanted = WantedColumns(tuple(text_column) if text_column else None, label_column)
    reading = reading_from_flags(assignments, delimiter=delimiter, encoding=encoding)

    def look(path: str | Path, name: str | None = None) -> Inspection:
        return inspect_file(
            path,
            delimiter=reading.delimiter,
            header=reading.header,
            encoding=reading.encoding,
            text=text_column,
            label=label_column,
            display_name=name,
            choose_task=lambda file, sample: choose_reading(file, sample, wanted, task or "auto"),
        )

    if data == "-":
        from hasten.training.session import standard_input_as_file

        with standard_input_as_file() as path:
            found = look(path, "standard input")
    else:
        found = look(data)
    if as_json:
        typer.echo(json.dumps(found.as_dict(), ensure_ascii=False))
        return
    typer.echo(_inspection_text(found))
    if not found.problems:
        typer.echo(f"next: {_next_command(data, reading, text_column, label_column)}")


def _next_command(
    data: str, reading: DataConfig, text_columns: list[str] | None, label_column: str | None
) -> str:
    """Returns the command that trains on what was inspected, read in the same way."""
    words = ["hasten", "train", data]
    for column in text_columns or []:
        words += ["--text-column", column]
    if label_column is not None:
        words += ["--label-column", label_column]
    for name in ("delimiter", "header", "encoding"):
        if (value := getattr(reading, name)) is not None:
            words += [f"--data.{name}", str(value).lower() if name == "header" else str(value)]
    return shlex.join(words)


def _inspection_text(found: Inspection) -> str:
    lines = [f"{found.file}: {found.format}, columns {', '.join(found.columns)}"]
    lines += [f"  {note}" for note in (*found.notes, f"task: {found.task}", *found.column_reasons)]
    lines.append(
        f"rows: {found.num_rows:,} read, {found.num_used:,} usable, {found.num_rejected:,} rejected"
    )
    lines += [
        f"  {reason.count:,} x {reason.reason} (first in line {reason.first_line})"
        for reason in found.rejected_reasons
    ]
    if found.classes:
        lines.append(f"classes: {found.num_classes:,}")
        lines += [
            f"  {name}: {count:,} ({count / found.num_used:.1%})"
            for name, count in found.classes[:10]
        ]
        if found.num_classes > 10:
            lines.append(f"  ... and {found.num_classes - 10:,} more")
    for what, lengths in (("characters", found.characters), ("words", found.words)):
        if lengths is not None:
            lines.append(
                f"text length in {what}: {lengths.minimum:,} to {lengths.maximum:,}, "
                f"median {lengths.median:,}, 95% at most {lengths.p95:,}"
            )
    about = "about " if found.duplicates_estimated else ""
    duplicates = f"duplicates: {about}{found.num_duplicates:,} rows repeat an earlier one"
    if found.label_column is not None:
        duplicates += f"; {about}{found.num_contradictory_texts:,} texts have several labels"
    lines.append(duplicates)
    lines += [f"problem: {problem}" for problem in found.problems]
    for row in found.sample:
        shown = (f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in row.items())
        lines.append("example: " + "  ".join(shown))
    lines.append(f"read at {found.rows_per_second:,.0f} rows/s")
    return "\n".join(lines)
