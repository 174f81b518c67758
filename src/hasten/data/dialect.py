"""How a file is written: its encoding, its delimiter, its quotes, its header.

    first bytes -> detect_encoding, detect_format -> text sample -> detect_dialect -> rows
    rows -> detect_header -> name_columns

Every answer comes with its reason, because a guess that is not shown cannot be corrected.
Only the beginning of a file is looked at; rows further down that do not fit are rejected one by
one by the reader, never silently repaired.
"""

from __future__ import annotations

import codecs
import csv
import io
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from hasten.core.errors import DataError, UsageError


def _names(words: str) -> frozenset[str]:
    return frozenset(words.split())


# Names that people give to columns, used to recognise a header and (in columns.py) to choose
# columns. All in lower case.
STRONG_TEXT_NAMES = _names(
    """text texts sentence review content comment message tweet document utterance question query
    premise hypothesis headline body 文本 句子 内容 评论 正文 texto texte"""
)
WEAK_TEXT_NAMES = _names(
    """description abstract title summary article post paragraph passage phrase input email mail
    sms transcript statement context answer response subject prompt caption narrative snippet
    docstring 标题 问题 摘要 kommentar
    satz"""
)
STRONG_LABEL_NAMES = _names(
    """label labels class classes target category categories sentiment polarity intent topic
    emotion 标签 类别 分类 情感 klasse kategorie etiqueta clase categoria"""
)
WEAK_LABEL_NAMES = _names(
    """y output tag tags genre genres gold stars star rating score spam toxic department section
    lang language type group stance verdict decision outcome status package"""
)
_OTHER_NAMES = _names(
    "id index idx uid uuid date time timestamp url link author user username name source"
)
KNOWN_NAMES = (
    STRONG_TEXT_NAMES | WEAK_TEXT_NAMES | STRONG_LABEL_NAMES | WEAK_LABEL_NAMES | _OTHER_NAMES
)

# Stands for "none" in a file of plain lines: the csv module must have one.
NO_DELIMITER = "\x1f"
SAMPLE_CHARACTERS = 1 << 20
_MAX_SAMPLE_ROWS = 4000
_DELIMITERS = (",", "\t", ";", "|")
# Delimiters with which quotation marks are often plain text: such files are written by joining
# cells with the delimiter, not by a CSV writer.
_LITERAL_QUOTE_DELIMITERS = ("\t", "|")
FORMATS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".txt": "text",
    ".text": "text",
    ".parquet": "parquet",
}
FORMATS_READ = ".csv, .tsv, .jsonl, .json and .txt, each also with .gz, and .parquet"
# Of a file whose name says nothing, this share of the rows must have the same number of cells.
_TABLE_SHARE = 0.9
_NUMBER = re.compile(r"[+-]?(\d+([.,]\d+)*|\.\d+)([eE][+-]?\d+)?%?")
_CJK = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af]")
_MAGIC = (
    (b"PK\x03\x04", "a ZIP archive or an Excel workbook: unpack it, or save the sheet as CSV"),
    (b"\xd0\xcf\x11\xe0", "an old Excel or Word document: save it as CSV"),
    (b"%PDF-", "a PDF document"),
    (b"PARE", "an encrypted Parquet file: write it again without encryption"),
    (b"ARROW1", "an Arrow file: convert it to Parquet or JSON lines"),
    (b"SQLite format 3", "an SQLite database: export the table as CSV"),
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"BZh", "compressed with bzip2: unpack it first; only .gz is read directly"),
    (b"\xfd7zXZ", "compressed with xz: unpack it first; only .gz is read directly"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd: unpack it first; only .gz is read directly"),
)


@dataclass(frozen=True, slots=True)
class Sample:
    """The beginning of a file as text; ``complete`` when it is all of it."""

    text: str
    complete: bool


class LineReader(Protocol):
    """What ``csv.reader(...)`` returns; the csv module does not export its type."""

    @property
    def line_num(self) -> int:
        """Number of physical lines taken so far."""
        ...

    def __iter__(self) -> Iterator[list[str]]: ...

    def __next__(self) -> list[str]: ...


@dataclass(frozen=True, slots=True)
class Dialect:
    """How the cells of a CSV or TSV file are separated and quoted.

    Attributes:
        delimiter: one character.
        quoting: ``doubled`` (a quote within quotes is written twice), ``backslash`` (it is written
            after a backslash) or ``literal`` (quotation marks are text and protect nothing).
        skip_space: blanks after a delimiter do not belong to the cell, so that a quote may follow.
    """

    delimiter: str
    quoting: str = "doubled"
    skip_space: bool = False

    def read(self, lines: Iterable[str], *, strict: bool = True) -> LineReader:
        """Returns a ``csv.reader`` over lines that still carry their line ends."""
        return csv.reader(
            lines,
            delimiter=self.delimiter,
            quoting=csv.QUOTE_NONE if self.quoting == "literal" else csv.QUOTE_MINIMAL,
            escapechar="\\" if self.quoting == "backslash" else None,
            skipinitialspace=self.skip_space,
            strict=strict,
        )


@dataclass(frozen=True, slots=True)
class _Trial:
    """What a dialect makes of the sample."""

    rows: list[list[str]]
    num_broken: int
    width: int
    share: float

    @property
    def perfect(self) -> bool:
        return self.num_broken == 0 and self.share == 1.0


def detect_encoding(head: bytes, encoding: str | None) -> tuple[str, str | None]:
    """Returns the codec to read with and, unless it is plain UTF-8, the reason.

    Args:
        head: the first bytes of the (decompressed) file.
        encoding: what the person asked for, if anything.

    Raises:
        UsageError: the encoding asked for does not exist.
    """
    if encoding is not None:
        try:
            io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        except LookupError:
            raise UsageError(
                f"'{encoding}' is not a text encoding; usual ones are utf-8, latin-1, cp1252, "
                "utf-16, gb18030 and shift_jis."
            ) from None
        name = codecs.lookup(encoding).name
        # The BOM is no part of the first column's name, whoever chose the encoding.
        return ("utf-8-sig" if name == "utf-8" else name), f"encoding {encoding} (as asked for)"
    if head.startswith(codecs.BOM_UTF8):
        return "utf-8-sig", "encoding utf-8 (byte order mark, removed)"
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32", "encoding utf-32 (byte order mark, removed)"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16", "encoding utf-16 (byte order mark, removed)"
    return "utf-8", None


def refuse_binary(head: bytes, encoding: str, name: str) -> None:
    """Raises DataError when the bytes are not text, saying what they seem to be."""
    for magic, meaning in _MAGIC:
        if head.startswith(magic):
            raise DataError(f"{name}: is {meaning}.")
    if encoding.replace("_", "-").startswith(("utf-16", "utf-32")):
        return
    position = head.find(b"\0")
    if position < 0:
        return
    num_zeros, num_bytes = head.count(b"\0"), len(head)
    if num_bytes / 4 < num_zeros <= num_bytes / 2 + 1:
        order = "utf-16-be" if head[0] == 0 else "utf-16-le"
        raise DataError(
            f"{name}: looks like UTF-16 without a byte order mark; pass --data.encoding {order}."
        )
    raise DataError(
        f"{name}: is not text (a NUL byte at offset {position}); hasten reads {FORMATS_READ}."
    )


def base_suffix(path: Path) -> str:
    """Returns the last suffix before .gz, in lower case."""
    return Path(path.stem if path.suffix.lower() == ".gz" else path.name).suffix.lower()


def detect_format(
    path: Path, head: Sample, *, delimiter: str | None, header: bool | None
) -> tuple[str, list[str]]:
    """Returns the format, one of the values of ``FORMATS``, by name or by content; and notes.

    Args:
        path: the file.
        head: its beginning.
        delimiter: what the person asked for, if anything; it makes a table of a text file.
        header: likewise.
    """
    by_name = FORMATS.get(base_suffix(path))
    is_asked = delimiter is not None or header is not None
    if by_name is not None and not (by_name == "text" and is_asked):
        return by_name, []
    start = head.text.lstrip("\ufeff \t\r\n")
    if by_name is None and re.match(r"\{|\[\s*\{", start):
        return "json", [f"format JSON (the first line starts with '{start[0]}')"]
    first_line = start.split("\n", 1)[0]
    guess = "tsv" if "\t" in first_line and "," not in first_line else "csv"
    if is_asked:
        reason = "a delimiter" if delimiter is not None else "whether there is a header"
        return guess, [f"format {guess.upper()} ({reason} was given)"]
    if _is_table(head):
        return guess, [f"format {guess.upper()} (by the content)"]
    return "text", ["format plain text (by the content: no delimiter divides the lines alike)"]


def _is_table(head: Sample) -> bool:
    """Says whether a delimiter divides nearly all lines into the same number of cells."""
    if not head.complete:  # the last line is cut off
        head = Sample(head.text[: head.text.rfind("\n") + 1], complete=False)
    trials = [_best_quoting(head, delimiter)[1] for delimiter in _DELIMITERS]
    return any(
        trial.width > 1 and trial.share >= _TABLE_SHARE and len(trial.rows) > 1 for trial in trials
    )


def detect_dialect(
    sample: Sample, delimiter: str | None, preferred: str
) -> tuple[Dialect, list[list[str]], list[str]]:
    """Finds delimiter and quoting.

    Args:
        sample: the beginning of the file.
        delimiter: what the person asked for, if anything.
        preferred: the delimiter that the file's name suggests; it wins ties.

    Returns:
        The dialect, the sample's rows without the blank ones, and notes for the person.
    """
    if delimiter is not None:
        best, trial = delimiter, _try(sample, Dialect(delimiter))
    else:
        candidates = [preferred, *(d for d in _DELIMITERS if d != preferred)]
        trials = {d: _best_quoting(sample, d)[1] for d in candidates}
        # max() keeps the first of equals, hence the preferred delimiter.
        best = max(candidates, key=lambda d: _rank(trials[d]))
        trial = trials[best]
    dialect, trial = _best_quoting(sample, best)
    if delimiter is None and _is_plain_lines(sample, trial):
        lines = Dialect(NO_DELIMITER, "literal")
        return lines, _try(sample, lines).rows, ["one column: each line is one cell"]
    notes = [_delimiter_note(dialect, trial, asked=delimiter is not None)]
    if dialect.quoting == "backslash":
        notes.append("quotes within cells follow a backslash (doubled quotes do not fit the rows)")
    elif dialect.quoting == "literal":
        notes.append("quotation marks are text (as quotes around cells they do not fit the rows)")
    if dialect.skip_space:
        notes.append("blanks after a delimiter are dropped (quotes follow them)")
    return dialect, trial.rows, notes


def split_lines(text: str) -> io.StringIO:
    """Returns an iterator over physical lines, split as a file opened with ``newline=''`` is."""
    return io.StringIO(text, newline="")


def num_words(text: str) -> int:
    """Counts words: runs without white space; in Chinese, Japanese and Korean, character pairs."""
    count = len(text.split())
    return count if text.isascii() else count + len(_CJK.findall(text)) // 2


def is_number(cell: str) -> bool:
    """Says whether the cell is a number, whole or decimal."""
    return _NUMBER.fullmatch(cell.strip()) is not None


def clean_name(cell: str) -> str:
    """Returns a header's cell without surrounding and repeated white space."""
    return " ".join(cell.replace("\ufeff", "").split())


def name_words(name: str) -> list[str]:
    """Splits a column's name into lower-case words: ``reviewText_2`` -> review, text, 2."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[^\W\d_])(?=\d)", " ", name)
    return re.findall(r"[^\W_]+", spaced.lower())


def name_columns(header: Sequence[str]) -> tuple[tuple[str, ...], list[str]]:
    """Strips a header's names, replaces empty ones and tells equal ones apart; with notes."""
    cleaned = [clean_name(cell) for cell in header]
    counts = Counter(cleaned)
    names: list[str] = []
    notes: list[str] = []
    for number, original in enumerate(cleaned, start=1):
        name = original
        if not original:
            name = f"column {number}"
        elif counts[original] > 1:
            name = f"{original} (column {number})"
        while name in names:
            name += "'"
        names.append(name)
    for original, count in counts.items():
        if original and count > 1:
            alike = [n for n, c in zip(names, cleaned, strict=True) if c == original]
            notes.append(f"{count} columns are named '{original}': called '{alike[0]}' and so on")
    return tuple(names), notes


def detect_header(rows: Sequence[Sequence[str]]) -> tuple[bool, str]:
    """Says whether the first of the rows names the columns, and why."""
    first, rest = [clean_name(cell) for cell in rows[0]], rows[1:]
    if not rest:
        return True, "it is the only row"
    below = [
        [value for row in rest if i < len(row) and (value := row[i].strip())]
        for i in range(len(first))
    ]
    known = [(i, cell) for i, cell in enumerate(first) if " ".join(name_words(cell)) in KNOWN_NAMES]
    if len({cell for _, cell in known}) >= 2:
        return True, f"names such as '{known[0][1]}' and '{known[1][1]}'"
    for i, cell in known:
        if cell not in below[i] and all(_is_namelike(other) for other in first if other):
            return True, f"'{cell}' is a usual name"
    # pandas writes such a header for a table without names.
    counting = len(first) > 1 and first == [str(i) for i in range(len(first))]
    if counting and any(values and not any(map(is_number, values)) for values in below):
        return True, "the first row counts the columns from 0"
    return _header_by_values(first, below)


def _header_by_values(first: Sequence[str], below: Sequence[list[str]]) -> tuple[bool, str]:
    """Decides by how the first row differs from the values below it."""
    columns = list(zip(first, below, strict=True))
    for cell, values in columns:
        if cell and cell in values:
            return False, f"'{_shorten(cell)}' of the first row occurs again below"
    for cell, _ in columns:
        if is_number(cell):
            return False, f"the first row holds the number {cell}"
    for cell, values in columns:
        if values and cell and sum(map(is_number, values)) >= 0.9 * len(values):
            return True, f"'{_shorten(cell)}' stands over numbers"
    few = [(c, len(set(v)), len(v)) for c, v in columns if c and len(v) >= 6]
    for cell, num_distinct, num_values in few:
        if num_values >= 30 and num_distinct <= num_values / 10:
            return True, f"'{_shorten(cell)}' stands over {num_distinct} values and is none of them"
    wordy = [c for c, v in columns if v and statistics.median(map(num_words, v)) >= 4]
    if any(num_words(cell) > 3 for cell in wordy):
        return False, "the first row reads like the rows below"
    for cell, num_distinct, num_values in few:
        if num_distinct <= num_values / 3:
            return True, f"'{_shorten(cell)}' stands over {num_distinct} values and is none of them"
    if any(cell and num_words(cell) <= 2 and _is_namelike(cell) for cell in wordy):
        return True, "the first row is much shorter than the text below"
    filled = [cell for cell in first if cell]
    distinct = len(set(filled)) == len(filled) > 0
    if len(first) > 1 and distinct and all(map(_is_namelike, filled)):
        return True, "the first row looks like names"
    return False, "nothing in the first row looks like names"


def _is_known(cell: str) -> bool:
    """Knows ``text``, ``Sentence 1``, ``review_text`` and ``reviewText``."""
    words = [word for word in name_words(cell) if not word.isdigit()]
    if len(words) > 1 and " " not in cell:
        return any(word in KNOWN_NAMES for word in words)
    return len(words) == 1 and words[0] in KNOWN_NAMES


def _is_namelike(cell: str) -> bool:
    short = 0 < len(cell) <= 40 and num_words(cell) <= 4
    return short and not is_number(cell) and cell[-1] not in ".!?,;。！？" and "://" not in cell


def _shorten(cell: str) -> str:
    return cell if len(cell) <= 30 else cell[:29] + "…"


def _try(sample: Sample, dialect: Dialect) -> _Trial:
    """Reads the sample with a dialect and counts how well the rows agree."""
    rows: list[list[str]] = []
    num_broken = 0
    reader = dialect.read(split_lines(sample.text))
    while len(rows) < _MAX_SAMPLE_ROWS:
        try:
            cells = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            # A sample that ends within a quoted cell is no fault of the dialect.
            num_broken += sample.complete or "end of data" not in str(error)
            continue
        if len(cells) > 1 or (cells and cells[0].strip()):
            rows.append(cells)
    if not rows:
        return _Trial(rows, num_broken, 0, 0.0)
    width, count = Counter(map(len, rows)).most_common(1)[0]
    return _Trial(rows, num_broken, width, count / (len(rows) + num_broken))


def _best_quoting(sample: Sample, delimiter: str) -> tuple[Dialect, _Trial]:
    """Returns the usual quoting unless it does not fit and another fits every row."""
    usual = Dialect(delimiter)
    trial = _try(sample, usual)
    if trial.perfect or '"' not in sample.text:
        return usual, trial
    others: list[Dialect] = []
    if f'{delimiter} "' in sample.text:
        others.append(Dialect(delimiter, skip_space=True))
    if '\\"' in sample.text:
        others.append(Dialect(delimiter, "backslash"))
    if delimiter in _LITERAL_QUOTE_DELIMITERS:
        others.append(Dialect(delimiter, "literal"))
    for other in others:
        other_trial = _try(sample, other)
        if other_trial.perfect and other_trial.width > 1:
            return other, other_trial
    return usual, trial


def _is_plain_lines(sample: Sample, trial: _Trial) -> bool:
    """Recognises lines of text that hold delimiters by chance and were never meant as CSV."""
    if trial.width != 1 or trial.perfect or len(trial.rows[0]) != 1:
        return False
    return not any(line.lstrip().startswith('"') for line in split_lines(sample.text))


def _rank(trial: _Trial) -> tuple[float, bool]:
    """Orders dialects: rows of one width above one cell, the first row among them."""
    if trial.width < 2:
        return (0.0, False)
    return (round(trial.share, 2), len(trial.rows[0]) == trial.width)


def _delimiter_note(dialect: Dialect, trial: _Trial, *, asked: bool) -> str:
    shown = "tab" if dialect.delimiter == "\t" else f"'{dialect.delimiter}'"
    num_rows = len(trial.rows)
    if asked:
        return f"delimiter {shown} (as asked for)"
    if trial.width < 2:
        return f"delimiter {shown} (one column: no delimiter divides the rows)"
    if trial.share == 1.0:
        return (
            f"delimiter {shown} (the same {trial.width} columns in the first {num_rows:,} rows)"
            if num_rows > 1
            else f"delimiter {shown} ({trial.width} columns)"
        )
    fitting = round(trial.share * (num_rows + trial.num_broken))
    return (
        f"delimiter {shown} ({trial.width} columns in {fitting:,} of the first "
        f"{num_rows + trial.num_broken:,} rows)"
    )
