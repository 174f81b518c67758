"""`hasten predict`: what a run makes of texts, or of every row of a file."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from hasten.cli.console import count, say
from hasten.cli.settings import reading_from_flags
from hasten.config.schema import DataConfig
from hasten.core.errors import DataError, UsageError

if TYPE_CHECKING:
    from hasten.task.contract import PredictSettings
    from hasten.training.run import Run


def predict(
    run: str = typer.Argument(..., help="Run folder."),
    texts: list[str] = typer.Argument(
        None,
        metavar="[TEXT]...",
        help="Texts to label, translate or continue, or questions; -- comes before one that "
        "begins with a dash.",
    ),
    input_file: str = typer.Option(
        None, "--input", metavar="FILE", help="File whose rows are taken instead; - is stdin."
    ),
    output: str = typer.Option(
        None,
        "-o",
        "--output",
        metavar="FILE",
        help="Where to write them: .csv, .tsv, .jsonl, or .txt for the outputs alone; also .gz.",
    ),
    context_file: str = typer.Option(
        None, metavar="FILE", help="Text in which questions are answered."
    ),
    text_column: list[str] = typer.Option(
        None, metavar="NAME", help="Text column, name or number; repeatable."
    ),
    max_new_tokens: int = typer.Option(None, help="Longest output in tokens [256]."),
    temperature: float = typer.Option(None, help="Draw the output at random; 0 is greedy [0]."),
    top_k: int = typer.Option(None, help="Draw among the k likeliest tokens."),
    top_p: float = typer.Option(None, help="Draw among the likeliest tokens of this probability."),
    repetition_penalty: float = typer.Option(None, help="Above 1: against repetition [1]."),
    num_beams: int = typer.Option(None, help="Width of the beam search; 1 is greedy."),
    length_penalty: float = typer.Option(None, help="Above 1 favours long outputs of beams [1]."),
    n_best: int = typer.Option(None, help="Outputs for each text [1]."),
    stop: list[str] = typer.Option(None, metavar="TEXT", help="Ends an output; repeatable."),
    seed: int = typer.Option(None, help="Of what is drawn at random [0]."),
    device: str = typer.Option("auto", help="auto, cpu or cuda."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object and nothing else."),
    assignments: list[str] = typer.Option(None, "--set", hidden=True),
) -> None:
    """Use a trained run: label, translate, continue texts, or answer questions.

    With --input, the file's columns are kept and those of the prediction are added. A run that was
    trained on chats takes a text as the user's message, or a JSON list of messages as a chat.
    """
    options = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "repetition_penalty": repetition_penalty,
        "num_beams": num_beams,
        "length_penalty": length_penalty,
        "num_return": n_best,
        "seed": seed,
    }
    reading = _check(texts, input_file, output, text_column, context_file, assignments)
    from hasten.training.run import load

    trained = load(run, device)
    settings = _settings(trained, options, stop or [])
    if input_file is not None and output is not None:
        counts = _label_file(trained, input_file, output, text_column, reading, settings)
        if as_json:
            typer.echo(json.dumps(counts, ensure_ascii=False))
        return
    rows = _rows(trained, texts, context_file)
    if not as_json and len(rows) == 1 and trained.task.name == "text-generation" and not n_best:
        _stream(trained, rows[0], settings)
        return
    found = list(trained.predict_rows(rows, settings))
    if as_json:
        typer.echo(json.dumps({"predictions": found}, ensure_ascii=False))
        return
    for row, prediction in zip(rows, found, strict=True):
        for line in _lines(trained, row, prediction):
            typer.echo(line)


def _check(
    texts: list[str] | None,
    input_file: str | None,
    output: str | None,
    text_column: list[str] | None,
    context_file: str | None,
    assignments: list[str] | None,
) -> DataConfig:
    """Refuses flags that contradict each other; returns how the input file is read."""
    if bool(texts) == (input_file is not None):
        raise UsageError("give either texts or --input FILE.")
    if (input_file is None) != (output is None):
        raise UsageError(
            "--input and --output go together: rows are read from one, written to the other."
        )
    if context_file is not None and input_file is not None:
        raise UsageError("--context-file is for questions given as texts; --input has its own.")
    if input_file is None and (text_column or assignments):
        raise UsageError("--text-column and --data.* keys tell how --input is read; give it too.")
    return reading_from_flags(assignments)


def _settings(trained: Run, options: Mapping[str, Any], stop: list[str]) -> PredictSettings:
    """Returns how to predict, with what was given; refuses what has no effect on the run."""
    given = {name: value for name, value in options.items() if value is not None}
    flags = [f"--{name.replace('_', '-')}" for name in given] + ["--stop"] * bool(stop)
    if flags and not trained.task.generates:
        named = ", ".join(flags).replace("--num-return", "--n-best")
        raise UsageError(f"{named}: no effect on {trained.task.name}, which generates no text.")
    if "" in stop:
        raise UsageError("--stop needs a text: every output would end at an empty one.")
    return trained.settings(stop=tuple(stop), **given)


def _rows(trained: Run, texts: list[str], context_file: str | None) -> list[tuple[str, ...]]:
    """Returns the given texts as rows of the run's input columns."""
    columns = trained.task.input_columns
    width = len(columns)
    for number, text in enumerate(texts, start=1):
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise DataError(f"text {number} is not UTF-8; --input FILE takes --data.encoding.")
    if context_file is not None:
        if width != 2:
            raise UsageError(f"--context-file has no effect on {trained.task.name}.")
        try:
            context = Path(context_file).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"{context_file}: not UTF-8 text (byte {error.start:,}).") from None
        except OSError as error:
            raise DataError(f"{context_file}: cannot be read ({error.strerror}).") from None
        if not context.strip():
            raise DataError(f"{context_file}: is empty.")
        return [(context, text) for text in texts]
    if width - trained.task.num_optional_inputs <= len(texts) < width:
        return [tuple(texts)]
    if len(texts) % width:
        raise UsageError(f"this run takes {width} texts for each prediction: {', '.join(columns)}.")
    return [tuple(texts[i : i + width]) for i in range(0, len(texts), width)]


def _stream(trained: Run, row: tuple[str, ...], settings: PredictSettings) -> None:
    """Prints what ``_lines`` would return, as it comes."""
    import dataclasses

    def write(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    if settings.decoding.num_beams == 1:
        settings = dataclasses.replace(settings, stream=write)
    write(_shown_prompt(trained, row))
    (found,) = trained.predict_rows([row], settings)
    write("\n" if settings.stream else found["generated"] + "\n")


def _shown_prompt(trained: Run, row: tuple[str, ...]) -> str:
    """Returns what an output is shown together with: a text that it continues."""
    is_continued = trained.task.name == "text-generation"
    return row[0] if is_continued and trained.task.reading.form in ("text", "documents") else ""


def _lines(trained: Run, row: tuple[str, ...], prediction: Mapping[str, Any]) -> list[str]:
    """Returns what is printed of a prediction, one line for each of its outputs."""
    found = [prediction, *prediction.get("alternatives", ())]
    names = trained.task.prediction_columns
    if trained.task.generates:
        if len(found) == 1:
            return [_shown_prompt(trained, row) + str(prediction[names[0]])]
        return [f"{one['score']:.4f}\t{one[names[0]]}" for one in found]
    values = [prediction[name] for name in names]
    asked = row if trained.task.name == "text-classification" else row[1:]
    shown = " | ".join(" ".join(text.split()) for text in asked)  # one line a prediction
    cells = [f"{v:.4f}" if isinstance(v, float) else "" if v is None else str(v) for v in values]
    return ["\t".join([*cells, shown])]


def _label_file(
    trained: Run,
    input_file: str,
    output: str,
    text_column: list[str] | None,
    reading: DataConfig,
    settings: PredictSettings,
) -> dict[str, Any]:
    from hasten.training.label import label_file

    counts = label_file(
        trained,
        input_file,
        Path(output),
        text_columns=text_column,
        reading=reading,
        settings=settings,
        warn=say,
    )
    parts, lacking = [f"{count(counts['num_labelled'], 'row')} labelled"], "text"
    if trained.task.generates:
        parts, lacking = [f"{count(counts['num_labelled'], 'output')} written"], "output"
    if counts["num_unlabelled"]:
        parts.append(f"{counts['num_unlabelled']:,} without {lacking} kept as they were")
    if counts["num_rejected"]:
        parts.append(f"{counts['num_rejected']:,} unreadable left out")
    say(f"{output}: {', '.join(parts)}")
    return counts
