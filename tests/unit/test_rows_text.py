"""Plain text: blocks are the file, lines are its lines, wherever Unicode sees line breaks."""

from __future__ import annotations

import codecs
import gzip
import itertools
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from hasten.core.errors import DataError
from hasten.data.plain_text import BLOCK_CHARACTERS, MAX_BLOCK_CHARACTERS
from hasten.data.rows import Row, open_rows

SHAKESPEARE = (
    Path(__file__).resolve().parents[2].parent / "shared" / "data" / "tinyshakespeare" / "input.txt"
)
SETTINGS = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

# Each piece many times over, so that blocks end at every kind of place.
pieces = st.sampled_from(
    [
        "a",
        "word ",
        "a line\n",
        "one\r\n",
        "\n",
        "\r\n",
        "\r",
        " ",
        "\n  x",
        "中文，字。\n",
        "\u2028",
        "\x0b\x0c\x85",
        "😀",
    ]
)
long_texts = st.lists(
    st.tuples(pieces, st.sampled_from([1, 2, 700, 4095, 4096, 9000, 33_000])), max_size=5
).map(lambda parts: "".join(piece * count for piece, count in parts))
short_texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=9)


def write(folder: Path, content: str | bytes, name: str = "file.txt") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(path: Path, **options: object) -> list[Row]:
    rows = list(open_rows(path, **options))  # type: ignore[arg-type]
    assert all(isinstance(row, Row) and len(row.cells) == 1 for row in rows)
    return rows  # type: ignore[return-value]


def check_blocks(text: str, rows: list[Row]) -> None:
    """What is promised of blocks, for each block and for all together."""
    blocks = [row.cells[0] for row in rows]
    assert "".join(blocks) == text
    ends = list(itertools.accumulate(map(len, blocks)))
    starts = [0, *ends[:-1]]
    for row, block, start, end in zip(rows, blocks, starts, ends, strict=True):
        assert row.line == text.count("\n", 0, start) + 1
        assert 0 < len(block) <= MAX_BLOCK_CHARACTERS
        assert text[end - 1 : end + 1] != "\r\n"
        places = [
            place
            for place in range(start + BLOCK_CHARACTERS, min(start + MAX_BLOCK_CHARACTERS, end) + 1)
            if text[place - 1] == "\n" and not text[place : place + 1].isspace()
        ]
        if end < len(text):
            assert places == [end] or (not places and len(block) >= MAX_BLOCK_CHARACTERS - 1)
        else:
            assert places in ([], [end])


@SETTINGS
@given(text=long_texts, compressed=st.booleans(), bom=st.booleans())
def test_blocks_are_the_text(tmp_path, text, compressed, bom):
    assume(text.encode()[: 1 << 16].strip())
    data = codecs.BOM_UTF8 * bom + text.encode()
    name = "file.txt.gz" if compressed else "file.txt"
    path = write(tmp_path, gzip.compress(data, 1) if compressed else data, name)
    rows = read(path)
    check_blocks(text, rows)
    assert rows == read(path)


@SETTINGS
@given(
    lines=st.lists(short_texts.map(lambda text: text.replace("\n", " ")), min_size=1, max_size=6),
    ends=st.lists(st.sampled_from(["\n", "\r\n"]), min_size=6, max_size=6),
    is_ended=st.booleans(),
)
def test_lines_are_the_lines(tmp_path, lines, ends, is_ended):
    # A \r before \n belongs to the line end; so does none at the end of the file.
    lines = [line.rstrip("\r") for line in lines]
    assume("".join(lines).encode().strip() and not lines[0].startswith("\ufeff"))
    if not is_ended:
        ends[len(lines) - 1] = ""
        assume(lines[-1])
    path = write(tmp_path, "".join(line + end for line, end in zip(lines, ends, strict=False)))
    expected = [Row(number, (line,)) for number, line in enumerate(lines, start=1)]
    assert read(path, text_rows="lines") == expected


def test_form(tmp_path):
    for options, how in (({}, "blocks"), ({"text_rows": "lines"}, "each line is a row")):
        source = open_rows(write(tmp_path, "To be,\r\nor not.\n"), **options)
        assert (source.format, source.columns) == ("text", ("text",))
        assert (source.has_header, source.delimiter) == (False, None)
        assert how in source.notes[-1]
    assert read(source.path) == [Row(1, ("To be,\r\nor not.\n",))]
    assert read(source.path, text_rows="lines") == [Row(1, ("To be,",)), Row(2, ("or not.",))]


def test_empty_lines_are_rows(tmp_path):
    path = write(tmp_path, "\na\n\r\n\n")
    assert [row.cells[0] for row in read(path, text_rows="lines")] == ["", "a", "", ""]


def test_a_carriage_return_alone_ends_no_line(tmp_path):
    path = write(tmp_path, "a\rb\nc\r")
    assert [row.cells[0] for row in read(path, text_rows="lines")] == ["a\rb", "c\r"]


@pytest.mark.parametrize("shift", [-1, 0, 1])
@pytest.mark.parametrize("num_before", range(18))
def test_the_largest_block_divides_no_line_end(tmp_path, num_before, shift):
    """Wherever the text is read on: up to 17 blocks come before the one in question."""
    before = "x" * MAX_BLOCK_CHARACTERS * num_before
    text = before + "x" * (MAX_BLOCK_CHARACTERS - 1 + shift) + "\r\n" + " y" * 10
    blocks = [row.cells[0] for row in read(write(tmp_path, text))]
    # Without a shift \r is the last character that would fit, and \n the first that would not.
    assert len(blocks[num_before]) == MAX_BLOCK_CHARACTERS - (shift == 0)
    assert "".join(blocks) == text


@pytest.mark.parametrize("beyond", range(-1, 10))
def test_a_line_end_beyond_the_largest_block_is_too_late(tmp_path, beyond):
    text = "x" * (MAX_BLOCK_CHARACTERS + beyond) + "\nmore\n"
    first = read(write(tmp_path, text))[0]
    assert first == Row(1, (text[:MAX_BLOCK_CHARACTERS],))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
def test_byte_order_marks_are_removed(tmp_path, encoding):
    path = write(tmp_path, "café\r\n中\n".encode(encoding))
    assert read(path) == [Row(1, ("café\r\n中\n",))]
    assert [row.cells[0] for row in read(path, text_rows="lines")] == ["café", "中"]


@pytest.mark.parametrize("text_rows", ["blocks", "lines"])
def test_undecodable_bytes_name_the_line(tmp_path, text_rows):
    path = write(tmp_path, b"good line\x0b\x0c\r\n" * 30_000 + b"caf\xe9\n")
    with pytest.raises(DataError, match=r"file\.txt, line 30001: byte 4 of the line \(0xe9\)"):
        read(path, text_rows=text_rows)
    path.write_bytes(b"caf\xe9\n")
    assert read(path, text_rows=text_rows, encoding="latin-1")[0].cells[0].strip() == "café"


@pytest.mark.skipif(not SHAKESPEARE.exists(), reason=f"no text in {SHAKESPEARE}")
def test_tiny_shakespeare():
    text = SHAKESPEARE.read_text(encoding="utf-8")
    rows = read(SHAKESPEARE)
    check_blocks(text, rows)
    lengths = [len(row.cells[0]) for row in rows[:-1]]
    assert min(lengths) >= BLOCK_CHARACTERS and max(lengths) < 2 * BLOCK_CHARACTERS
