"""Reads two files as one, line by line: a sentence and its translation.

    train.en  line 1, line 2, ...  -+
                                    +-> Row(1, (source, target)), Row(2, ...)
    train.de  line 1, line 2, ...  -+

One line too many in either would shift every pair after it, so that the lines of both are counted
before any is used.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from hasten.core.errors import DataError
from hasten.data.plain_text import read_lines
from hasten.data.source import Row, RowFile, Source, read_head, text_source

COLUMNS = ("source", "target")


def open_aligned(source: str | Path, target: str | Path, *, encoding: str | None = None) -> RowFile:
    r"""Returns what is needed to read two line-aligned files, plain or gzipped.

    Cells are lines without their line end, which is ``\n`` or ``\r\n``; both may be empty.

    Args:
        source: the file of the first column, ``source``.
        target: the file of the second column, ``target``.
        encoding: of both; UTF-8, or what each one's byte order mark says, by default.

    Raises:
        DataError: a file is missing, empty, a folder or not text, or they differ in their number
            of lines.
        MachineError: a file may not be read.
        UsageError: an unknown encoding.
    """
    sources: list[Source] = []
    notes: list[str] = []
    for path in (Path(source), Path(target)):
        found, found_notes = text_source(path, str(path), *read_head(path, str(path)), encoding)
        sources.append(found)
        notes += [f"{path.name}: {note}" for note in found_notes]
    first, second = sources
    num_first, num_second = (sum(1 for _ in read_lines(found)) for found in sources)
    if num_first != num_second:
        raise DataError(
            f"{first.name} has {_counted(num_first)} and {second.name} {_counted(num_second)}: "
            "line-aligned files must have the same number, each line the translation of the "
            "other's."
        )
    names = [found.path.name for found in sources]
    if names[0] == names[1]:
        names = [found.name for found in sources]
    name = " + ".join(names)
    return RowFile(
        display_name=name,
        format="aligned",
        columns=COLUMNS,
        notes=(*notes, f"line-aligned: {_counted(num_first)} each"),
        sources=(first, second),
        reader=partial(_iterate_pairs, first, second, name),
    )


def _counted(num_lines: int) -> str:
    return f"{num_lines:,} line{'' if num_lines == 1 else 's'}"


def _iterate_pairs(first: Source, second: Source, name: str) -> Iterator[Row]:
    pairs = itertools.zip_longest(read_lines(first), read_lines(second))
    for number, (source, target) in enumerate(pairs, start=1):
        if source is None or target is None:
            raise DataError(f"{name}: one of the files was changed since it was opened.")
        yield Row(number, (source, target))
