"""Reads files of examples: CSV, TSV and JSON lines, each also gzipped.

    path -> open_rows -> RowFile -> iterate -> Row(line, cells)              a row as it stands
               |                            or Rejected(file, line, reason)  and why it is not used
           dialect.py: how the file is written, with reasons

Only the standard library reads the rows, because only that names the physical line of a bad one.
Iterating reads the file again from its start, a row at a time; nothing is kept. Blank lines are
not rows. Everything else is either a Row or a Rejected, or ends the reading with an error that
says where.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import gzip
import hashlib
import io
import itertools
import json
import shutil
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from hasten.core.errors import DataError, MachineError, UsageError, nearest
from hasten.data import dialect as dialects
from hasten.data.dialect import Dialect, Sample

Cell = Any
"""A string in CSV and TSV; any JSON value in JSON lines (None where the key is missing)."""

# A cell of more characters is taken for a quote that nobody closed; this also bounds the memory
# that such a quote can claim (the csv module needs four bytes a character).
MAX_CELL_CHARACTERS = 1 << 24
_HEAD_BYTES = 1 << 16
_JSON_SAMPLE_OBJECTS = 1000
_GZIP_MAGIC = b"\x1f\x8b"
_JSON_KINDS = {
    list: "a list",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "a truth value",
}


@dataclass(frozen=True, slots=True)
class Row:
    """One example as it stands in the file.

    Attributes:
        line: the physical line, from 1, in which the row starts.
        cells: one for each of the file's columns.
    """

    line: int
    cells: tuple[Cell, ...]


@dataclass(frozen=True, slots=True)
class Rejected:
    """One row that cannot be used, and why."""

    file: str
    line: int
    reason: str


@dataclass(frozen=True, slots=True)
class _Source:
    """Where the bytes are and how they become text."""

    path: Path
    name: str
    compressed: bool
    encoding: str

    def open_bytes(self) -> BinaryIO:
        if self.compressed:
            return gzip.open(self.path, "rb")  # pyright: ignore[reportReturnType]
        return self.path.open("rb")

    def open_text(self, newline: str) -> io.TextIOWrapper:
        return io.TextIOWrapper(self.open_bytes(), encoding=self.encoding, newline=newline)


@dataclass(frozen=True, slots=True)
class RowFile:
    """A file whose form is known; iterating yields its rows, from the start each time.

    Attributes:
        path: the file.
        display_name: how messages call it.
        format: ``csv``, ``tsv`` or ``jsonl``.
        columns: the columns' names: the header's, or ``1``, ``2`` ... without a header.
        has_header: whether the first row gives the names.
        delimiter: one character; None in JSON lines and in a file of plain lines.
        notes: what was detected, each with its reason, to be printed.
    """

    path: Path
    display_name: str
    format: str
    columns: tuple[str, ...]
    has_header: bool
    delimiter: str | None
    notes: tuple[str, ...]
    _source: _Source = field(repr=False)
    _dialect: Dialect | None = field(repr=False)

    def __iter__(self) -> Iterator[Row | Rejected]:
        """Yields every row.

        Raises:
            DataError: undecodable bytes, an unclosed quote, a truncated gzip file.
            MachineError: the file can no longer be read.
        """
        if self._dialect is None:
            return _iterate_jsonl(self._source, self.columns)
        return _iterate_csv(self._source, self._dialect, len(self.columns), self.has_header)

    def fingerprint(self) -> str:
        """Returns the SHA-256 of the file's bytes as they lie on disk, in hexadecimal."""
        with _named_errors(self._source), self.path.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()


def open_rows(
    path: str | Path,
    *,
    delimiter: str | None = None,
    header: bool | None = None,
    encoding: str | None = None,
    display_name: str | None = None,
) -> RowFile:
    """Looks at the beginning of a file and returns what is needed to read it.

    Args:
        path: a .csv, .tsv, .jsonl or .ndjson file, plain or gzipped; another name is judged by
            the content.
        delimiter: one character, or ``tab``; detected by default. JSON lines have none.
        header: whether the first row names the columns; detected by default.
        encoding: any text encoding that Python knows; UTF-8, or what a byte order mark says, by
            default.
        display_name: how messages call the file; its path by default.

    Raises:
        DataError: the file is missing, empty, a folder, not text, or holds no row.
        MachineError: the file may not be read.
        UsageError: an impossible delimiter or an unknown encoding.
    """
    path = Path(path)
    name = display_name or str(path)
    delimiter = _clean_delimiter(delimiter)
    head, compressed = _read_head(path, name)
    codec, encoding_note = dialects.detect_encoding(head, encoding)
    dialects.refuse_binary(head, codec, name)
    source = _Source(path, name, compressed, codec)
    file_format, notes = dialects.detect_format(path, name, head, codec)
    if compressed and path.suffix.lower() != ".gz":
        notes.append("gzip (by its content)")
    if encoding_note:
        notes.append(encoding_note)
    if file_format == "jsonl":
        columns = _jsonl_columns(source)
        notes.append(f"columns: the keys of the first {_JSON_SAMPLE_OBJECTS:,} objects")
        return RowFile(path, name, file_format, columns, False, None, tuple(notes), source, None)
    return _open_csv(source, file_format, notes, delimiter, header)


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
    head = stream.read(_HEAD_BYTES)
    if not head:
        raise DataError("standard input is empty: send a CSV, TSV or JSON lines file to it.")
    text = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if head.startswith(_GZIP_MAGIC):
        suffix = ".gz"
    elif text.startswith(b"{"):
        suffix = ".jsonl"
    else:
        first_line = text.split(b"\n", 1)[0]
        suffix = ".tsv" if b"\t" in first_line and b"," not in first_line else ".csv"
    path = folder / f"standard-input{suffix}"
    try:
        with path.open("wb") as handle:
            handle.write(head)
            shutil.copyfileobj(stream, handle, 1 << 20)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise MachineError(f"{path}: cannot be written ({error.strerror}).") from error
    return path


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


def _read_head(path: Path, name: str) -> tuple[bytes, bool]:
    """Returns the first bytes, decompressed, and whether the file is gzipped."""
    try:
        if path.is_dir():
            raise DataError(f"{name}: is a folder; pass a file in it{_files_in(path)}.")
        if not path.exists():
            files = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
            where = "" if path.parent.is_dir() else f" There is no folder '{path.parent}'."
            raise DataError(f"{name}: there is no such file.{where}{nearest(path.name, files)}")
        if not path.is_file():
            raise DataError(
                f"{name}: is not a regular file and cannot be read twice; pass '-' and send the "
                "data to standard input."
            )
    except OSError as error:
        raise MachineError(f"{name}: cannot be read ({error.strerror}).") from error
    source = _Source(path, name, compressed=False, encoding="utf-8")
    with _named_errors(source):
        with source.open_bytes() as handle:
            head = handle.read(_HEAD_BYTES)
        compressed = head.startswith(_GZIP_MAGIC)
        if compressed:
            with gzip.open(path, "rb") as handle:
                head = handle.read(_HEAD_BYTES)
    if not head.removeprefix(codecs.BOM_UTF8).strip():
        raise DataError(f"{name}: is empty.")
    return head, compressed


def _files_in(folder: Path) -> str:
    names = sorted(p.name for p in folder.iterdir() if dialects.base_suffix(p) in dialects.FORMATS)
    shown = ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")
    return f": {shown}" if names else f" ({dialects.FORMATS_READ})"


def _open_csv(
    source: _Source, file_format: str, notes: list[str], delimiter: str | None, header: bool | None
) -> RowFile:
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
        notes += [*dialect_notes, f"the first row is a header ({reason})", *name_notes]
    else:
        width = Counter(map(len, rows)).most_common(1)[0][0]
        columns = tuple(str(number) for number in range(1, width + 1))
        notes += [*dialect_notes, f"no header ({reason}); columns are called by their numbers"]
    suffix = dialects.base_suffix(source.path)
    if suffix and suffix not in dialects.FORMATS and len(columns) < 2:
        raise DataError(
            f"{source.name}: no table can be recognised in it; hasten reads "
            f"{dialects.FORMATS_READ}. Rename the file if it is one of these."
        )
    return RowFile(
        source.path,
        source.name,
        file_format,
        columns,
        has_header,
        None if dialect.delimiter == dialects.NO_DELIMITER else dialect.delimiter,
        tuple(notes),
        source,
        dialect,
    )


def _refuse_unreadable(source: _Source, dialect: Dialect, sample: Sample) -> NoReturn:
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


def _refuse_only_header(source: _Source, dialect: Dialect, row: list[str], reason: str) -> None:
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


def _read_sample(source: _Source) -> Sample:
    with _named_errors(source), source.open_text(newline="") as handle:
        text = handle.read(dialects.SAMPLE_CHARACTERS)
        complete = len(text) < dialects.SAMPLE_CHARACTERS
    if not complete:
        # Cut the last, incomplete line off; a single endless line stays as it is.
        text = text[: text.rfind("\n") + 1] or text
    return Sample(text, complete)


def _iterate_csv(
    source: _Source, dialect: Dialect, width: int, has_header: bool
) -> Iterator[Row | Rejected]:
    """Yields the rows after the header; a row that cannot be parsed is rejected with its lines."""
    # The limit belongs to the process: it is only ever raised.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_CELL_CHARACTERS))
    expected = f"where {'the header has' if has_header else 'most rows have'} {width}"
    with _named_errors(source), source.open_text(newline="") as handle:
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
    source: _Source, dialect: Dialect, lines: tuple[int, int], error: csv.Error
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


def _where_quote_opens(source: _Source, dialect: Dialect, row_line: int) -> int:
    """Returns the physical line of the unclosed quote in the row that starts at ``row_line``."""
    with source.open_text(newline="") as handle:
        reader = dialect.read(itertools.islice(handle, row_line - 1, None), strict=False)
        cells = next(reader)
        num_lines = len(list(dialects.split_lines(cells[-1])))
        return row_line - 1 + reader.line_num - max(num_lines, 1) + 1


def _jsonl_columns(source: _Source) -> tuple[str, ...]:
    """Returns the keys of the first objects in order of appearance."""
    columns: dict[str, None] = {}
    num_objects = 0
    fault: Rejected | None = None
    for item in _json_lines(source):
        if isinstance(item, Rejected):
            fault = fault or item
            if num_objects == 0 and item.line >= _JSON_SAMPLE_OBJECTS:
                break
            continue
        columns.update(dict.fromkeys(item[1]))
        num_objects += 1
        if num_objects == _JSON_SAMPLE_OBJECTS:
            break
    if fault is not None and not num_objects:
        raise DataError(
            f"{source.name}, line {fault.line}: {fault.reason}; JSON lines are one object a line."
        )
    if not columns:
        raise DataError(f"{source.name}: its JSON objects are empty.")
    return tuple(columns)


def _iterate_jsonl(source: _Source, columns: tuple[str, ...]) -> Iterator[Row | Rejected]:
    for item in _json_lines(source):
        if isinstance(item, Rejected):
            yield item
        else:
            line, values = item
            yield Row(line, tuple([values.get(column) for column in columns]))


def _json_lines(source: _Source) -> Iterator[tuple[int, dict[str, Cell]] | Rejected]:
    """Yields each line's number and object."""
    # Only \n ends a line: \r is white space to JSON.
    with _named_errors(source), source.open_text(newline="\n") as handle:
        for line, text in enumerate(handle, start=1):
            try:
                value = json.loads(text.rstrip())
                if "\\u" in text:
                    # Half of a surrogate pair parses but is no character: nothing can encode it.
                    json.dumps(value, ensure_ascii=False).encode()
            except json.JSONDecodeError as error:
                if text.isspace():
                    continue
                yield Rejected(source.name, line, f"not JSON: {error.msg} (column {error.colno})")
            except UnicodeEncodeError:
                yield Rejected(source.name, line, "a string holds half of a surrogate pair")
            except (RecursionError, ValueError) as error:
                yield Rejected(source.name, line, f"not readable as JSON: {error}")
            else:
                if isinstance(value, dict):
                    yield line, value
                else:
                    kind = _JSON_KINDS.get(type(value), "null")
                    yield Rejected(source.name, line, f"not a JSON object but {kind}")


@contextlib.contextmanager
def _named_errors(source: _Source) -> Iterator[None]:
    """Turns what can go wrong while reading into errors that name the file and the place."""
    try:
        yield
    except UnicodeError as error:
        raise DataError(_undecodable(source, error)) from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        how = "ends too early" if isinstance(error, EOFError) else "is damaged"
        raise DataError(
            f"{source.name}: the gzip file {how}; copy or download it again ({error})."
        ) from error
    except PermissionError as error:
        raise MachineError(f"{source.name}: no permission to read it.") from error
    except FileNotFoundError as error:
        raise DataError(f"{source.name}: the file is gone.") from error
    except OSError as error:
        raise MachineError(f"{source.name}: cannot be read ({error.strerror or error}).") from error


def _undecodable(source: _Source, error: UnicodeError) -> str:
    """Describes the first undecodable byte: the text layer knows only its own buffer's offsets."""
    name = source.encoding.removesuffix("-sig")
    hint = (
        "if the file is in another encoding, name it: --data.encoding latin-1 (or cp1252, gb18030)."
        if name == "utf-8"
        else "name another encoding with --data.encoding, or leave it out."
    )
    if name.replace("_", "-").startswith(("utf-16", "utf-32")):
        return f"{source.name}: is not {name} ({getattr(error, 'reason', error)}); {hint}"
    with source.open_bytes() as handle:
        for number, line in enumerate(handle, start=1):
            try:
                line.decode(source.encoding)
            except UnicodeDecodeError as fault:
                return (
                    f"{source.name}, line {number}: byte {fault.start + 1} of the line "
                    f"(0x{fault.object[fault.start]:02x}) is not {name}; {hint}"
                )
    return f"{source.name}: is not {name} ({error}); {hint}"
