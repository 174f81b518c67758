"""Opens files of examples, each format with the module that reads it.

    path -> open_rows ---------> csv_rows.py   .csv .tsv
                                 json_rows.py  .jsonl .json
                                 squad.py      .json         -> RowFile -> Row or Rejected
                                 parquet.py    .parquet
                                 plain_text.py .txt
    two paths -> open_aligned -> aligned.py

The name of a file says what it is, else its content does (dialect.py). Iterating a RowFile reads
the file again from its start; nothing is kept. Everything read is either a Row or a Rejected, or
ends the reading with an error that says where.
"""

from __future__ import annotations

import codecs
import re
import shutil
from pathlib import Path
from typing import BinaryIO

from hasten.core.errors import DataError, MachineError, UsageError
from hasten.data import dialect as dialects
from hasten.data.aligned import open_aligned
from hasten.data.csv_rows import open_csv
from hasten.data.json_rows import json_form, open_json_array, open_jsonl
from hasten.data.parquet import MAGIC as PARQUET_MAGIC
from hasten.data.parquet import open_parquet
from hasten.data.plain_text import TextRows, open_text
from hasten.data.source import (
    GZIP_MAGIC,
    HEAD_BYTES,
    Cell,
    Rejected,
    Row,
    RowFile,
    Source,
    read_head,
    text_source,
)
from hasten.data.squad import open_squad

__all__ = [
    "Cell",
    "Rejected",
    "Row",
    "RowFile",
    "TextRows",
    "open_aligned",
    "open_rows",
    "spool_standard_input",
]

_OPEN_JSON = {"jsonl": open_jsonl, "array": open_json_array, "squad": open_squad}


def open_rows(
    path: str | Path,
    *,
    delimiter: str | None = None,
    header: bool | None = None,
    encoding: str | None = None,
    display_name: str | None = None,
    text_rows: TextRows = "blocks",
) -> RowFile:
    """Looks at the beginning of a file and returns what is needed to read it.

    Args:
        path: a .csv, .tsv, .jsonl, .ndjson, .json or .txt file, plain or gzipped, or a .parquet
            file; another name is judged by the content.
        delimiter: one character, or ``tab``; detected by default. Tables have one; given, it makes
            a table of a .txt file.
        header: whether the first row of a table names the columns; detected by default. Given, it
            makes a table of a .txt file.
        encoding: any text encoding that Python knows; UTF-8, or what a byte order mark says, by
            default. Parquet has its own.
        display_name: how messages call the file; its path by default.
        text_rows: how plain text becomes rows of its one column ``text``: in consecutive
            ``blocks`` of about 4,096 characters, which together are the file exactly, or in
            ``lines``, empty ones among them.

    Raises:
        DataError: the file is missing, empty, a folder, not text, or holds no row.
        MachineError: the file may not be read, or its format needs an extra that is missing.
        UsageError: an impossible delimiter or an unknown encoding.
    """
    path = Path(path)
    name = display_name or str(path)
    delimiter = _clean_delimiter(delimiter)
    head, compressed = read_head(path, name)
    if head.startswith(PARQUET_MAGIC) or dialects.base_suffix(path) == ".parquet":
        return open_parquet(Source(path, name, compressed), head)
    source, notes = text_source(path, name, head, compressed, encoding)
    start = dialects.Sample(
        head.decode(source.encoding, errors="replace"), complete=len(head) < HEAD_BYTES
    )
    file_format, format_notes = dialects.detect_format(
        path, start, delimiter=delimiter, header=header
    )
    notes = [*format_notes, *notes]
    if file_format == "text":
        return open_text(source, text_rows, notes)
    if file_format == "json":
        return _OPEN_JSON[json_form(source)](source, notes)
    if file_format == "jsonl":
        return open_jsonl(source, notes)
    return open_csv(source, file_format, notes, delimiter, header)


def spool_standard_input(stream: BinaryIO, folder: Path) -> Path:
    """Copies standard input to a file in ``folder``, so that it can be read several times.

    Args:
        stream: binary; read to its end.
        folder: an existing folder, usually a temporary one.

    Returns:
        The file; its name says what the content is.

    Raises:
        DataError: nothing came.
        MachineError: the folder cannot be written.
    """
    head = stream.read(HEAD_BYTES)
    if not head:
        raise DataError("standard input is empty: send a CSV, TSV or JSON lines file to it.")
    path = folder / f"standard-input{_suffix_of(head)}"
    try:
        with path.open("wb") as handle:
            handle.write(head)
            shutil.copyfileobj(stream, handle, 1 << 20)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise MachineError(f"{path}: cannot be written ({error.strerror}).") from error
    return path


def _suffix_of(head: bytes) -> str:
    """Names the content of standard input, which has no name of its own."""
    if head.startswith(GZIP_MAGIC):
        return ".gz"
    if head.startswith(PARQUET_MAGIC):
        return ".parquet"
    text = head.removeprefix(codecs.BOM_UTF8).lstrip()
    # An object that begins with a line break is no JSON line; one with the keys of SQuAD may be.
    is_squad = re.match(rb'\{\s*"(version|data)"', text) and b'"paragraphs"' in text
    if is_squad or re.match(rb"\{[ \t]*\r?\n|\[\s*\{", text):
        return ".json"
    if text.startswith(b"{"):
        return ".jsonl"
    first_line = text.split(b"\n", 1)[0]
    return ".tsv" if b"\t" in first_line and b"," not in first_line else ".csv"


def _clean_delimiter(delimiter: str | None) -> str | None:
    if delimiter is None:
        return None
    cleaned = {"tab": "\t", "\\t": "\t"}.get(delimiter, delimiter)
    if len(cleaned) != 1 or cleaned in '"\r\n':
        raise UsageError(
            f"the delimiter must be one character (or 'tab'), not {delimiter!r}; usual ones are "
            "',', ';', '|' and 'tab'."
        )
    return cleaned
