"""`hasten inspect`: what is in a file, before any training."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from hasten.data.inspection import Inspection


def inspect(
    data: str = typer.Argument(..., help="File to look at: CSV, TSV or JSONL, also .gz."),
    text_column: list[str] = typer.Option(None, help="Text column, name or number; repeatable."),
    label_column: str = typer.Option(None, help="Label column, name or number."),
    delimiter: str = typer.Option(None, help="Cell separator; detected otherwise."),
    encoding: str = typer.Option(None, help="Text encoding; UTF-8 otherwise."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object and nothing else."),
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
) -> None:
    """Show what a file holds: columns, classes, lengths, bad rows, duplicates."""
    from hasten.data.inspection import inspect_file

    found = inspect_file(
        data, delimiter=delimiter, encoding=encoding, text=text_column, label=label_column
    )
    typer.echo(
        json.dumps(found.as_dict(), ensure_ascii=False) if as_json else _inspection_text(found)
    )


def _inspection_text(found: Inspection) -> str:
    lines = [f"{found.file}: {found.format}, columns {', '.join(found.columns)}"]
    lines += [f"  {note}" for note in (*found.notes, *found.column_reasons)]
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
    lines.append(
        f"duplicates: {about}{found.num_duplicates:,} rows repeat an earlier one; "
        f"{about}{found.num_contradictory_texts:,} texts have several labels"
    )
    lines += [f"problem: {problem}" for problem in found.problems]
    for row in found.sample:
        lines.append("example: " + "  ".join(f"{key}={value!r}" for key, value in row.items()))
    lines.append(f"({found.rows_per_second:,.0f} rows/s)")
    if not found.problems:
        lines.append(f"next: hasten train {found.file}")
    return "\n".join(lines)
