"""Labels every row of a file: its columns are kept, label and probability are added.

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
from hasten.data.columns import CellError, resolve_columns, texts_of
from hasten.data.rows import Rejected, RowFile
from hasten.training.run import Run, columns_of, rows_of

_CHUNK_ROWS = 2000
_FORMATS = (".csv", ".tsv", ".jsonl")
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
    warn: Callable[[str], None],
) -> dict[str, Any]:
    """Writes ``path`` with two more columns to ``output``.

    Args:
        run: the trained run.
        path: CSV, TSV or JSONL, also gzipped; ``-`` is standard input.
        output: likewise; replaced in one step if it exists.
        text_columns: names or numbers; those of the training by default.
        reading: delimiter, header and encoding, where they are not to be detected.
        warn: told of the first rows that get no label.

    Returns:
        num_labelled, num_unlabelled (kept, with empty cells), num_rejected (not readable as rows).

    Raises:
        UsageError: the output's format is not known, or a column is missing.
        MachineError: the output cannot be written.
    """
    counts = {"output": str(output), "num_labelled": 0, "num_unlabelled": 0, "num_rejected": 0}
    problems: list[str] = []
    with rows_of(path, reading or DataConfig()) as file:
        with columns_of(file):
            at = resolve_columns(file.columns, tuple(text_columns or run.saved.text_columns))
        columns = [*file.columns]
        for name in ("label", "probability"):
            while name in columns:
                name = f"predicted_{name}"
            columns.append(name)
        with _writer(output, columns, header=file.has_header or file.format == "jsonl") as write:
            rows = iter(file)
            while chunk := list(itertools.islice(rows, _CHUNK_ROWS)):
                _label_chunk(run, file, chunk, at, write, counts, problems)
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
) -> None:
    kept, texts = [], []
    for row in chunk:
        if isinstance(row, Rejected):
            counts["num_rejected"] += 1
            if len(problems) < _MAX_WARNINGS:
                problems.append(f"{row.file}, line {row.line}: {row.reason}; left out")
            continue
        try:
            texts.append(texts_of(row.cells, at))
            kept.append((row.cells, True))
        except CellError as error:
            counts["num_unlabelled"] += 1
            if len(problems) < _MAX_WARNINGS:
                problems.append(f"{file.display_name}, line {row.line}: {error}; no label")
            kept.append((row.cells, False))
    predictions = run.predict_rows(texts)
    for cells, has_text in kept:
        label = probability = None
        if has_text:
            prediction = next(predictions)
            label, probability = prediction["label"], round(prediction["probability"], 6)
        counts["num_labelled"] += has_text
        write([*cells, label, probability])


@contextmanager
def _writer(output: Path, columns: list[str], *, header: bool) -> Iterator[_Writer]:
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
                    yield _row_writer(text, suffix, columns, header=header)
            partial.replace(output)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def _row_writer(
    text: io.TextIOWrapper, suffix: str, columns: list[str], *, header: bool
) -> _Writer:
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
