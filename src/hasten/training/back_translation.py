"""Back-translation: makes training pairs of texts that exist in the target language only.

    mono.de --run trained from German to English--> pairs: English (made), German (as written)

A model that translates into German learns from the pairs as from real ones: what it learns to
write is real (Sennrich et al. 2016, "Improving Neural Machine Translation Models with Monolingual
Data").
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hasten.config.schema import DataConfig
from hasten.core.errors import UsageError
from hasten.data.columns import CellError, resolve_columns, text_of
from hasten.data.rows import Rejected
from hasten.task.contract import PredictSettings
from hasten.task.translation import Translation
from hasten.training.label import writer
from hasten.training.run import Run, columns_of, rows_of

_CHUNK_ROWS = 2000


def back_translate(
    run: Run,
    path: str | Path,
    output: Path,
    *,
    text_columns: Sequence[str] | None = None,
    reading: DataConfig | None = None,
    settings: PredictSettings | None = None,
    warn: Callable[[str], None],
) -> dict[str, Any]:
    """Writes pairs of a translation and its original, to train the other direction on.

    Args:
        run: a translation run in the direction opposite to the one that is to be trained.
        path: texts in the run's source language: plain text, a text a line, or a column.
        output: .csv, .tsv or .jsonl, also .gz; its first column holds what the run made.
        text_columns: the column of texts, by name or number, where there are several.
        reading: delimiter, header and encoding, where they are not to be detected.
        settings: how to translate; as the run does by default.
        warn: told of the first texts that cannot be used.

    Returns:
        output, num_pairs and num_rejected.

    Raises:
        UsageError: the run is no translation, or the column is missing.
        MachineError: the output cannot be written.
    """
    if run.task.name != Translation.name:
        raise UsageError(f"{run.folder} is a run of {run.task.name}; only translations turn back.")
    original, made = run.task.reading.columns
    if (original, made) == ("source", "target"):
        original, made = made, original  # line-aligned files: what was the source is the target now
    counts = {"output": str(output), "num_pairs": 0, "num_rejected": 0}
    with rows_of(path, reading or DataConfig(), text_rows="lines") as file, columns_of(file):
        wanted = text_columns or (
            file.columns if len(file.columns) == 1 else run.task.input_columns
        )
        (at,) = resolve_columns(file.columns, tuple(wanted))
        with writer(output, [made, original], header=True, output_at=0) as write:
            rows = iter(file)
            while chunk := list(itertools.islice(rows, _CHUNK_ROWS)):
                texts: list[str] = []
                for row in chunk:
                    try:
                        if isinstance(row, Rejected):
                            raise CellError(row.reason)
                        texts.append(text_of(row.cells[at]))
                    except CellError as error:
                        counts["num_rejected"] += 1
                        if counts["num_rejected"] <= 5:
                            warn(
                                f"warning: {file.display_name}, line {row.line}: {error}; left out"
                            )
                found = run.predict_rows(((text,) for text in texts), settings)
                for text, prediction in zip(texts, found, strict=True):
                    write([prediction["translation"], text])
                counts["num_pairs"] += len(texts)
    return counts
