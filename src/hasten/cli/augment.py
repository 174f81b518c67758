"""`hasten augment`: more training pairs for a translation, made by a run of the other direction."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from hasten.cli.console import count, say
from hasten.cli.settings import reading_from_flags


def augment(
    run: str = typer.Argument(..., help="Folder of a translation run in the other direction."),
    input_file: str = typer.Option(
        ..., "--input", metavar="FILE", help="Texts in the run's source language; - is stdin."
    ),
    output: str = typer.Option(
        ..., "-o", "--output", metavar="FILE", help="Pairs: .csv, .tsv or .jsonl, also .gz."
    ),
    text_column: str = typer.Option(None, metavar="NAME", help="Column of texts."),
    temperature: float = typer.Option(None, help="Draw translations at random, for variety."),
    seed: int = typer.Option(None, help="Of what is drawn at random [0]."),
    device: str = typer.Option("auto", help="auto, cpu or cuda."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object and nothing else."),
    assignments: list[str] = typer.Option(None, "--set", hidden=True),
) -> None:
    """Back-translate: make training pairs of texts that exist in the target language only.

    To improve a translation into German, train one from German on the same data, and let it
    translate German texts: hasten augment runs/de-en --input german.txt --output more.csv

    Then train on these and the others: hasten train more.csv --source train.en --target train.de
    """
    from hasten.training.back_translation import back_translate
    from hasten.training.run import load

    reading = reading_from_flags(assignments)
    trained = load(run, device)
    options = {"temperature": temperature, "seed": seed}
    counts = back_translate(
        trained,
        input_file,
        Path(output),
        text_columns=None if text_column is None else (text_column,),
        reading=reading,
        settings=trained.settings(**{k: v for k, v in options.items() if v is not None}),
        warn=say,
    )
    if as_json:
        typer.echo(json.dumps(counts, ensure_ascii=False))
        return
    left_out = f", {counts['num_rejected']:,} left out" if counts["num_rejected"] else ""
    say(f"{output}: {count(counts['num_pairs'], 'pair')} written{left_out}")
