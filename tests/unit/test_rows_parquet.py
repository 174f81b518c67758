"""Parquet: the table that was written is the one that is read, or an error names the file."""

from __future__ import annotations

import datetime
import decimal
import gzip
import io
import json
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hasten.core.errors import DataError, MachineError
from hasten.data.rows import Row, open_rows, spool_standard_input

SETTINGS = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
whole_numbers = st.integers(-(2**63), 2**63 - 1)
floats = st.floats(allow_nan=False)
KINDS = {
    "text": (pyarrow.string(), texts),
    "large": (pyarrow.large_string(), texts),
    "number": (pyarrow.int64(), whole_numbers),
    "score": (pyarrow.float64(), floats),
    "truth": (pyarrow.bool_(), st.booleans()),
    "list": (pyarrow.list_(pyarrow.string()), st.lists(st.none() | texts, max_size=3)),
    "answers": (
        pyarrow.list_(
            pyarrow.struct([("text", pyarrow.string()), ("answer_start", pyarrow.int64())])
        ),
        st.lists(st.fixed_dictionaries({"text": texts, "answer_start": whole_numbers}), max_size=2),
    ),
}


def write(
    folder: Path, table: pyarrow.Table, name: str = "file.parquet", **options: object
) -> Path:
    path = folder / name
    pyarrow.parquet.write_table(table, path, **options)
    return path


@SETTINGS
@given(
    names=st.lists(st.sampled_from(sorted(KINDS)), min_size=1, unique=True),
    num_rows=st.integers(1, 5),
    row_group_size=st.integers(1, 4),
    data=st.data(),
)
def test_what_is_written_is_read(tmp_path, names, num_rows, row_group_size, data):
    columns = {}
    for name in names:
        kind, values = KINDS[name]
        cells = data.draw(st.lists(st.none() | values, min_size=num_rows, max_size=num_rows))
        columns[name] = pyarrow.array(cells, kind)
    table = pyarrow.table(columns)
    source = open_rows(write(tmp_path, table, row_group_size=row_group_size))
    assert source.columns == tuple(names)
    rows = list(source)
    expected = [tuple(entry[name] for name in names) for entry in table.to_pylist()]
    assert rows == [Row(number, cells) for number, cells in enumerate(expected, start=1)]
    assert [list(map(type, row.cells)) for row in rows] == [list(map(type, e)) for e in expected]
    assert rows == list(source), "reading again gives the same"


def test_rows_beyond_a_batch_are_numbered_on(tmp_path):
    table = pyarrow.table({"text": [f"row {i}" for i in range(5000)], "label": [1] * 5000})
    rows = list(open_rows(write(tmp_path, table, row_group_size=700)))
    assert rows == [Row(i + 1, (f"row {i}", 1)) for i in range(5000)]


def test_form(tmp_path):
    table = pyarrow.table({"text": ["a"], "label": [1]})
    source = open_rows(write(tmp_path, table))
    assert (source.format, source.has_header, source.delimiter) == ("parquet", False, None)
    assert source.notes == ("Parquet: rows are numbered from 1",)
    by_content = open_rows(write(tmp_path, table, "file.bin"))
    assert (by_content.format, list(by_content)) == ("parquet", [Row(1, ("a", 1))])


def test_columns_of_one_name_are_told_apart(tmp_path):
    table = pyarrow.table([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    source = open_rows(write(tmp_path, table))
    assert source.columns == ("text (column 1)", "text (column 2)")
    assert list(source) == [Row(1, ("a", "b"))]


def test_other_values_become_what_json_can_hold(tmp_path):
    columns = {
        "date": (pyarrow.date32(), datetime.date(2024, 2, 29), "2024-02-29"),
        "time": (pyarrow.timestamp("ns"), 1, "1970-01-01 00:00:00.000000001"),
        "price": (pyarrow.decimal128(6, 2), decimal.Decimal("1.50"), "1.50"),
        "bytes": (pyarrow.binary(), "é".encode(), "é"),
        "no text": (pyarrow.binary(), b"a\xff", "a\\xff"),
        "pairs": (pyarrow.map_(pyarrow.string(), pyarrow.int8()), [("k", 1)], [["k", 1]]),
        "dates": (pyarrow.list_(pyarrow.date32()), [datetime.date(2024, 2, 29)], ["2024-02-29"]),
        "inner": (
            pyarrow.struct([("x", pyarrow.binary()), ("y", pyarrow.null())]),
            {"x": b"z", "y": None},
            {"x": "z", "y": None},
        ),
        "nothing": (pyarrow.null(), None, None),
    }
    arrays = {name: pyarrow.array([cell], kind) for name, (kind, cell, _) in columns.items()}
    arrays["class"] = pyarrow.array(["spam"]).dictionary_encode()
    (row,) = open_rows(write(tmp_path, pyarrow.table(arrays)))
    assert row == Row(1, (*(wanted for _, _, wanted in columns.values()), "spam"))
    assert json.loads(json.dumps(row.cells)) == list(row.cells)


def refused(path: Path, *parts: str, kind: type[Exception] = DataError) -> None:
    with pytest.raises(kind) as caught:
        list(open_rows(path))
    for part in (str(path), *parts):
        assert part in str(caught.value), str(caught.value)


def test_text_that_is_not_utf8_names_column_and_row(tmp_path):
    cells = [f"text {i}" for i in range(3000)]
    array = pyarrow.array([cell.encode() for cell in cells[:2000]] + [b"caf\xe9"])
    table = pyarrow.table({"text": array.view(pyarrow.string())})
    refused(write(tmp_path, table), "column 'text', row 2001", "not UTF-8")


def test_values_that_python_cannot_hold(tmp_path):
    array = pyarrow.array([[1]], pyarrow.list_(pyarrow.timestamp("ns")))
    refused(write(tmp_path, pyarrow.table({"when": array})), "column 'when'", "timestamp[ns]")


def test_files_that_are_damaged_or_something_else(tmp_path):
    path = write(tmp_path, pyarrow.table({"text": [f"row {i}" for i in range(3000)]}))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused(path, "damaged", "again")
    path.write_bytes(whole[:200] + b"\xff" * 2000 + whole[2200:])
    refused(path)
    path.write_bytes(b"text,label\na,1\n")
    refused(path, "not a Parquet file", "PAR1")
    path.write_bytes(gzip.compress(whole))
    refused(path, "gunzip")
    path.write_bytes(b"")
    refused(path, "is empty")


@settings(SETTINGS, max_examples=150)
@given(places=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_any_damage_is_found_or_leaves_every_row(tmp_path, places):
    table = pyarrow.table({"text": [f"some text {i}" for i in range(100)], "label": [1] * 100})
    path = write(tmp_path, table, write_page_checksum=True)
    content = bytearray(path.read_bytes())
    for place, value in places:
        content[4 + int(place * (len(content) - 5))] = value
    path.write_bytes(content)
    try:
        assert len(list(open_rows(path))) == 100
    except DataError as error:
        assert str(path) in str(error)


def test_page_checksums_are_verified(tmp_path):
    table = pyarrow.table({"text": ["an owl", "a saw"]})
    options = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    path = write(tmp_path, table, write_page_checksum=True, **options)
    content = path.read_bytes()
    assert content.count(b"an owl") == 1
    path.write_bytes(content.replace(b"an owl", b"an awl"))
    refused(path, "damaged", "CRC")


def test_no_rows_and_no_columns(tmp_path):
    refused(write(tmp_path, pyarrow.table({"text": pyarrow.array([], "string")})), "holds no rows")
    refused(write(tmp_path, pyarrow.table({})), "holds no columns")


def test_a_file_that_vanishes(tmp_path):
    source = open_rows(write(tmp_path, pyarrow.table({"text": ["a"]})))
    source.path.unlink()
    with pytest.raises(DataError, match="gone"):
        list(source)


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    path = write(tmp_path, pyarrow.table({"text": ["a"]}))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused(path, "pip install 'hasten[parquet]'", kind=MachineError)
    path.write_bytes(b"something else")
    refused(path, "not a Parquet file")


def test_pyarrow_is_not_imported_for_other_formats(tmp_path):
    (tmp_path / "file.csv").write_text("text,label\na,1\nb,0\n")
    program = (
        "import sys; from hasten.data.rows import open_rows; "
        "assert len(list(open_rows('file.csv'))) == 2; assert 'pyarrow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)


def test_standard_input(tmp_path):
    content = write(tmp_path, pyarrow.table({"text": ["a"]})).read_bytes()
    path = spool_standard_input(io.BytesIO(content), tmp_path)
    assert (path.name, path.read_bytes()) == ("standard-input.parquet", content)
    assert list(open_rows(path, display_name="standard input")) == [Row(1, ("a",))]
