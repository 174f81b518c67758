"""Reads Parquet through pyarrow, an optional extra, a batch of rows at a time.

    Source -> pyarrow.parquet.ParquetFile -> record batches -> columns of Python values -> Row

Cells are what JSON can hold: strings, numbers, truth values, None, lists and dicts. Dates, times
and decimal numbers become strings; bytes too, as UTF-8.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from types import ModuleType
from typing import Any

from hasten.core.errors import DataError, MachineError
from hasten.data import dialect as dialects
from hasten.data.source import Cell, Row, RowFile, Source, named_errors

MAGIC = b"PAR1"
_BATCH_ROWS = 1024


def open_parquet(source: Source, head: bytes) -> RowFile:
    """Returns what is needed to read a Parquet file; a Row's line is the row's number from 1.

    Args:
        source: the file.
        head: its first bytes, decompressed if it is gzipped.

    Raises:
        DataError: the file is not Parquet, damaged, gzipped, or holds no row.
        MachineError: pyarrow is not installed, or the file may not be read.
    """
    if not head.startswith(MAGIC):
        raise DataError(
            f"{source.name}: is not a Parquet file, whatever its name says: it does not begin with "
            f"{MAGIC.decode()}."
        )
    if source.compressed:
        raise DataError(f"{source.name}: is a Parquet file within gzip; unpack it with gunzip.")
    pyarrow = _import_pyarrow(source)
    with _arrow_errors(source, pyarrow), _open(source, pyarrow) as file:
        names, num_rows = file.schema_arrow.names, file.metadata.num_rows
    if not names or not num_rows:
        raise DataError(f"{source.name}: holds no {'rows' if names else 'columns'}.")
    columns, name_notes = dialects.name_columns(names)
    return RowFile(
        display_name=source.name,
        format="parquet",
        columns=columns,
        notes=("Parquet: rows are numbered from 1", *name_notes),
        sources=(source,),
        reader=partial(_iterate_parquet, source),
    )


def _import_pyarrow(source: Source) -> ModuleType:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise MachineError(
            f"{source.name}: Parquet needs an extra that is not installed; this adds it: "
            "pip install 'hasten[parquet]'."
        ) from error
    return pyarrow


@contextlib.contextmanager
def _open(source: Source, pyarrow: ModuleType) -> Iterator[Any]:
    # A handle of our own: pyarrow takes some names of files for addresses.
    with (
        source.open_bytes() as handle,
        pyarrow.parquet.ParquetFile(handle, page_checksum_verification=True) as file,
    ):
        yield file


@contextlib.contextmanager
def _arrow_errors(source: Source, pyarrow: ModuleType) -> Iterator[None]:
    with named_errors(source):
        try:
            yield
        except pyarrow.ArrowNotImplementedError as error:
            raise DataError(
                f"{source.name}: pyarrow {pyarrow.__version__} does not read this kind of Parquet "
                f"file ({_first_line(error)}); write it again with the usual settings."
            ) from error
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            # What the system refuses has a number; what pyarrow finds has none.
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise DataError(
                f"{source.name}: the Parquet file is damaged; copy or download it again "
                f"({_first_line(error)})."
            ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0].rstrip(".")[:200]


def _iterate_parquet(source: Source) -> Iterator[Row]:
    pyarrow = _import_pyarrow(source)
    number = 0
    with _arrow_errors(source, pyarrow), _open(source, pyarrow) as file:
        for batch in file.iter_batches(batch_size=_BATCH_ROWS):
            columns = [
                _cells(column, f"{source.name}: column '{name}'", number, pyarrow)
                for name, column in zip(batch.schema.names, batch.columns, strict=True)
            ]
            for cells in zip(*columns, strict=True):
                number += 1
                yield Row(number, cells)


def _cells(column: Any, name: str, num_before: int, pyarrow: ModuleType) -> list[Cell]:
    """Returns a batch's column as Python values; ``num_before`` rows come before the batch."""
    types = pyarrow.types
    if types.is_temporal(column.type) or types.is_decimal(column.type):
        # Arrow's own text: Python has no nanoseconds and no year 10,000.
        column = column.cast(pyarrow.string())
    try:
        values = column.to_pylist()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name}, row {num_before + _first_undecodable(column)}: the text is not UTF-8; write "
            "the file again from text that is."
        ) from error
    except (ValueError, OverflowError) as error:
        raise DataError(
            f"{name}: its values ({column.type}) cannot be read ({_first_line(error)})."
        ) from error
    return [_plain(value) for value in values]


def _first_undecodable(column: Any) -> int:
    for number, value in enumerate(column, start=1):
        try:
            value.as_py()
        except UnicodeDecodeError:
            return number
    raise AssertionError("a column that cannot be decoded has a cell that cannot")


def _plain(value: Any) -> Cell:
    """Turns what JSON cannot hold, at any depth, into strings."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="backslashreplace")
    return str(value)
