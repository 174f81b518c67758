"""`hasten demo`: the whole way on real data that is already on this machine."""

from __future__ import annotations

import csv
import time
from pathlib import Path

import typer

from hasten.cli.console import build_observer, duration
from hasten.core.errors import UsageError

_SHOWN, _EVERY = 5, 592  # spread over the classes
_EPOCHS = 8  # under two minutes on two cores


def demo(
    output: str = typer.Option(None, "-o", "--output", help="Run folder [runs/demo-<n>]."),
    seed: int = typer.Option(0, help="Every random choice derives from it."),
    quiet: bool = typer.Option(False, "--quiet", help="Results only."),
) -> None:
    """Train, test and use a model on real data: guess the keyword missing from a line.

    About 15,000 lines of the Python standard library's own source, 16 classes. The files are kept
    beside the run, so that each step can be repeated by hand.
    """
    from hasten.cli.show import verdict_text
    from hasten.core.files import committed_folder, machine_errors
    from hasten.data.keywords import write_keyword_files
    from hasten.training.run import train

    began = time.monotonic()
    folder = Path(output) if output else _free_folder()
    data = folder.with_name(f"{folder.name}-data")
    for path in (folder, data):
        if path.exists():
            raise UsageError(f"{path} exists already: choose another --output.")
    with machine_errors("writing the demo's data"), committed_folder(data) as partial:
        write_keyword_files(partial)
    typer.echo(f"data: lines of Python's standard library, one keyword left out: {data}/train.csv")
    observer = build_observer(quiet=quiet)
    try:
        run = train(
            data / "train.csv",
            test=data / "test.csv",
            output=folder,
            settings={"train.seed": seed, "train.epochs": _EPOCHS},
            observer=observer,
        )
    finally:
        getattr(observer, "close", lambda: None)()
    typer.echo(verdict_text(run.result))
    with (data / "test.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))[::_EVERY][:_SHOWN]
    typer.echo("\nsome of the test set:")
    for row, guess in zip(rows, run.predict([row["code"] for row in rows]), strict=True):
        right = guess["label"] == row["keyword"]
        mark = "right" if right else f"wrong, it was {row['keyword']}"
        typer.echo(f"  {row['code']}")
        typer.echo(f"      {guess['label']} ({guess['probability']:.2f}; {mark})")
    typer.echo(
        f"\nall of it took {duration(time.monotonic() - began)}. By hand:\n"
        f"  hasten inspect {data}/train.csv\n"
        f"  hasten train {data}/train.csv --test {data}/test.csv --epochs {_EPOCHS}\n"
        f"  hasten evaluate {folder} {data}/test.csv\n"
        f"  hasten predict {folder} '___ x is None:'"
    )


def _free_folder() -> Path:
    number = 1
    while True:
        folder = Path("runs") / f"demo-{number}"
        if not folder.exists() and not folder.with_name(f"{folder.name}-data").exists():
            return folder
        number += 1
