"""`hasten evaluate`: measures a run on another file."""

from __future__ import annotations

import typer

from hasten.cli.console import build_observer
from hasten.cli.settings import reading_from_flags


def evaluate(
    run: str = typer.Argument(..., help="Run folder."),
    data: str = typer.Argument(..., help="Labelled rows: CSV, TSV, JSONL, also .gz; - is stdin."),
    text_column: list[str] = typer.Option(None, help="Text column, name or number; repeatable."),
    label_column: str = typer.Option(None, help="Label column, name or number."),
    device: str = typer.Option("auto", help="auto, cpu or cuda."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object and nothing else."),
    quiet: bool = typer.Option(False, "--quiet", help="Results only."),
    assignments: list[str] = typer.Option(None, "--set", hidden=True),
) -> None:
    """Measure a trained run on a file of labelled rows."""
    from hasten.cli.show import metrics_text
    from hasten.training.folder import to_json
    from hasten.training.run import load

    reading = reading_from_flags(assignments)
    observer = build_observer(quiet=quiet or as_json)
    metrics = load(run, device).evaluate(
        data,
        text_columns=text_column,
        label_column=label_column,
        observer=observer,
        reading=reading,
    )
    if as_json:
        typer.echo(to_json(metrics))
        return
    if metrics["num_rejected"]:
        typer.echo(f"{metrics['num_read']:,} rows read, {metrics['num_rejected']:,} rejected")
    typer.echo(metrics_text("standard input" if data == "-" else data, metrics))
