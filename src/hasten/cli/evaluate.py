"""`hasten evaluate`: measures a run on another file."""

from __future__ import annotations

import typer

from hasten.cli.console import build_observer
from hasten.cli.settings import reading_from_flags
from hasten.core.errors import UsageError


def evaluate(
    run: str = typer.Argument(..., help="Run folder."),
    data: list[str] = typer.Argument(
        ...,
        metavar="FILE [FILE]",
        help="A file such as it was trained on, or two line-aligned ones; - is stdin.",
    ),
    text_column: list[str] = typer.Option(None, help="Text column, name or number; repeatable."),
    label_column: str = typer.Option(None, help="Label column, name or number."),
    device: str = typer.Option("auto", help="auto, cpu or cuda."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object and nothing else."),
    quiet: bool = typer.Option(False, "--quiet", help="Results only."),
    assignments: list[str] = typer.Option(None, "--set", hidden=True),
) -> None:
    """Measure a trained run on a file of examples."""
    from hasten.cli.show import metrics_text
    from hasten.training.folder import to_json
    from hasten.training.run import load

    reading = reading_from_flags(assignments)
    observer = build_observer(quiet=quiet or as_json)
    if len(data) > 2:
        raise UsageError("one file is measured at a time, or two line-aligned ones.")
    metrics = load(run, device).evaluate(
        data[0] if len(data) == 1 else data,
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
    name = "standard input" if data == ["-"] else " + ".join(data)
    typer.echo(metrics_text(name, metrics))
