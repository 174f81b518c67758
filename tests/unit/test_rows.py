"""Reading CSV, TSV and JSON lines: nothing is lost, lines are right, errors say where.

The other formats have files of their own: test_rows_json, _parquet, _text and _aligned.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import hashlib
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from hasten.core.errors import DataError, MachineError, UsageError
from hasten.data.dialect import detect_header, num_words
from hasten.data.rows import Rejected, Row, RowFile, open_rows, spool_standard_input

SPECTRUM = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "csv-spectrum"
SST2 = SPECTRUM.parent / "sst2"
SETTINGS = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

# NUL bytes make a file binary; half surrogates cannot be written at all.
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
awkward = st.text(st.sampled_from('",;\t|\n\r \\a1é中'), max_size=8)
cells = st.one_of(texts, awkward)


tables = st.integers(1, 4).flatmap(
    lambda n: st.lists(st.lists(cells, min_size=n, max_size=n), min_size=1, max_size=8)
)


def write(folder: Path, content: str | bytes, name: str = "file.csv") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(source: RowFile) -> list[list[object]]:
    rows = list(source)
    assert not [row for row in rows if isinstance(row, Rejected)]
    return [list(row.cells) for row in rows if isinstance(row, Row)]


def is_blank(row: Sequence[str]) -> bool:
    return not row or (len(row) == 1 and not row[0].strip())


def num_lines(text: str) -> int:
    return len(list(io.StringIO(text, newline="")))


# --- properties ------------------------------------------------------------------------------


@SETTINGS
@given(table=tables, delimiter=st.sampled_from(",;\t|"), quote_all=st.booleans())
def test_what_csv_writes_is_what_we_read(tmp_path, table, delimiter, quote_all):
    assume(not any(is_blank(row) for row in table))
    header = [f"name{i}" for i in range(len(table[0]))]
    buffer = io.StringIO(newline="")
    writer = csv.writer(
        buffer, delimiter=delimiter, quoting=csv.QUOTE_ALL if quote_all else csv.QUOTE_MINIMAL
    )
    starts = []
    for row in [header, *table]:
        starts.append(num_lines(buffer.getvalue()) + 1)
        writer.writerow(row)
    source = open_rows(write(tmp_path, buffer.getvalue()), delimiter=delimiter, header=True)
    rows = list(source)
    assert source.columns == tuple(header)
    assert rows == [Row(s, tuple(r)) for s, r in zip(starts[1:], table, strict=True)]
    assert rows == list(source), "reading again gives the same"


@SETTINGS
@given(
    table=st.lists(st.lists(cells, min_size=1, max_size=4), min_size=1, max_size=8),
    end=st.sampled_from(["\n", "\r\n"]),
)
def test_used_and_rejected_are_all_rows(tmp_path, table, end):
    buffer = io.StringIO(newline="")
    # All quoted: older versions of csv.writer leave a lone \r bare when lines end in \n.
    writer = csv.writer(buffer, lineterminator=end, quoting=csv.QUOTE_ALL)
    expected = []
    writer.writerow(["one", "two"])
    for row in table:
        line = num_lines(buffer.getvalue()) + 1
        writer.writerow(row)
        if not is_blank(row):
            expected.append((line, len(row) == 2))
    path = write(tmp_path, buffer.getvalue())
    if not expected:
        with pytest.raises(DataError, match="only a header"):
            open_rows(path, delimiter=",", header=True)
        return
    rows = list(open_rows(path, delimiter=",", header=True))
    assert [(row.line, isinstance(row, Row)) for row in rows] == expected


@SETTINGS
@given(raw=st.text(st.sampled_from('ab,"\n\r \t;{}[]:1'), min_size=1, max_size=60))
def test_any_text_is_read_or_refused_with_its_file_named(tmp_path, raw):
    for name in ("file.csv", "file.tsv", "file.jsonl", "file"):
        path = write(tmp_path, raw, name)
        try:
            source = open_rows(path)
            for row in source:
                assert 1 <= row.line <= num_lines(raw)
                if isinstance(row, Row):
                    assert len(row.cells) == len(source.columns)
        except DataError as error:
            assert str(path) in str(error)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=4,
)


@SETTINGS
@given(
    objects=st.lists(st.dictionaries(texts, json_values, max_size=4), min_size=1, max_size=6),
    ascii_only=st.booleans(),
)
def test_json_lines_round_trip(tmp_path, objects, ascii_only):
    assume(any(objects))
    lines = [json.dumps(o, ensure_ascii=ascii_only) for o in objects]
    source = open_rows(write(tmp_path, "\n\n".join(lines), "file.jsonl"))
    assert set(source.columns) == {key for o in objects for key in o}
    rows = list(source)
    assert [row.line for row in rows] == [2 * i + 1 for i in range(len(objects))]
    for row, o in zip(rows, objects, strict=True):
        assert isinstance(row, Row)
        assert row.cells == tuple(o.get(column) for column in source.columns)


# --- forms -----------------------------------------------------------------------------------

# The behaviours of csv-spectrum, in our own words.
FORMS = {
    "comma in quotes": ('city,zip\n"Bonn, Rhein",53111\n', [["Bonn, Rhein", "53111"]]),
    "empty cells": ('a,b\n1,""\n2,3', [["1", ""], ["2", "3"]]),
    "empty cells, crlf": ('a,b\r\n1,""\r\n2,3', [["1", ""], ["2", "3"]]),
    "doubled quotes": ('a,b\n1,"so ""so"" la"\n3,4\n', [["1", 'so "so" la'], ["3", "4"]]),
    "json in a cell": ('k,v\n1,"{""x"": [1.0, 2]}"\n', [["1", '{"x": [1.0, 2]}']]),
    "bare quotes": ("n,place\n7,37°36'37.8\"N\n", [["7", "37°36'37.8\"N"]]),
    "newline in quotes": ('a,b\n"x \ny",5\n7,8\n', [["x \ny", "5"], ["7", "8"]]),
    "newline in quotes, crlf": ('a,b\r\n"x \r\ny",5\r\n', [["x \r\ny", "5"]]),
    "quotes and newlines": ('a,b\n1,"p \n""q"" \nr"\n', [["1", 'p \n"q" \nr']]),
    "simple": ("a,b,c\n1,2,3\n", [["1", "2", "3"]]),
    "utf-8": ("a,b\n1,2\n4,ʤ", [["1", "2"], ["4", "ʤ"]]),
    "old line ends": ("a,b\r1,2\r3,4\r", [["1", "2"], ["3", "4"]]),
    "blank lines": ("\n\na,b\n1,2\n\n   \n3,4\n\n", [["1", "2"], ["3", "4"]]),
    "semicolons": ("text;label\nI came, I saw;x\nyes, no, so;y\n", None),
    "bars": ("text|label\nI came, I saw|x\nyes, no, so|y\n", None),
    "tabs": ("text\tlabel\nI came, I saw\tx\nyes, no, so\ty\n", None),
    "blank before a quote": ('label, text\nx, "a, b"\ny, "c, d"\n', [["x", "a, b"], ["y", "c, d"]]),
    "backslash quotes": (
        'text,label\n"he said \\"no, no\\"",x\n"well, then",y\n',
        [['he said "no, no"', "x"], ["well, then", "y"]],
    ),
    "literal words": ("text,label\nNA,null\nNone,nan\n", [["NA", "null"], ["None", "nan"]]),
}


@pytest.mark.parametrize("content, rows", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("gz", [False, True], ids=["plain", "gz"])
def test_forms(tmp_path, content, rows, gz):
    rows = rows or [["I came, I saw", "x"], ["yes, no, so", "y"]]
    data = gzip.compress(content.encode()) if gz else content
    source = open_rows(write(tmp_path, data, "file.csv.gz" if gz else "file.csv"))
    assert source.has_header
    assert source.format == "csv"
    assert read(source) == rows


@pytest.mark.skipif(not SPECTRUM.exists(), reason=f"csv-spectrum is not in {SPECTRUM}")
def test_all_of_csv_spectrum():
    files = sorted((SPECTRUM / "csvs").glob("*.csv"))
    assert len(files) == 12
    for path in files:
        wanted = json.loads((SPECTRUM / "json" / f"{path.stem}.json").read_text(encoding="utf-8"))
        wanted = wanted if isinstance(wanted, list) else [wanted]
        source = open_rows(path)
        found = [dict(zip(source.columns, cells, strict=True)) for cells in read(source)]
        if path.stem == "location_coordinates":
            # The collection's JSON has another telephone number than its CSV.
            assert found[0].pop("Contact Phone Number") == "2095257564"
            wanted[0].pop("Contact Phone Number")
        assert found == wanted, path.stem


@pytest.mark.skipif(not SST2.exists(), reason=f"sst2 is not in {SST2}")
@pytest.mark.parametrize("name, num_rows", [("train", 6920), ("dev", 872), ("test", 1821)])
def test_sst2(name, num_rows):
    source = open_rows(SST2 / f"{name}.csv")
    assert source.columns == ("text", "label")
    assert source.has_header
    rows = list(source)
    assert len(rows) == num_rows
    assert all(isinstance(row, Row) for row in rows)


@pytest.mark.parametrize(
    "encoding, bom",
    [
        ("utf-8", codecs.BOM_UTF8),
        ("utf-16-le", codecs.BOM_UTF16_LE),
        ("utf-16-be", codecs.BOM_UTF16_BE),
        ("utf-32-le", codecs.BOM_UTF32_LE),
    ],
)
@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_byte_order_marks_are_removed(tmp_path, encoding, bom, suffix):
    content = (
        "text,label\ncafé 中,1\n" if suffix == "csv" else '{"text": "café 中", "label": "1"}\n'
    )
    source = open_rows(write(tmp_path, bom + content.encode(encoding), f"file.{suffix}"))
    assert source.columns == ("text", "label")
    assert read(source) == [["café 中", "1"]]
    assert any("byte order mark" in note for note in source.notes)


def test_encoding_as_asked_for(tmp_path):
    path = write(tmp_path, "text,label\ncafé,1\n".encode("latin-1"))
    assert read(open_rows(path, encoding="latin-1")) == [["café", "1"]]
    with_mark = write(tmp_path, codecs.BOM_UTF8 + b"text,label\na,1\n")
    assert open_rows(with_mark, encoding="utf-8").columns == ("text", "label")
    for wrong in ("no-such-code", "base64"):
        with pytest.raises(UsageError, match=wrong):
            open_rows(path, encoding=wrong)


def test_delimiter_as_asked_for(tmp_path):
    path = write(tmp_path, "a b,c\td e\n1 2,3\t4 5\n")
    assert open_rows(path, delimiter=" ").columns == ("a", "b,c d", "e")
    assert open_rows(path, delimiter="tab").columns == ("a b,c", "d e")
    assert open_rows(path, delimiter="\\t").delimiter == "\t"
    for wrong in ("", "ab", '"', "\n"):
        with pytest.raises(UsageError, match="one character"):
            open_rows(path, delimiter=wrong)


@pytest.mark.parametrize(
    "name, content, wanted",
    [
        ("file.tsv", "text\tlabel\na, b\t1\n", ("tsv", "\t")),
        ("file.tsv", "text,label\nb,1\nc,2\n", ("tsv", ",")),
        ("file.CSV", "text,label\nb,1\n", ("csv", ",")),
        ("file.data", "text\tlabel\na, b\t1\n", ("tsv", "\t")),
        ("file", "text,label\nb,1\n", ("csv", ",")),
        ("file.json", '{"a": 1}\n{"a": 2}\n', ("jsonl", None)),
        ("file.ndjson", '{"a": 1}\n', ("jsonl", None)),
        ("file", ' \n{"a": 1}\n', ("jsonl", None)),
        ("file", '[{"a": 1}]', ("json", None)),
        ("file.txt", "text,label\nb,1\n", ("text", None)),
        ("file.TEXT", '{"a": 1}\n', ("text", None)),
        ("file.md", "Some words.\nMore words, here.\nAnd none.\n", ("text", None)),
        ("file", "only, one, line\n", ("text", None)),
        ("file", "text,label\nb,1", ("csv", ",")),
        ("file", f"{'long ' * 4000},1\n" * 5, ("csv", ",")),
        ("file", "long " * 20_000, ("text", None)),
        ("file", "words\nin\none\ncolumn\n", ("text", None)),
        ("file", "a,b\n" * 19 + "a\n", ("csv", ",")),
        ("file", "a,b\n" * 8 + "a\n" * 2, ("text", None)),
    ],
)
def test_format_by_name_or_content(tmp_path, name, content, wanted):
    source = open_rows(write(tmp_path, content, name))
    assert (source.format, source.delimiter) == wanted
    compressed = write(tmp_path, gzip.compress(content.encode()), name + ".gz")
    assert (open_rows(compressed).format, open_rows(compressed).delimiter) == wanted


def test_delimiter_or_header_makes_a_table_of_a_text_file(tmp_path):
    path = write(tmp_path, "text\tlabel\na, b\t1\n", "file.txt")
    for options in ({"delimiter": "tab"}, {"header": True}, {"delimiter": "\t", "header": True}):
        source = open_rows(path, **options)
        assert (source.format, source.columns) == ("tsv", ("text", "label"))
        assert read(source) == [["a, b", "1"]]
        assert "was given" in source.notes[0]
    plain = open_rows(write(tmp_path, "a line\nanother, longer\n", "file.txt"), header=False)
    assert (plain.format, plain.columns) == ("csv", ("1",))
    assert read(plain) == [["a line"], ["another, longer"]]


def test_what_rows_depend_on_is_in_the_notes(tmp_path):
    """Caches are keyed by content and notes: equal notes must mean equal rows."""
    path = write(tmp_path, b"a, b\nc, d\n", "file.txt")
    ways = [{}, {"text_rows": "lines"}, {"delimiter": ","}, {"encoding": "latin-1"}]
    files = [open_rows(path, **options) for options in ways]
    assert len({(file.format, file.notes) for file in files}) == len(files)
    assert len({file.fingerprint() for file in files}) == 1


def test_gzip_is_recognised_by_content(tmp_path):
    hidden = write(tmp_path, gzip.compress(b"text,label\na,1\n"), "file.csv")
    assert read(open_rows(hidden)) == [["a", "1"]]
    pretended = write(tmp_path, b"text,label\na,1\n", "file.csv.gz")
    assert read(open_rows(pretended)) == [["a", "1"]]


def test_quotation_marks_as_text_in_tsv(tmp_path):
    content = 'text\tlabel\n"good" film\t1\nan "old\t0\n" bad\t0\n'
    source = open_rows(write(tmp_path, content, "file.tsv"))
    assert read(source) == [['"good" film', "1"], ['an "old', "0"], ['" bad', "0"]]
    assert any("quotation marks are text" in note for note in source.notes)


def test_plain_lines_are_one_column(tmp_path):
    content = 'text\nwhat, no film?\na film\nI saw "it", twice\nso be it\nfine\n'
    source = open_rows(write(tmp_path, content))
    assert (source.columns, source.delimiter) == (("text",), None)
    assert read(source)[0] == ["what, no film?"]
    assert read(source)[2] == ['I saw "it", twice']
    quoted = open_rows(write(tmp_path, 'text\n"what, no film?"\na film\n'))
    assert read(quoted) == [["what, no film?"], ["a film"]]


def test_names_of_columns(tmp_path):
    source = open_rows(
        write(tmp_path, " text \tlabel\t\tlabel\t a  b\nx\t1\t2\t3\t4\n", "file.tsv")
    )
    assert source.columns == ("text", "label (column 2)", "column 3", "label (column 4)", "a b")
    assert any("2 columns are named 'label'" in note for note in source.notes)


def test_notes_give_reasons(tmp_path):
    notes = open_rows(write(tmp_path, "text;label\na;1\nb;2\n")).notes
    assert notes[0] == "delimiter ';' (the same 2 columns in the first 3 rows)"
    assert notes[1] == "the first row is a header (names such as 'text' and 'label')"


def test_fingerprint_is_that_of_the_bytes(tmp_path):
    path = write(tmp_path, "text,label\na,1\n")
    source = open_rows(path)
    assert source.fingerprint() == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (source.path, source.paths) == (path, (path,))


def test_large_file_is_read_beyond_the_sample(tmp_path):
    lines = [f'"row {i}, as it is",{i % 2}' for i in range(60_000)]
    source = open_rows(write(tmp_path, "text,label\n" + "\n".join(lines)))
    rows = list(source)
    assert len(rows) == 60_000
    assert rows[-1] == Row(60_001, ("row 59999, as it is", "1"))


def test_a_long_cell_is_read(tmp_path):
    long = "word " * 600_000
    source = open_rows(write(tmp_path, f'text,label\n"{long}",1\nb,2\n'), header=True)
    assert read(source) == [[long, "1"], ["b", "2"]]


# --- headers ---------------------------------------------------------------------------------


def rows_of(text: str) -> list[list[str]]:
    return list(csv.reader(text.splitlines()))


@pytest.mark.parametrize(
    "text",
    [
        "text,label\nfine,1\nbad,0",
        "Sentence,Class\nfine,pos\nbad,neg\nwell,pos",
        "review_text,stars\nit is a very good film,5\nI hated all of it,1",
        "v1,v2,,\nham,see you at the game,,\nspam,win a prize now call,,\nham,ok then my dear,,",
        ",phrase,value\n0,quite good,pos\n1,quite bad,neg",
        "0,1\nwhat a film,0\nno film at all,1",
        "x,kind\n" + "\n".join(f"this is line number {i},{'ab'[i % 2]}" for i in range(20)),
        "What did you think of it?,Staff\n"
        + "\n".join(f"I think it was {i} out of ten,{'ab'[i % 2]}" for i in range(40)),
        "文本,标签\n这部电影很好看,正面\n太差了,负面",
        "question,answer\nwho is it,question\nwhat is it,thing",
        "city,country\nBonn,Germany",
    ],
)
def test_header_is_found(text):
    assert detect_header(rows_of(text))[0]


@pytest.mark.parametrize(
    "text",
    [
        "a good film,pos\na bad film,neg\nfine,pos\nawful,neg",
        "fine,1\nbad,0\nwell,1",
        "1,fine\n0,bad",
        "good,positive\nbad,negative\nwell done,positive",
        "这部电影很好看,正面\n太差了,负面\n好看,正面",
        "what is this thing about,question\nI have no idea at all,answer\nwho are you now,question",
        "this film is one of the best,rare\n"
        + "\n".join(f"this is line number {i},{'ab'[i % 2]}" for i in range(20)),
        "I saw it twice and liked it.\nIt was a waste of my evening.",
    ],
)
def test_no_header_is_found(text):
    assert not detect_header(rows_of(text))[0]


def test_without_a_header_columns_have_numbers(tmp_path):
    path = write(tmp_path, "fine,1\nbad,0\nwell,1\n")
    source = open_rows(path)
    assert source.columns == ("1", "2")
    assert not source.has_header
    assert [row.line for row in source] == [1, 2, 3]
    forced = open_rows(path, header=True)
    assert forced.columns == ("fine", "1")
    assert len(list(forced)) == 2


def test_words_of_chinese_are_counted():
    assert num_words("two words") == 2
    assert num_words("这部电影很好看") >= 3


# --- rejected rows ---------------------------------------------------------------------------


def test_rejected_rows_say_why(tmp_path):
    path = write(tmp_path, 'text,label\na,1\nb,2,3\n\n"c\nc",1\nd\n"e"e,1\n"f\nf"f,1\ng,2\n')
    rows = list(open_rows(path))
    assert [row.line for row in rows] == [2, 3, 5, 7, 8, 9, 11]
    reasons = [(row.line, row.reason) for row in rows if isinstance(row, Rejected)]
    assert reasons == [
        (3, "3 cells where the header has 2"),
        (7, "1 cell where the header has 2"),
        (8, "text follows a closing quote; double the quotes in it"),
        (9, "text follows a closing quote; double the quotes in it (lines 9 to 10)"),
    ]
    assert {row.file for row in rows if isinstance(row, Rejected)} == {str(path)}


def test_rejected_rows_without_a_header(tmp_path):
    rows = list(open_rows(write(tmp_path, "fine,1\nbad,0\nwell\nso,1\n")))
    assert rows[2] == Rejected(str(tmp_path / "file.csv"), 3, "1 cell where most rows have 2")


def test_rejected_json_lines(tmp_path):
    deep = "[" * 100_000
    content = "\n".join(
        [
            '{"text": "a", "label": 1}',
            '{"text": "b", "label": }',
            "[1, 2]",
            "null",
            '{"text": "\\ud83d", "label": 1}',
            '{"text": "\\ud83d\\ude00"}',
            deep,
            '{"n": ' + "1" * 5000 + "}",
            '{"label": true, "other": 1}',
        ]
    )
    source = open_rows(write(tmp_path, content, "file.jsonl"))
    assert source.columns == ("text", "label", "other")
    rows = list(source)
    assert [row.line for row in rows] == list(range(1, 10))
    assert rows[0] == Row(1, ("a", 1, None))
    assert rows[5] == Row(6, ("😀", None, None))
    assert rows[8] == Row(9, (None, True, 1))
    reasons = {row.line: row.reason for row in rows if isinstance(row, Rejected)}
    assert sorted(reasons) == [2, 3, 4, 5, 7, 8]
    assert reasons[2].startswith("not JSON: Expecting value (column")
    assert reasons[3] == "not a JSON object but a list"
    assert reasons[4] == "not a JSON object but null"
    assert "surrogate" in reasons[5]


# --- errors ----------------------------------------------------------------------------------


def refused(path: Path, *parts: str, kind: type[Exception] = DataError, **options: object) -> None:
    with pytest.raises(kind) as caught:
        for _ in open_rows(path, **options):  # type: ignore[arg-type]
            pass
    message = str(caught.value)
    assert str(path) in message
    assert message.count("\n") <= 1
    for part in parts:
        assert part in message, message


def test_missing_file_names_the_nearest(tmp_path):
    write(tmp_path, "text,label\na,1\n", "train.csv")
    refused(tmp_path / "trian.csv", "no such file", "Did you mean 'train.csv'?")
    refused(tmp_path / "nowhere" / "train.csv", "no such file", "no folder")


def test_folder_names_the_files_in_it(tmp_path):
    refused(tmp_path, "is a folder")
    write(tmp_path, "text,label\na,1\n", "train.csv.gz")
    refused(tmp_path, "is a folder", "train.csv.gz")


def test_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.csv")
    refused(tmp_path / "pipe.csv", "standard input")


@pytest.mark.parametrize("content", [b"", b"\n \n\n", codecs.BOM_UTF8, gzip.compress(b"", mtime=0)])
@pytest.mark.parametrize("name", ["file.csv", "file.jsonl", "file"])
def test_empty_file(tmp_path, content, name):
    refused(write(tmp_path, content, name), "is empty")


def test_only_a_header(tmp_path):
    refused(write(tmp_path, "text,label\n"), "only a header (text, label)", "--data.header false")
    refused(write(tmp_path, "text,label\n\n"), "no rows", header=True)
    assert read(open_rows(write(tmp_path, "a,1\n"), header=False)) == [["a", "1"]]


@pytest.mark.parametrize(
    "content, part",
    [
        (b"text,label\na\0b,1\n", "NUL byte at offset 12"),
        (b"PK\x03\x04rest", "Excel"),
        (b"PAR1rest", "Parquet"),
        (b"%PDF-1.7", "PDF"),
        (b"\x89PNG\r\n\x1a\n", "PNG"),
        ("text,label\na,1\n".encode("utf-16-le"), "--data.encoding utf-16-le"),
        ("text,label\na,1\n".encode("utf-16-be"), "--data.encoding utf-16-be"),
    ],
)
def test_binary_file(tmp_path, content, part):
    refused(write(tmp_path, content), part)


def test_refusals_name_the_formats_that_are_read(tmp_path):
    formats = (".csv", ".tsv", ".jsonl", ".json", ".txt", ".parquet", ".gz")
    refused(write(tmp_path, b"a,b\n\0\n"), *formats)
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "is a folder", *formats)


def test_undecodable_bytes_name_line_and_byte(tmp_path):
    head = b"text,label\n" + b"plain,1\n" * 50_000
    refused(
        write(tmp_path, head + b"caf\xe9,1\n"),
        "line 50002",
        "byte 4 of the line (0xe9)",
        "--data.encoding latin-1",
    )
    refused(write(tmp_path, b"text,label\ncaf\xe9,1\n"), "line 2")
    refused(write(tmp_path, b'{"a": "\xff"}\n', "file.jsonl"), "line 1")
    refused(write(tmp_path, b"text,label\ncaf\xe9,1\n"), "line 2", "ascii", encoding="ascii")
    refused(write(tmp_path, codecs.BOM_UTF16_LE + b"a\0,\0b\0\n\0x"), "utf-16")


@pytest.mark.parametrize(
    "content, line",
    [
        ('text,label\n"good,1\nbad,0\n', 2),
        ('text,label\na,1\n"b\nb","c\nbad,0\nx,1\n', 4),
        ('text,label\na,1\nb,"', 3),
        ("text,label\n" + "a,1\n" * 300_000 + '"b,1\n' + "c,1\n" * 9, 300_002),
    ],
)
def test_unclosed_quote_names_its_line(tmp_path, content, line):
    refused(write(tmp_path, content), f"line {line}: a quote opens here and is never closed")


def test_endless_cell_is_an_unclosed_quote(tmp_path):
    rest = "filler,1\n" * 2_000_000
    refused(write(tmp_path, f'text,label\na,1\n"b,1\n{rest}'), "line 3", "most likely a quote")
    refused(write(tmp_path, f'"b,1\n{rest}'), "line 1", "most likely a quote")


def test_damaged_gzip(tmp_path):
    whole = gzip.compress(b"text,label\n" + os.urandom(300_000).hex().encode() + b",1\n")
    refused(write(tmp_path, whole[:-100_000], "file.csv.gz"), "gzip file ends too early")
    refused(write(tmp_path, whole[:30], "file.csv.gz"), "gzip file ends too early")
    middle = len(whole) // 2
    broken = whole[:middle] + b"\xff" * 50 + whole[middle + 50 :]
    refused(write(tmp_path, broken, "file.csv.gz"), "gzip file is damaged")


def test_no_json_object_at_all(tmp_path):
    refused(write(tmp_path, "text,label\na,1\n", "file.jsonl"), "line 1", "one object a line")
    refused(write(tmp_path, "{}\n", "file.jsonl"), "objects are empty")


def test_permission_is_the_machines_matter(tmp_path, monkeypatch):
    path = write(tmp_path, "text,label\na,1\n")

    def deny(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", deny)
    refused(path, "no permission", kind=MachineError)


def test_file_that_vanishes(tmp_path):
    path = write(tmp_path, "text,label\na,1\n")
    source = open_rows(path)
    path.unlink()
    with pytest.raises(DataError, match="gone"):
        list(source)


# --- standard input --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content, suffix, wanted",
    [
        (b"text,label\na,1\nb,0\n", ".csv", ["a", "1"]),
        (b"text\tlabel\na\t1\nb\t0\n", ".tsv", ["a", "1"]),
        (codecs.BOM_UTF8 + b'{"text": "a", "label": "1"}\n', ".jsonl", ["a", "1"]),
        (gzip.compress(b'{"text": "a", "label": "1"}\n', mtime=0), ".gz", ["a", "1"]),
    ],
)
def test_standard_input_is_spooled(tmp_path, content, suffix, wanted):
    path = spool_standard_input(io.BytesIO(content), tmp_path)
    assert path.suffix == suffix
    assert path.read_bytes() == content
    source = open_rows(path, display_name="standard input")
    assert source.display_name == "standard input"
    assert read(source)[0] == wanted


def test_empty_standard_input(tmp_path):
    with pytest.raises(DataError, match="standard input is empty"):
        spool_standard_input(io.BytesIO(b""), tmp_path)
    assert not list(tmp_path.iterdir())


def test_standard_input_with_nowhere_to_go(tmp_path):
    with pytest.raises(MachineError, match="cannot be written"):
        spool_standard_input(io.BytesIO(b"a,b\n"), tmp_path / "missing")
