"""`hasten evaluate`: measures a run on another file."""

from __future__ import annotations

import json

import typer

from hasten.cli.console import build_observer


def evaluate(
    run: str = typer.Argument(..., help="Run folder."),
    data: str = typer.Argument(..., help="File of labelled rows: CSV, TSV or JSONL, also .gz."),
    text_column: list[str] = typer.Option(None, help="Text column, name or number; repeatable."),
    label_column: str = typer.Option(None, help="Label column, name or number."),
    device: str = typer.Option("auto", help="auto, cpu or cuda."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object and nothing else."),
    quiet: bool = typer.Option(False, "--quiet", help="Results only."),
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
) -> None:
    """Measure a trained run on a file of labelled rows."""
    from hasten.cli.show import metrics_text
    from hasten.training.run import load

    observer = build_observer(quiet=quiet or as_json)
    metrics = load(run, device).evaluate(
        data, text_columns=text_column, label_column=label_column, observer=observer
    )
    if as_json:
        typer.echo(json.dumps(metrics, ensure_ascii=False))
        return
    if metrics["num_rejected"]:
        typer.echo(f"{metrics['num_read']:,} rows read, {metrics['num_rejected']:,} rejected")
    typer.echo(metrics_text(data, metrics))
