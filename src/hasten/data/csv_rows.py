"""Reads CSV and TSV, a row at a time, and names the physical line of a bad one.

    Source -> text sample -> dialect.py: delimiter, quotes, header -> RowFile
    Source -> csv.reader -> Row, or Rejected with its lines, or an error that ends the reading

Only the standard library reads the rows, because only that names the line of a bad one. Blank
lines are not rows.
"""

from __future__ import annotations

import csv
import itertools
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import NoReturn

from hasten.core.errors import DataError
from hasten.data import dialect as dialects
from hasten.data.dialect import Dialect, Sample
from hasten.data.source import Rejected, Row, RowFile, Source, named_errors

# A cell of more characters is taken for a quote that nobody closed; this also bounds the memory
# that such a quote can claim (the csv module needs four bytes a character).
MAX_CELL_CHARACTERS = 1 << 24


def open_csv(
    source: Source, file_format: str, notes: list[str], delimiter: str | None, header: bool | None
) -> RowFile:
    """Finds delimiter, quotes and header, and returns what is needed to read the table.

    Args:
        source: the file.
        file_format: ``csv`` or ``tsv``, whose delimiter wins ties.
        notes: what is known of the file already; not changed.
        delimiter: what the person asked for, if anything.
        header: likewise.

    Raises:
        DataError: the file holds no row, or no readable one.
        MachineError: it may not be read.
    """
    preferred = "\t" if file_format == "tsv" else ","
    sample = _read_sample(source)
    dialect, rows, dialect_notes = dialects.detect_dialect(sample, delimiter, preferred)
    if not rows:
        _refuse_unreadable(source, dialect, sample)
    if header is None:
        has_header, reason = dialects.detect_header(rows)
    else:
        has_header, reason = header, "as asked for"
    if has_header and len(rows) == 1 and sample.complete:
        _refuse_only_header(source, dialect, rows[0], reason)
    if has_header:
        columns, name_notes = dialects.name_columns(rows[0])
        header_notes = [f"the first row is a header ({reason})", *name_notes]
    else:
        width = Counter(map(len, rows)).most_common(1)[0][0]
        columns = tuple(str(number) for number in range(1, width + 1))
        header_notes = [f"no header ({reason}); columns are called by their numbers"]
    return RowFile(
        display_name=source.name,
        format=file_format,
        columns=columns,
        notes=(*notes, *dialect_notes, *header_notes),
        has_header=has_header,
        delimiter=None if dialect.delimiter == dialects.NO_DELIMITER else dialect.delimiter,
        sources=(source,),
        reader=partial(_iterate_csv, source, dialect, len(columns), has_header),
    )


def _refuse_unreadable(source: Source, dialect: Dialect, sample: Sample) -> NoReturn:
    """Says why the sample holds no row: the reader names the fault, which is fatal here."""
    if not sample.complete:
        raise DataError(
            f"{source.name}, line 1: the first row has more than {len(sample.text):,} characters; "
            "most likely a quote opens there and is never closed."
        )
    # No row has -1 cells: only what cannot be parsed comes back.
    for item in _iterate_csv(source, dialect, -1, has_header=False):
        assert isinstance(item, Rejected)
        raise DataError(f"{source.name}, line {item.line}: {item.reason}.")
    raise DataError(f"{source.name}: is empty.")


def _refuse_only_header(source: Source, dialect: Dialect, row: list[str], reason: str) -> None:
    # The only readable row may be followed by something unreadable, which is the better message,
    # or, in a file of one column, by cells of white space.
    for item in _iterate_csv(source, dialect, len(row), has_header=True):
        if isinstance(item, Rejected):
            raise DataError(f"{source.name}, line {item.line}: {item.reason}.")
        return
    hint = "" if reason == "as asked for" else "; if it is data, pass --data.header false"
    raise DataError(
        f"{source.name}: holds only a header ({', '.join(row)[:80]}) and no rows{hint}."
    )


def _read_sample(source: Source) -> Sample:
    with named_errors(source), source.open_text(newline="") as handle:
        text = handle.read(dialects.SAMPLE_CHARACTERS)
        complete = len(text) < dialects.SAMPLE_CHARACTERS
    if not complete:
        # Cut the last, incomplete line off; a single endless line stays as it is.
        text = text[: text.rfind("\n") + 1] or text
    return Sample(text, complete)


def _iterate_csv(
    source: Source, dialect: Dialect, width: int, has_header: bool
) -> Iterator[Row | Rejected]:
    """Yields the rows after the header; a row that cannot be parsed is rejected with its lines."""
    # The limit belongs to the process: it is only ever raised.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_CELL_CHARACTERS))
    expected = f"where {'the header has' if has_header else 'most rows have'} {width}"
    with named_errors(source), source.open_text(newline="") as handle:
        reader = dialect.read(handle)
        line, skip = 0, has_header
        while True:
            try:
                for cells in reader:
                    start, line = line + 1, reader.line_num
                    if len(cells) == width and not skip:
                        yield Row(start, tuple(cells))
                    elif len(cells) > 1 or (cells and cells[0].strip()):
                        if skip:
                            skip = False
                        else:
                            count = f"{len(cells)} cell{'s' if len(cells) > 1 else ''}"
                            yield Rejected(source.name, start, f"{count} {expected}")
                return
            except csv.Error as error:
                start, line = line + 1, reader.line_num
                yield _broken_row(source, dialect, (start, line), error)


def _broken_row(
    source: Source, dialect: Dialect, lines: tuple[int, int], error: csv.Error
) -> Rejected:
    """Returns what to say of a row that the csv module cannot parse, or raises if all is lost."""
    first, last = lines
    if "end of data" in str(error):
        opened = _where_quote_opens(source, dialect, first)
        raise DataError(
            f"{source.name}, line {opened}: a quote opens here and is never closed; close it, or "
            'write "" for a quotation mark within a quoted cell.'
        ) from error
    if "field limit" in str(error):
        raise DataError(
            f"{source.name}, line {first}: a cell has more than {MAX_CELL_CHARACTERS:,} "
            "characters; most likely a quote opens there and is never closed."
        ) from error
    where = f" (lines {first} to {last})" if last > first else ""
    if "expected after" in str(error):
        return Rejected(
            source.name, first, f"text follows a closing quote; double the quotes in it{where}"
        )
    return Rejected(source.name, first, f"not readable as CSV: {error}{where}")


def _where_quote_opens(source: Source, dialect: Dialect, row_line: int) -> int:
    """Returns the physical line of the unclosed quote in the row that starts at ``row_line``."""
    with source.open_text(newline="") as handle:
        reader = dialect.read(itertools.islice(handle, row_line - 1, None), strict=False)
        cells = next(reader)
        num_lines = len(list(dialects.split_lines(cells[-1])))
        return row_line - 1 + reader.line_num - max(num_lines, 1) + 1
