"""A file on disk, whatever its format: its bytes, its text, its rows.

    path -> read_head -> Source (path, gzipped?, encoding) -> open_bytes, open_text
                            |
    one module a format ----+--> RowFile -> iterate -> Row(line, cells)             as it stands
                                                    or Rejected(file, line, reason) and why not

A format supplies a reader, a callable that yields the rows from the file's start each time; nothing
else here knows formats. What can go wrong while reading becomes an error that names the file.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import hashlib
import io
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from hasten.core.errors import DataError, MachineError, nearest
from hasten.data import dialect as dialects

Cell = Any
"""A string in CSV, TSV and text; any JSON value elsewhere (None where nothing is given)."""

HEAD_BYTES = 1 << 16
GZIP_MAGIC = b"\x1f\x8b"


@dataclass(frozen=True, slots=True)
class Row:
    """One example as it stands in the file.

    Attributes:
        line: the physical line, from 1, in which the row starts; in formats without lines the
            number of the row, from 1, as the file's notes say.
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


Reader = Callable[[], Iterator[Row | Rejected]]
"""Starts at the beginning of the file each time it is called."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where the bytes are and how they become text.

    Attributes:
        path: the file.
        name: how messages call it.
        compressed: whether it is gzipped.
        encoding: a codec that Python knows.
    """

    path: Path
    name: str
    compressed: bool = False
    encoding: str = "utf-8"

    def open_bytes(self) -> BinaryIO:
        """Opens the (decompressed) bytes."""
        if self.compressed:
            return gzip.open(self.path, "rb")  # pyright: ignore[reportReturnType]
        return self.path.open("rb")

    def open_text(self, newline: str) -> io.TextIOWrapper:
        """Opens the text; ``newline`` as for ``open``."""
        return io.TextIOWrapper(self.open_bytes(), encoding=self.encoding, newline=newline)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowFile:
    """A file whose form is known; iterating yields its rows, from the start each time.

    Attributes:
        display_name: how messages call it.
        format: ``csv``, ``tsv``, ``jsonl``, ``json``, ``squad``, ``parquet``, ``text`` or
            ``aligned``.
        columns: the columns' names; ``1``, ``2`` ... in a table without a header.
        notes: what was detected or asked for, each with its reason, to be printed. They tell
            everything on which the rows depend beside the content.
        has_header: whether the first row of a table gives the names.
        delimiter: one character; None where no delimiter divides the cells.
        sources: the file, or both of a line-aligned pair.
        reader: yields the rows.
    """

    display_name: str
    format: str
    columns: tuple[str, ...]
    notes: tuple[str, ...]
    has_header: bool = False
    delimiter: str | None = None
    sources: tuple[Source, ...] = field(repr=False)
    reader: Reader = field(repr=False)

    @property
    def path(self) -> Path:
        """The file; of a line-aligned pair the first."""
        return self.sources[0].path

    @property
    def paths(self) -> tuple[Path, ...]:
        """All files: one, or two where they are line-aligned."""
        return tuple(source.path for source in self.sources)

    def __iter__(self) -> Iterator[Row | Rejected]:
        """Yields every row.

        Raises:
            DataError: undecodable bytes, an unclosed quote, a truncated or damaged file.
            MachineError: the file can no longer be read.
        """
        return self.reader()

    def fingerprint(self) -> str:
        """Returns the SHA-256 of the file's bytes as they lie on disk, in hexadecimal.

        Of several files it is the SHA-256 of theirs, one after the other.
        """
        digests: list[bytes] = []
        for source in self.sources:
            with named_errors(source), source.path.open("rb") as handle:
                digests.append(hashlib.file_digest(handle, "sha256").digest())
        if len(digests) == 1:
            return digests[0].hex()
        return hashlib.sha256(b"".join(digests)).hexdigest()


def read_head(path: Path, name: str) -> tuple[bytes, bool]:
    """Returns the first bytes, decompressed, and whether the file is gzipped.

    Args:
        path: the file.
        name: how messages call it.

    Raises:
        DataError: the file is missing, empty, a folder or a pipe.
        MachineError: it may not be read.
    """
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
    with named_errors(Source(path, name)):
        with path.open("rb") as handle:
            head = handle.read(HEAD_BYTES)
        compressed = head.startswith(GZIP_MAGIC)
        if compressed:
            with gzip.open(path, "rb") as handle:
                head = handle.read(HEAD_BYTES)
    if not head.removeprefix(codecs.BOM_UTF8).strip():
        raise DataError(f"{name}: is empty.")
    return head, compressed


def text_source(
    path: Path, name: str, head: bytes, compressed: bool, encoding: str | None
) -> tuple[Source, list[str]]:
    """Decides how bytes become text.

    Args:
        path: the file.
        name: how messages call it.
        head: its first bytes, from ``read_head``.
        compressed: whether it is gzipped, from ``read_head``.
        encoding: what the person asked for, if anything.

    Returns:
        The source, and notes for the person.

    Raises:
        DataError: it is not text.
        UsageError: the encoding asked for does not exist.
    """
    codec, encoding_note = dialects.detect_encoding(head, encoding)
    dialects.refuse_binary(head, codec, name)
    notes: list[str] = []
    if compressed and path.suffix.lower() != ".gz":
        notes.append("gzip (by its content)")
    if encoding_note:
        notes.append(encoding_note)
    return Source(path, name, compressed, codec), notes


@contextlib.contextmanager
def named_errors(source: Source) -> Iterator[None]:
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


def _files_in(folder: Path) -> str:
    names = sorted(p.name for p in folder.iterdir() if dialects.base_suffix(p) in dialects.FORMATS)
    shown = ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")
    return f": {shown}" if names else f" ({dialects.FORMATS_READ})"


def _undecodable(source: Source, error: UnicodeError) -> str:
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
