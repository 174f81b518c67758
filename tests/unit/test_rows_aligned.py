"""Line-aligned pairs: every line meets its own, or none is used."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from hasten.core.errors import DataError, UsageError
from hasten.data.rows import Row, open_aligned

MULTI30K = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "multi30k"
SETTINGS = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

# What str.splitlines() would split at is common here.
line = st.text(st.sampled_from("ab é中\r\t\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"), max_size=6).map(
    lambda text: text.rstrip("\r")
)
ends = st.sampled_from(["\n", "\r\n"])
pairs = st.lists(st.tuples(line, ends, line, ends), min_size=1, max_size=8)


def write(path: Path, content: str | bytes) -> Path:
    data = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def one_side(lines: list[str], ends: list[str], *, is_ended: bool) -> str:
    text = "".join(line + end for line, end in zip(lines, ends, strict=True))
    # An empty last line without its end would be no line.
    return text if is_ended or not lines[-1] else text.removesuffix(ends[-1])


@SETTINGS
@given(pairs=pairs, is_ended=st.tuples(st.booleans(), st.booleans()), gz=st.booleans())
def test_each_line_meets_its_own(tmp_path, pairs, is_ended, gz):
    left, left_ends, right, right_ends = (list(part) for part in zip(*pairs, strict=True))
    texts = [
        one_side(left, left_ends, is_ended=is_ended[0]),
        one_side(right, right_ends, is_ended=is_ended[1]),
    ]
    assume(all(text.encode().strip() for text in texts))
    source = write(tmp_path / f"train.en{'.gz' * gz}", texts[0])
    target = write(tmp_path / "train.de", texts[1])
    file = open_aligned(source, target)
    rows = list(file)
    expected = zip(left, right, strict=True)
    assert rows == [Row(number, pair) for number, pair in enumerate(expected, start=1)]
    assert rows == list(file), "reading again gives the same"


def test_form(tmp_path):
    source = write(tmp_path / "train.en", "a dog\na cat\n")
    target = write(tmp_path / "train.de", "ein Hund\r\neine Katze")
    file = open_aligned(str(source), target)
    assert file.display_name == "train.en + train.de"
    assert (file.format, file.columns) == ("aligned", ("source", "target"))
    assert (file.path, file.paths) == (source, (source, target))
    assert (file.has_header, file.delimiter) == (False, None)
    assert file.notes == ("line-aligned: 2 lines each",)
    assert list(file) == [Row(1, ("a dog", "ein Hund")), Row(2, ("a cat", "eine Katze"))]


def test_files_of_one_name_are_told_apart(tmp_path):
    for folder in ("en", "de"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "train", "a\n")
    file = open_aligned(tmp_path / "en" / "train", tmp_path / "de" / "train")
    assert file.display_name == f"{tmp_path / 'en' / 'train'} + {tmp_path / 'de' / 'train'}"


def test_fingerprint_is_that_of_both_files(tmp_path):
    source, target = write(tmp_path / "a.en", "one\n"), write(tmp_path / "a.de", "eins\n")
    seen = {open_aligned(source, target).fingerprint(), open_aligned(target, source).fingerprint()}
    assert len(seen) == 2
    for path in (source, target):
        before = path.read_bytes()
        path.write_bytes(b"other\n")
        seen.add(open_aligned(source, target).fingerprint())
        path.write_bytes(before)
    assert len(seen) == 4
    assert open_aligned(source, target).fingerprint() in seen


@pytest.mark.parametrize(
    "left, right, counts",
    [
        ("a\nb\n", "x\ny\nz\n", ("2 lines", "3 lines")),
        ("a\nb", "x\n", ("2 lines", "1 line:")),
        ("a\n\n", "x\n", ("2 lines", "1 line:")),
        ("a\u2028b\n", "x\ny\n", ("1 line ", "2 lines")),
        ("a\n" * 1200, "x\n" * 1201, ("1,200 lines", "1,201 lines")),
    ],
)
def test_unequal_numbers_of_lines(tmp_path, left, right, counts):
    source, target = write(tmp_path / "train.en", left), write(tmp_path / "train.de", right)
    with pytest.raises(DataError) as caught:
        open_aligned(source, target)
    for part in (str(source), str(target), *counts):
        assert part in str(caught.value)


def test_files_that_change(tmp_path):
    source, target = write(tmp_path / "train.en", "a\nb\n"), write(tmp_path / "train.de", "x\ny\n")
    file = open_aligned(source, target)
    write(source, "a\nb\nc\n")
    with pytest.raises(DataError, match=r"train\.en \+ train\.de: .* changed"):
        list(file)
    target.unlink()
    with pytest.raises(DataError, match=r"train\.de: the file is gone"):
        list(file)


def test_what_is_wrong_names_its_file(tmp_path):
    good = write(tmp_path / "train.en", "a\nb\n")
    bad = tmp_path / "train.de"
    with pytest.raises(DataError, match=r"train\.de: there is no such file"):
        open_aligned(good, bad)
    write(bad, b"caf\xe9\nb\n")
    with pytest.raises(DataError, match=r"train\.de, line 1: byte 4 of the line \(0xe9\)"):
        open_aligned(good, bad)
    assert next(iter(open_aligned(good, bad, encoding="latin-1"))).cells == ("a", "café")
    with pytest.raises(UsageError, match="no-such-code"):
        open_aligned(good, bad, encoding="no-such-code")
    write(bad, b"a\0\nb\n")
    with pytest.raises(DataError, match=r"train\.de: is not text"):
        open_aligned(good, bad)
    write(bad, "")
    with pytest.raises(DataError, match=r"train\.de: is empty"):
        open_aligned(good, bad)


def test_each_file_may_have_its_own_byte_order_mark(tmp_path):
    source = write(tmp_path / "train.en", "café\n".encode("utf-16"))
    target = write(tmp_path / "train.de", "中\r\n".encode("utf-8-sig"))
    file = open_aligned(source, target)
    assert list(file) == [Row(1, ("café", "中"))]
    assert [note.split(":")[0] for note in file.notes[:2]] == ["train.en", "train.de"]


@pytest.mark.skipif(not MULTI30K.exists(), reason=f"multi30k is not in {MULTI30K}")
def test_multi30k():
    file = open_aligned(MULTI30K / "val.en", MULTI30K / "val.de")
    rows = list(file)
    assert len(rows) == 1014
    assert all(isinstance(row, Row) and all(row.cells) for row in rows)
