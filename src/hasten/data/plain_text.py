r"""Reads plain text: as consecutive blocks that together are the file, or line by line.

    text ... \n|text ... \n|text       blocks: cut after a line end that text follows
    text\n text\r\n text               lines: each without its line end

A line ends in \n or \r\n and nowhere else: other characters that Unicode counts as line breaks
(form feed, U+0085, U+2028) stand within sentences of real files, and would put the numbers of
lines at odds with those that editors show.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from typing import Literal

from hasten.data.source import Row, RowFile, Source, named_errors

TextRows = Literal["blocks", "lines"]

BLOCK_CHARACTERS = 1024
MAX_BLOCK_CHARACTERS = 1 << 16
_LINE_END_BEFORE_TEXT = re.compile(r"\n(?=\S)")


def open_text(source: Source, text_rows: TextRows, notes: list[str]) -> RowFile:
    """Returns what is needed to read plain text as one column called ``text``.

    Args:
        source: the file.
        text_rows: ``blocks``: the exact text in consecutive blocks of about 1,024 characters,
            whose concatenation is the file (less a byte order mark); each ends after a line end
            that is followed by a character other than white space, or at 65,536 characters where
            no such place comes before. ``lines``: each line without its line end is a row, empty
            ones too.
        notes: what is known of the file already; not changed.
    """
    how = (
        f"plain text in consecutive blocks of about {BLOCK_CHARACTERS:,} characters"
        if text_rows == "blocks"
        else "plain text: each line is a row"
    )
    return RowFile(
        display_name=source.name,
        format="text",
        columns=("text",),
        notes=(*notes, how),
        sources=(source,),
        reader=partial(_iterate_blocks if text_rows == "blocks" else _iterate_lines, source),
    )


def read_lines(source: Source) -> Iterator[str]:
    r"""Yields each line without its line end, which is \n or \r\n.

    Raises:
        DataError: undecodable bytes.
        MachineError: the file can no longer be read.
    """
    with named_errors(source), source.open_text(newline="\n") as handle:
        for line in handle:
            yield line.removesuffix("\n").removesuffix("\r") if line.endswith("\n") else line


def _iterate_lines(source: Source) -> Iterator[Row]:
    for number, text in enumerate(read_lines(source), start=1):
        yield Row(number, (text,))


def _iterate_blocks(source: Source) -> Iterator[Row]:
    # newline="" keeps line ends as they are.
    with named_errors(source), source.open_text(newline="") as handle:
        buffer, start, line, is_all = "", 0, 1, False
        while True:
            # One character more than the largest block shows what follows its end.
            while not is_all and len(buffer) - start <= MAX_BLOCK_CHARACTERS:
                more = handle.read(8 * MAX_BLOCK_CHARACTERS)
                buffer, start, is_all = buffer[start:] + more, 0, not more
            if start == len(buffer):
                return
            end = _block_end(buffer, start)
            yield Row(line, (buffer[start:end],))
            line += buffer.count("\n", start, end)
            start = end


def _block_end(text: str, start: int) -> int:
    """Returns where the block that begins at ``start`` ends."""
    limit = start + MAX_BLOCK_CHARACTERS
    found = _LINE_END_BEFORE_TEXT.search(text, start + BLOCK_CHARACTERS - 1, limit)
    if found:
        return found.end()
    if len(text) <= limit:
        return len(text)
    return limit - 1 if text[limit - 1 : limit + 1] == "\r\n" else limit
