"""What is in a file of examples, before any training: the answer of `hasten inspect`.

    open_rows -> first rows -> columns -> one pass over the file -> Inspection
                                              |
                   counts of labels and reasons, histograms of lengths, 64-bit hashes of rows

One pass in bounded memory: only counts and hashes are kept, never the rows. A file that cannot be
used is described all the same; what stands in the way is listed as problems.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hasten.core.errors import DataError
from hasten.data.columns import (
    CellError,
    check_label_values,
    choose_columns,
    choose_text_columns,
    label_of,
    resolve_columns,
    texts_of,
)
from hasten.data.corpus import Reading
from hasten.data.rows import Cell, Rejected, Row, RowFile, open_rows

SAMPLE_ROWS = 1000
FEW_EXAMPLES = 10
_MAX_LISTED_CLASSES = 50
_MAX_LISTED_REASONS = 10
_MAX_COUNTED_LABELS = 100_000
# Above this many rows, only rows whose hash falls into an ever smaller share are compared.
_MAX_HASHES = 2_000_000
_BLOCK = 1 << 16
_SHOWN_ROWS = 3
_SHOWN_CHARACTERS = 200


@dataclass(frozen=True, slots=True)
class Lengths:
    """Lengths of the texts; above 4,096 the median and the 95th percentile are within 2%."""

    minimum: int
    mean: float
    median: int
    p95: int
    maximum: int


@dataclass(frozen=True, slots=True)
class Reason:
    """A reason for rejecting rows: how many, and the line of the first."""

    reason: str
    count: int
    first_line: int


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a file holds.

    Attributes:
        file: how the file is called.
        task: what it would be used for.
        format: csv, tsv, jsonl, json, squad, parquet, text or aligned.
        notes: what was detected of its form, with reasons.
        columns: the columns' names.
        text_columns: the chosen text columns; empty if none was found.
        label_column: the chosen label column; None if none was found or asked for.
        column_reasons: why these.
        num_rows: rows read; always ``num_used + num_rejected``.
        rejected_reasons: the first ten different reasons.
        num_classes: number of different labels (counted up to 100,000).
        classes: the fifty most frequent labels with their counts.
        majority_share: share of the most frequent label among the used rows.
        small_classes: labels with fewer than ten examples (fifty at most) with their counts.
        characters: lengths of the texts in characters.
        words: lengths in runs without white space.
        longest_text_line: the line in which the row with the longest text starts.
        num_duplicates: used rows whose text and label occurred before.
        num_contradictory_texts: different texts that occur with more than one label.
        duplicates_estimated: the two counts before are extrapolated from a share of the rows.
        sample: the first three used rows, as column name -> cell.
        problems: what stands in the way of training a classifier; empty if nothing does.
        seconds: time taken.
        rows_per_second: rows read per second.
    """

    file: str
    task: str
    format: str
    notes: tuple[str, ...]
    columns: tuple[str, ...]
    text_columns: tuple[str, ...]
    label_column: str | None
    column_reasons: tuple[str, ...]
    num_rows: int
    num_used: int
    num_rejected: int
    rejected_reasons: tuple[Reason, ...]
    num_classes: int
    classes: tuple[tuple[str, int], ...]
    majority_share: float | None
    num_small_classes: int
    small_classes: tuple[tuple[str, int], ...]
    characters: Lengths | None
    words: Lengths | None
    longest_text_line: int | None
    num_duplicates: int
    num_contradictory_texts: int
    duplicates_estimated: bool
    sample: tuple[dict[str, Cell], ...]
    problems: tuple[str, ...]
    seconds: float
    rows_per_second: float

    def as_dict(self) -> dict[str, Any]:
        """Returns everything as values that JSON can hold."""
        return dataclasses.asdict(self) | {
            "classes": dict(self.classes),
            "small_classes": dict(self.small_classes),
        }


@dataclass(frozen=True, slots=True)
class ChosenReading:
    """How a task would read a file.

    Attributes:
        reading: which columns, and how.
        reasons: one line a column.
    """

    reading: Reading
    reasons: tuple[str, ...]


TaskChooser = Callable[[RowFile, Sequence[Row]], ChosenReading]
"""From a file and its first rows to how it is read."""


class _Histogram:
    """Counts lengths; above 4,096 in steps of under 2%, so that it stays small.

    Lengths are gathered and counted by the block, which costs a tenth of counting one by one.
    """

    def __init__(self) -> None:
        self.pending = array("q")
        self.counts = np.zeros(4097, dtype=np.int64)
        self.long: Counter[int] = Counter()
        self.total = self.maximum = 0
        self.minimum = 1 << 62

    def add(self, length: int) -> None:
        self.pending.append(length)
        if len(self.pending) == _BLOCK:
            self._count_pending()

    def lengths(self) -> Lengths | None:
        self._count_pending()
        filled = [(int(length), int(self.counts[length])) for length in self.counts.nonzero()[0]]
        filled += sorted(self.long.items())
        number = sum(count for _, count in filled)
        if not number:
            return None

        def quantile(share: float) -> int:
            cumulated = itertools.accumulate(count for _, count in filled)
            place = next(i for i, c in enumerate(cumulated) if c >= share * number)
            return filled[place][0]

        mean = self.total / number
        return Lengths(self.minimum, mean, quantile(0.5), quantile(0.95), self.maximum)

    def _count_pending(self) -> None:
        if not self.pending:
            return
        lengths = np.array(self.pending)
        self.pending = array("q")
        self.total += int(lengths.sum())
        self.minimum = min(self.minimum, int(lengths.min()))
        self.maximum = max(self.maximum, int(lengths.max()))
        self.counts += np.bincount(lengths[lengths <= 4096], minlength=4097)
        for length in lengths[lengths > 4096].tolist():
            step = 1 << (length.bit_length() - 7)
            self.long[length // step * step] += 1


class _Repeats:
    """Finds equal rows through 64-bit hashes.

    Two different texts share a hash with a probability of about n * n / 2**65: 3e-8 for a million.
    Beyond a number of rows only those whose text's hash ends in zeros are kept: all occurrences of
    a text are kept or none, so that the counts can be scaled.
    """

    def __init__(self) -> None:
        self.texts = array("q")
        self.labels = array("i")
        self.mask = 0

    def add(self, text_hash: int, label: int) -> None:
        if text_hash & self.mask:
            return
        self.texts.append(text_hash)
        self.labels.append(label)
        if len(self.texts) > _MAX_HASHES:
            self.mask = 2 * self.mask + 1
            texts, labels = self._as_arrays()
            kept = (texts & self.mask) == 0
            self.texts = array("q", texts[kept].tobytes())
            self.labels = array("i", labels[kept].tobytes())

    def count(self) -> tuple[int, int]:
        """Returns the number of duplicate rows and of texts with more than one label."""
        texts, labels = self._as_arrays()
        if not len(texts):
            return 0, 0
        order = np.lexsort((labels, texts))
        texts, labels = texts[order], labels[order]
        same_text = texts[1:] == texts[:-1]
        same_label = labels[1:] == labels[:-1]
        groups = np.cumsum(~same_text)
        contradictory = np.unique(groups[same_text & ~same_label]).size
        scale = self.mask + 1
        return int((same_text & same_label).sum()) * scale, int(contradictory) * scale

    def _as_arrays(self) -> tuple[np.ndarray, np.ndarray]:
        # Copies: an array cannot grow while numpy looks into it.
        return np.array(self.texts, dtype=np.int64), np.array(self.labels, dtype=np.int32)


@dataclass(slots=True)
class _Tally:
    """What one pass over the file counts."""

    num_used: int = 0
    num_rejected: int = 0
    reasons: dict[str, list[int]] = field(default_factory=dict)
    label_ids: dict[str, int] = field(default_factory=dict)
    label_counts: list[int] = field(default_factory=list)
    num_uncounted_labels: int = 0
    characters: _Histogram = field(default_factory=_Histogram)
    words: _Histogram = field(default_factory=_Histogram)
    longest_text: int = 0
    longest_text_line: int | None = None
    repeats: _Repeats = field(default_factory=_Repeats)
    sample: list[Row] = field(default_factory=list)

    @property
    def num_rows(self) -> int:
        return self.num_used + self.num_rejected

    def reject(self, line: int, reason: str) -> None:
        self.num_rejected += 1
        # What stands in brackets differs from row to row: places, values.
        reason = reason.partition(" (")[0]
        if reason not in self.reasons and len(self.reasons) >= _MAX_LISTED_REASONS - 1:
            reason = "other reasons"
        self.reasons.setdefault(reason, [0, line])[0] += 1

    def label_id(self, label: str) -> int:
        """Counts a label and returns its number."""
        number = self.label_ids.get(label)
        if number is None:
            if len(self.label_ids) >= _MAX_COUNTED_LABELS:
                self.num_uncounted_labels += 1
                return -1
            number = self.label_ids[label] = len(self.label_counts)
            self.label_counts.append(0)
        self.label_counts[number] += 1
        return number

    def add(self, row: Row, texts: tuple[str, ...], label: int) -> None:
        self.num_used += 1
        if len(self.sample) < _SHOWN_ROWS:
            self.sample.append(row)
        if not texts:
            return
        if len(texts) == 1:
            length, num_words = len(texts[0]), _num_words(texts[0])
        else:
            length, num_words = sum(map(len, texts)), sum(map(_num_words, texts))
        if length > self.longest_text:
            self.longest_text, self.longest_text_line = length, row.line
        self.characters.add(length)
        self.words.add(num_words)
        self.repeats.add(hash(texts), label)


def _num_words(text: str) -> int:
    """Counts runs without white space in a stripped text."""
    # Twice as fast as split(): of all white space only the blank is printable.
    if text.isprintable() and "  " not in text:
        return text.count(" ") + 1 if text else 0
    return len(text.split())


def inspect_file(
    path: str | Path,
    *,
    delimiter: str | None = None,
    header: bool | None = None,
    encoding: str | None = None,
    text: Sequence[str] | None = None,
    label: str | None = None,
    display_name: str | None = None,
    choose_task: TaskChooser | None = None,
) -> Inspection:
    """Reads a file once and says what it holds.

    Args:
        path: as for ``open_rows``, like ``delimiter``, ``header``, ``encoding`` and
            ``display_name``.
        delimiter: see ``path``.
        header: see ``path``.
        encoding: see ``path``.
        text: the text columns, by name or number; guessed by default.
        label: the label column, by name or number; guessed by default.
        display_name: see ``path``.
        choose_task: says what the file is for, from its first rows; classification by default.

    Raises:
        DataError: the file cannot be read; not that it cannot be learned from.
        UsageError: a named column is not there.
        MachineError: the file may not be read.
    """
    started = time.perf_counter()
    rows = open_rows(
        path, delimiter=delimiter, header=header, encoding=encoding, display_name=display_name
    )
    problems: list[str] = []
    sample = list(itertools.islice(_only_rows(rows), SAMPLE_ROWS))
    chosen = None if choose_task is None or not sample else choose_task(rows, sample)
    if chosen is None or chosen.reading.label is not None:
        text_columns, label_column, reasons = _choose(rows, sample, text, label, problems)
        read_row = partial(texts_of, positions=range(len(text_columns)))
    else:
        text_columns, label_column = chosen.reading.columns, None
        reasons, read_row = chosen.reasons, chosen.reading.read_row
    tally = _count(rows, text_columns, read_row, label_column)
    counts = dict(zip(tally.label_ids, tally.label_counts, strict=True))
    problems += _problems(rows, tally, counts, label_column)
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    small = [item for item in reversed(ranked) if item[1] < FEW_EXAMPLES]
    num_duplicates, num_contradictory = tally.repeats.count()
    seconds = time.perf_counter() - started
    return Inspection(
        file=rows.display_name,
        task="text-classification" if chosen is None else chosen.reading.task,
        format=rows.format,
        notes=rows.notes,
        columns=rows.columns,
        text_columns=text_columns,
        label_column=label_column,
        column_reasons=reasons,
        num_rows=tally.num_rows,
        num_used=tally.num_used,
        num_rejected=tally.num_rejected,
        rejected_reasons=tuple(Reason(r, n, line) for r, (n, line) in tally.reasons.items()),
        num_classes=len(ranked),
        classes=tuple(ranked[:_MAX_LISTED_CLASSES]),
        majority_share=ranked[0][1] / tally.num_used if ranked else None,
        num_small_classes=len(small),
        small_classes=tuple(small[:_MAX_LISTED_CLASSES]),
        characters=tally.characters.lengths(),
        words=tally.words.lengths(),
        longest_text_line=tally.longest_text_line,
        num_duplicates=num_duplicates,
        num_contradictory_texts=num_contradictory if label_column is not None else 0,
        duplicates_estimated=tally.repeats.mask > 0,
        sample=tuple(_shown(row, rows.columns) for row in tally.sample),
        problems=tuple(problems),
        seconds=seconds,
        rows_per_second=tally.num_rows / seconds,
    )


def _choose(
    rows: RowFile,
    sample: Sequence[Row],
    text: Sequence[str] | None,
    label: str | None,
    problems: list[str],
) -> tuple[tuple[str, ...], str | None, tuple[str, ...]]:
    """Chooses the columns of a classifier; what cannot be chosen becomes a problem."""
    if not sample:
        return (), None, ()
    try:
        choice = choose_columns(
            sample, rows.columns, text=text, label=label, file=rows.display_name
        )
        return choice.text, choice.label, choice.reasons
    except DataError as error:
        problems.append(str(error))
    try:
        names, reasons = choose_text_columns(
            sample, rows.columns, text=text, file=rows.display_name
        )
    except DataError as error:
        if str(error) not in problems:
            problems.append(str(error))
        return (), None, ()
    return names, None, reasons


def _only_rows(rows: RowFile) -> Iterator[Row]:
    return (item for item in rows if isinstance(item, Row))


def _count(
    rows: RowFile,
    text_columns: Sequence[str],
    read_row: Callable[[Sequence[Cell]], tuple[str, ...]],
    label_column: str | None,
) -> _Tally:
    """Passes over the file once."""
    text_at = resolve_columns(rows.columns, text_columns)
    label_at = None if label_column is None else resolve_columns(rows.columns, [label_column])[0]
    tally = _Tally()
    texts: tuple[str, ...] = ()
    number = 0
    for item in rows:
        if isinstance(item, Rejected):
            tally.reject(item.line, item.reason)
            continue
        try:
            if text_at:
                texts = read_row([item.cells[i] for i in text_at])
            if label_at is not None:
                number = tally.label_id(label_of(item.cells[label_at]))
        except CellError as error:
            tally.reject(item.line, str(error))
            continue
        tally.add(item, texts, number)
    return tally


def _problems(
    rows: RowFile, tally: _Tally, counts: dict[str, int], label_column: str | None
) -> list[str]:
    """Lists what stands in the way of training, after the whole file was read."""
    problems: list[str] = []
    num_rows = tally.num_rows
    if tally.num_rejected * 10 > num_rows:
        reason, (count, line) = max(tally.reasons.items(), key=lambda item: item[1][0])
        problems.append(
            f"{rows.display_name}: {tally.num_rejected:,} of {num_rows:,} rows cannot be used; "
            f"{count:,} because: {reason} (first in line {line})."
        )
    if label_column is None or not tally.num_used:
        return problems
    if tally.num_uncounted_labels:
        problems.append(
            f"{rows.display_name}: the label column '{label_column}' has more than "
            f"{_MAX_COUNTED_LABELS:,} different values; name another with --label-column."
        )
        return problems
    try:
        check_label_values(counts, label_column, tally.num_used, file=rows.display_name)
    except DataError as error:
        problems.append(str(error))
    return problems


def _shown(row: Row, columns: Sequence[str]) -> dict[str, Cell]:
    """Returns a row as a person wants to see it: long strings are cut."""
    cells = [
        cell[: _SHOWN_CHARACTERS - 1] + "…"
        if isinstance(cell, str) and len(cell) > _SHOWN_CHARACTERS
        else cell
        for cell in row.cells
    ]
    return dict(zip(columns, cells, strict=True))
