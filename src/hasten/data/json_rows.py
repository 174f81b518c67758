"""Reads JSON: one object a line, or one array of objects.

    .jsonl ---------------> open_jsonl       a line at a time
    .json -> json_form -+-> open_jsonl       one object a line after all
                        +-> open_json_array  the whole document in memory
                        +-> squad.py         the whole document in memory

Columns are the keys of the first objects in order of appearance; a missing key is a None.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, Literal

from hasten.core.errors import DataError
from hasten.data.source import Cell, Rejected, Row, RowFile, Source, named_errors

JsonForm = Literal["jsonl", "array", "squad"]

JSON_READ = (
    "of .json files hasten reads SQuAD (an object with 'data'), one array of objects, and one "
    "object a line"
)
JSON_KINDS = {
    dict: "an object",
    list: "a list",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "a truth value",
}
_SAMPLE_OBJECTS = 1000
_Object = tuple[int, dict[str, Cell]]


def open_jsonl(source: Source, notes: list[str]) -> RowFile:
    """Returns what is needed to read one object a line.

    Args:
        source: the file.
        notes: what is known of the file already; not changed.

    Raises:
        DataError: none of the first lines holds an object, or the objects are empty.
    """
    columns, fault = _find_columns(_json_lines(source), source)
    if not columns:
        if fault is None:
            raise DataError(f"{source.name}: is empty.")
        raise DataError(
            f"{source.name}, line {fault.line}: {fault.reason}; JSON lines are one object a line."
        )
    return RowFile(
        display_name=source.name,
        format="jsonl",
        columns=columns,
        notes=(*notes, f"columns: the keys of the first {_SAMPLE_OBJECTS:,} objects"),
        sources=(source,),
        reader=partial(_iterate_jsonl, source, columns),
    )


def open_json_array(source: Source, notes: list[str]) -> RowFile:
    """Returns what is needed to read one array of objects; a Row's line is the object's number.

    Args:
        source: the file.
        notes: what is known of the file already; not changed.

    Raises:
        DataError: the file is not JSON, or the array holds no object.
    """
    columns, fault = _find_columns(_array_objects(source), source)
    if not columns:
        if fault is None:
            raise DataError(f"{source.name}: is an empty JSON array.")
        raise DataError(
            f"{source.name}, element {fault.line} of the array: {fault.reason}; {JSON_READ}."
        )
    keys = f"columns: the keys of the first {_SAMPLE_OBJECTS:,} objects"
    return RowFile(
        display_name=source.name,
        format="json",
        columns=columns,
        notes=(*notes, "one JSON array: objects are numbered from 1", keys),
        sources=(source,),
        reader=partial(_iterate_array, source, columns),
    )


def json_form(source: Source) -> JsonForm:
    """Says in which form a .json file holds its rows, by its first line.

    A file of one line with one object is SQuAD if it has ``data``, else one JSON line.

    Raises:
        DataError: it is something else.
    """
    # Only \n ends a line: \r is white space to JSON.
    with named_errors(source), source.open_text(newline="\n") as handle:
        lines = (line for line in handle if not line.isspace())
        first = next(lines, "").strip()
        is_alone = next(lines, None) is None
    if first.startswith("["):
        return "array"
    if first.startswith("{"):
        if first.endswith("}") and not (is_alone and _has_data(first)):
            return "jsonl"
        return "squad"
    try:
        kind = f"holds {JSON_KINDS.get(type(json.loads(first)), 'null')}" if is_alone else ""
    except ValueError:
        kind = ""
    raise DataError(f"{source.name}: {kind or 'is not JSON'}; {JSON_READ}.")


def load_document(source: Source) -> Any:
    """Returns the one JSON value that a file holds.

    Raises:
        DataError: it is not JSON; names the line.
        MachineError: it may not be read.
    """
    with named_errors(source), source.open_text(newline="") as handle:
        text = handle.read()
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{source.name}, line {error.lineno}: not JSON: {error.msg} (column {error.colno}); "
            f"{JSON_READ}."
        ) from error
    except (RecursionError, ValueError) as error:
        raise DataError(f"{source.name}: not readable as JSON: {error}.") from error


def surrogate_fault(value: Any) -> str | None:
    """Returns why a JSON value cannot be written as UTF-8, or None if it can.

    Half of a surrogate pair (an escape such as backslash u d83d alone) parses, but is no character.
    """
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return "a string holds half of a surrogate pair"
    except RecursionError as error:
        return f"not readable as JSON: {error}"
    return None


def _has_data(line: str) -> bool:
    try:
        return "data" in json.loads(line)
    except (RecursionError, ValueError):
        return False


def _find_columns(
    objects: Iterable[_Object | Rejected], source: Source
) -> tuple[tuple[str, ...], Rejected | None]:
    """Returns the keys of the first objects, and the first fault before or among them.

    No columns: none of the first values is an object.
    """
    columns: dict[str, None] = {}
    num_objects = 0
    fault: Rejected | None = None
    for item in objects:
        if isinstance(item, Rejected):
            fault = fault or item
            if num_objects == 0 and item.line >= _SAMPLE_OBJECTS:
                break
            continue
        columns.update(dict.fromkeys(item[1]))
        num_objects += 1
        if num_objects == _SAMPLE_OBJECTS:
            break
    if num_objects and not columns:
        raise DataError(f"{source.name}: its JSON objects are empty.")
    return tuple(columns), fault


def _as_row(item: _Object | Rejected, columns: tuple[str, ...]) -> Row | Rejected:
    if isinstance(item, Rejected):
        return item
    line, values = item
    return Row(line, tuple([values.get(column) for column in columns]))


def _iterate_jsonl(source: Source, columns: tuple[str, ...]) -> Iterator[Row | Rejected]:
    return (_as_row(item, columns) for item in _json_lines(source))


def _iterate_array(source: Source, columns: tuple[str, ...]) -> Iterator[Row | Rejected]:
    return (_as_row(item, columns) for item in _array_objects(source))


def _json_lines(source: Source) -> Iterator[_Object | Rejected]:
    """Yields each line's number and object."""
    # Only \n ends a line: \r is white space to JSON.
    with named_errors(source), source.open_text(newline="\n") as handle:
        for line, text in enumerate(handle, start=1):
            try:
                value = json.loads(text.rstrip())
            except json.JSONDecodeError as error:
                if text.isspace():
                    continue
                yield Rejected(source.name, line, f"not JSON: {error.msg} (column {error.colno})")
            except (RecursionError, ValueError) as error:
                yield Rejected(source.name, line, f"not readable as JSON: {error}")
            else:
                yield _checked(source, line, value, may_have_surrogates="\\u" in text)


def _array_objects(source: Source) -> Iterator[_Object | Rejected]:
    """Yields each object with its number in the array."""
    for number, value in enumerate(load_document(source), start=1):
        yield _checked(source, number, value, may_have_surrogates=True)


def _checked(
    source: Source, number: int, value: Any, *, may_have_surrogates: bool
) -> _Object | Rejected:
    if may_have_surrogates and (fault := surrogate_fault(value)):
        return Rejected(source.name, number, fault)
    if not isinstance(value, dict):
        kind = JSON_KINDS.get(type(value), "null")
        return Rejected(source.name, number, f"not a JSON object but {kind}")
    return number, value
