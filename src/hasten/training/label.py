"""Predicts every row of a file: its columns are kept, those of the prediction are added.

RowFile --chunks--> predictions --> CSV, TSV or JSONL, committed by one rename
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from hasten.config.schema import DataConfig
from hasten.core.errors import UsageError
from hasten.core.files import machine_errors
from hasten.data.columns import CellError, resolve_columns
from hasten.data.rows import Rejected, RowFile
from hasten.task.contract import PredictSettings
from hasten.training.run import Run, columns_of, rows_of

_CHUNK_ROWS = 2000
_FORMATS = (".csv", ".tsv", ".jsonl", ".txt")
_MAX_WARNINGS = 5


class _Writer(Protocol):
    def __call__(self, values: Sequence[Any]) -> None: ...


def label_file(
    run: Run,
    path: str | Path,
    output: Path,
    *,
    text_columns: Sequence[str] | None = None,
    reading: DataConfig | None = None,
    settings: PredictSettings | None = None,
    warn: Callable[[str], None],
) -> dict[str, Any]:
    """Writes ``path`` with the columns of a prediction added to ``output``.

    Args:
        run: the trained run.
        path: CSV, TSV or JSONL, also gzipped; ``-`` is standard input.
        output: likewise, or a .txt file of the outputs alone, one a line; replaced in one step if
            it exists.
        text_columns: names or numbers; those of the training by default.
        reading: delimiter, header and encoding, where they are not to be detected.
        settings: how to predict; as the run does by default.
        warn: told of the first rows that get no prediction.

    Returns:
        num_labelled, num_unlabelled (kept, with empty cells), num_rejected (not readable as rows).

    Raises:
        UsageError: the output's format is not known, or a column is missing.
        MachineError: the output cannot be written.
    """
    counts = {"output": str(output), "num_labelled": 0, "num_unlabelled": 0, "num_rejected": 0}
    problems: list[str] = []
    with rows_of(path, reading or DataConfig(), text_rows="lines") as file:
        with columns_of(file):
            at = resolve_columns(file.columns, tuple(text_columns or _columns(run, file)))
        columns = [*file.columns]
        for name in _predicted(run, settings):
            while name in columns:
                name = f"predicted_{name}"
            columns.append(name)
        named, output_at = file.has_header or file.format not in ("csv", "tsv"), len(file.columns)
        with writer(output, columns, header=named, output_at=output_at) as write:
            rows = iter(file)
            while chunk := list(itertools.islice(rows, _CHUNK_ROWS)):
                _label_chunk(run, file, chunk, at, write, counts, problems, settings)
    for problem in problems[:_MAX_WARNINGS]:
        warn(f"warning: {problem}")
    return counts


def _label_chunk(
    run: Run,
    file: RowFile,
    chunk: list[Any],
    at: tuple[int, ...],
    write: _Writer,
    counts: dict[str, Any],
    problems: list[str],
    settings: PredictSettings | None,
) -> None:
    kept, texts = [], []
    wanted = "output" if run.task.generates else "label"
    for row in chunk:
        if isinstance(row, Rejected):
            counts["num_rejected"] += 1
            if len(problems) < _MAX_WARNINGS:
                problems.append(f"{row.file}, line {row.line}: {row.reason}; left out")
            continue
        try:
            texts.append(run.task.read_inputs([row.cells[i] for i in at]))
            kept.append((row.cells, True))
        except CellError as error:
            counts["num_unlabelled"] += 1
            if len(problems) < _MAX_WARNINGS:
                problems.append(f"{file.display_name}, line {row.line}: {error}; no {wanted}")
            kept.append((row.cells, False))
    predictions = run.predict_rows(texts, settings)
    names = _predicted(run, settings)
    for cells, has_text in kept:
        prediction = next(predictions) if has_text else {}
        counts["num_labelled"] += has_text
        found = (prediction.get(name) for name in names)
        write([*cells, *(round(v, 6) if isinstance(v, float) else v for v in found)])


def _predicted(run: Run, settings: PredictSettings | None) -> tuple[str, ...]:
    """The keys of a prediction that become columns; further outputs are a column of lists."""
    has_more = settings is not None and settings.decoding.num_return > 1
    return (*run.task.prediction_columns, *(["alternatives"] if has_more else []))


def _columns(run: Run, file: RowFile) -> tuple[str, ...]:
    """The columns to predict from: those of the training, or the only one there is."""
    wanted = run.task.input_columns
    fewest = len(wanted) - run.task.num_optional_inputs
    if len(file.columns) == fewest == 1:
        return file.columns
    return (*wanted[:fewest], *(name for name in wanted[fewest:] if name in file.columns))


@contextmanager
def writer(output: Path, columns: list[str], *, header: bool, output_at: int) -> Iterator[_Writer]:
    """Yields a function that writes one row; the file appears whole or not at all."""
    compressed = output.suffix == ".gz"
    suffix = (output.with_suffix("") if compressed else output).suffix
    if suffix not in _FORMATS:
        raise UsageError(f"{output}: write to a file that ends in {', '.join(_FORMATS)} (or .gz).")
    if output.is_dir() or not output.parent.is_dir():
        problem = "is a folder" if output.is_dir() else f"there is no folder {output.parent}"
        raise UsageError(f"{output}: {problem}; choose another --output.")
    partial = output.with_name(f"{output.name}.partial-{os.getpid()}")
    with machine_errors("writing the labelled rows"):
        try:
            with partial.open("wb") as raw:
                binary = gzip.GzipFile(fileobj=raw, mode="wb") if compressed else raw
                with io.TextIOWrapper(binary, encoding="utf-8", newline="") as text:  # pyright: ignore[reportArgumentType]
                    yield _row_writer(text, suffix, columns, header=header, output_at=output_at)
            partial.replace(output)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def _row_writer(
    text: io.TextIOWrapper, suffix: str, columns: list[str], *, header: bool, output_at: int
) -> _Writer:
    """Returns what writes a row; of a .txt file that is the column ``output_at`` alone."""
    if suffix == ".txt":

        def write_line(values: Sequence[Any]) -> None:
            text.write(" ".join(str(values[output_at] or "").split()) + "\n")

        return write_line
    if suffix == ".jsonl":

        def write(values: Sequence[Any]) -> None:
            entry = dict(zip(columns, values, strict=True))
            text.write(json.dumps(entry, ensure_ascii=False) + "\n")

        return write
    rows = csv.writer(text, delimiter="\t" if suffix == ".tsv" else ",", lineterminator="\n")
    if header:
        rows.writerow(columns)

    def write_row(values: Sequence[Any]) -> None:
        rows.writerow(
            [
                ""
                if v is None
                else json.dumps(v, ensure_ascii=False)
                if isinstance(v, list | dict | bool)
                else v
                for v in values
            ]
        )

    return write_row
