"""Which column holds the text and which the label, and why.

    sample of rows -> profile of each column -> choose_columns -> ColumnChoice with reasons
    row -> texts_of, label_of -> strings, or CellError with the reason to reject the row
    counts of a whole file's labels -> check_label_values -> DataError where they cannot be learned

A guess goes by the columns' names first and their contents second. What belongs to another task
(decimal numbers, several labels in a cell) is refused by name, never turned into classes.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from hasten.core.errors import DataError, UsageError, nearest
from hasten.data.dialect import (
    STRONG_LABEL_NAMES,
    STRONG_TEXT_NAMES,
    WEAK_LABEL_NAMES,
    WEAK_TEXT_NAMES,
    name_words,
    num_words,
)
from hasten.data.rows import Cell, Row

MAX_CLASSES = 10_000
_MAX_LABEL_CHARACTERS = 50
_WHOLE = re.compile(r"[+-]?\d+")
_DECIMAL = re.compile(r"[+-]?(\d+\.\d*|\.\d+|\d+(\.\d*)?[eE][+-]?\d+)")
_DATE = re.compile(r"\d{1,4}[-/.]\d{1,2}[-/.]\d{1,4}([T ].*)?|\w{3} \w{3} \d{1,2} \d\d:.*")
_URL = re.compile(r"(https?://|www\.)\S+|\S+@\S+\.\w+")
# A list written into a cell, as pandas does: ['a', 'b'].
_LIST = re.compile(r"\[\s*(['\"].*['\"]|\d+(\s*,\s*\d+)*)\s*\]")
_SEPARATORS = (";", "|", ",")
# Two columns that are read together, by their names in lower case without white space or marks.
_PAIRS = (
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("question", "passage"),
    ("question", "context"),
    ("question", "answer"),
    ("query", "document"),
    ("query", "passage"),
    ("subject", "body"),
    ("subject", "message"),
    *itertools.product(
        ("title", "headline"),
        ("text", "body", "content", "description", "abstract", "review", "article", "summary"),
    ),
)


class CellError(DataError):
    """A cell that cannot be used; its text is the reason for rejecting the row."""


@dataclass(frozen=True, slots=True)
class ColumnChoice:
    """The chosen columns.

    Attributes:
        text: one or more names, in the order in which the texts are read.
        label: the label column's name.
        reasons: one line a column, to be printed.
    """

    text: tuple[str, ...]
    label: str
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Profile:
    """What a column looks like in the sample."""

    name: str
    kind: str
    num_filled: int
    num_distinct: int
    mean_characters: float
    mean_words: float

    @property
    def words(self) -> list[str]:
        return [word for word in name_words(self.name) if not word.isdigit()]

    @property
    def may_be_text(self) -> bool:
        return self.kind == "text"

    @property
    def may_be_label(self) -> bool:
        """Short values that recur. Of two rows nothing can be expected."""
        return (
            self.kind in ("text", "whole numbers", "truth values")
            and self.mean_characters <= _MAX_LABEL_CHARACTERS
            and (
                self.num_distinct <= self.num_filled / 2
                or (self.num_filled <= 10 and self.num_distinct < self.num_filled)
                or self.num_filled <= 2
            )
        )

    @property
    def few_valued(self) -> bool:
        return self.num_distinct <= 20 and self.num_filled >= 5 * self.num_distinct

    def describe(self) -> str:
        """Says what the column looks like, for the message that nothing fits."""
        if self.kind == "empty":
            return f"'{self.name}' (empty)"
        what = "text" if self.kind == "text" else self.kind
        if self.may_be_text:
            what += f" of {self.mean_characters:.0f} characters on average"
        if self.num_distinct == self.num_filled > 1:
            return f"'{self.name}' ({what}, all different)"
        values = "value" if self.num_distinct == 1 else "values"
        return f"'{self.name}' ({what}, {self.num_distinct:,} {values})"


def text_of(cell: Cell) -> str:
    """Returns a cell's text without surrounding white space.

    Raises:
        CellError: the cell is empty, or holds a JSON list or object.
    """
    if isinstance(cell, str):
        text = cell.strip()
        if text:
            return text
        raise CellError("the text is empty")
    if cell is None:
        raise CellError("the text is empty")
    if isinstance(cell, list | dict):
        raise CellError(f"the text is a JSON {'list' if isinstance(cell, list) else 'object'}")
    return _scalar(cell)


def texts_of(cells: Sequence[Cell], positions: Sequence[int]) -> tuple[str, ...]:
    """Returns the texts of several columns; one may be empty as long as another is not.

    Raises:
        CellError: all are empty, or one holds a JSON list or object.
    """
    if len(positions) == 1:
        return (text_of(cells[positions[0]]),)
    texts = tuple(
        ""
        if (cell := cells[p]) is None or (isinstance(cell, str) and not cell.strip())
        else text_of(cell)
        for p in positions
    )
    if not any(texts):
        raise CellError("the text is empty")
    return texts


def label_of(cell: Cell) -> str:
    """Returns a cell's label: a word, a whole number or a truth value, as a string.

    A string is taken as it is, even one like ``0.5``: whether a column of strings holds decimal
    numbers only the whole column tells (``check_label_values``).

    Raises:
        CellError: the cell is empty, a decimal JSON number, a list or an object.
    """
    if isinstance(cell, str):
        label = cell.strip()
        if label:
            return label
        raise CellError("the label is empty")
    if cell is None:
        raise CellError("the label is empty")
    if isinstance(cell, float):
        raise CellError(f"the label is a decimal number ({cell}; regression is another task)")
    if isinstance(cell, list):
        raise CellError("the label is a list (multi-label is another task)")
    if isinstance(cell, dict):
        raise CellError("the label is a JSON object")
    return _scalar(cell)


def resolve_columns(columns: Sequence[str], wanted: Sequence[str]) -> tuple[int, ...]:
    """Returns the positions of columns given by name or by number, counted from 1.

    A name wins over a number.

    Raises:
        UsageError: a column that is not there, or the same one twice.
    """
    names = [column.strip() for column in columns]
    positions: list[int] = []
    for given in wanted:
        name = given.strip()
        if name in names:
            positions.append(names.index(name))
        elif name.isdecimal() and 1 <= int(name) <= len(names):
            positions.append(int(name) - 1)
        else:
            listed = ", ".join(f"'{n}'" for n in names[:20]) + (" ..." if len(names) > 20 else "")
            raise UsageError(
                f"there is no column '{name}'.{nearest(name, names)} The columns are: {listed}."
            )
    if len(set(positions)) < len(positions):
        raise UsageError(f"a column is given twice: {', '.join(wanted)}.")
    return tuple(positions)


def choose_columns(
    sample: Sequence[Row],
    columns: Sequence[str],
    *,
    text: Sequence[str] | None = None,
    label: str | None = None,
    file: str | None = None,
) -> ColumnChoice:
    """Chooses the text and label columns of a file for classification.

    Args:
        sample: some rows, best the first thousand or so.
        columns: the names of the rows' cells.
        text: the text columns that the person named, by name or number.
        label: the label column that the person named.
        file: how messages call the file.

    Raises:
        UsageError: a named column is not there, or is both text and label.
        DataError: no column fits, or the label column belongs to another task.
    """
    profiles = [_profile(name, [row.cells[i] for row in sample]) for i, name in enumerate(columns)]
    wanted = resolve_columns(columns, text) if text else None
    if label is not None:
        label_at = resolve_columns(columns, [label])[0]
        if wanted and label_at in wanted:
            raise UsageError(f"the column '{columns[label_at]}' cannot be both text and label.")
        label_reason = f"label column '{columns[label_at]}': as asked for"
    else:
        taken = wanted if wanted else _obvious_text(profiles)
        label_at, label_reason = _guess_label(profiles, taken, file)
    if wanted is not None:
        text_at, text_reasons = (
            wanted,
            [f"text column '{columns[i]}': as asked for" for i in wanted],
        )
    else:
        text_at, text_reasons = _guess_text(profiles, label_at, file)
    _check_label_sample(sample, label_at, columns[label_at], file)
    return ColumnChoice(
        tuple(columns[i] for i in text_at), columns[label_at], (*text_reasons, label_reason)
    )


def choose_text_columns(
    sample: Sequence[Row],
    columns: Sequence[str],
    *,
    text: Sequence[str] | None = None,
    file: str | None = None,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Chooses only the text columns, of a file that may have no labels.

    Returns:
        The names and the reasons.

    Raises:
        UsageError: a named column is not there.
        DataError: no column holds text.
    """
    if text:
        names = tuple(columns[i] for i in resolve_columns(columns, text))
        return names, tuple(f"text column '{name}': as asked for" for name in names)
    profiles = [_profile(name, [row.cells[i] for row in sample]) for i, name in enumerate(columns)]
    positions, reasons = _guess_text(profiles, None, file)
    return tuple(columns[i] for i in positions), tuple(reasons)


def is_label_name(name: str) -> bool:
    """Returns whether a column of this name is a label, whatever it holds."""
    words = [word for word in name_words(name) if not word.isdigit()]
    return "".join(words) in STRONG_LABEL_NAMES | WEAK_LABEL_NAMES


def free_text_columns(sample: Sequence[Row], columns: Sequence[str]) -> tuple[str, ...]:
    """Returns the names of the columns that hold text of many values, in their order."""
    profiles = (_profile(name, [row.cells[i] for row in sample]) for i, name in enumerate(columns))
    return tuple(p.name for p in profiles if p.may_be_text and not p.few_valued)


def check_label_values(
    counts: Mapping[str, int], column: str, num_rows: int, *, file: str | None = None
) -> None:
    """Checks the labels of a whole file, once they are counted.

    Args:
        counts: how often each label occurs.
        column: the label column's name.
        num_rows: number of rows that the counts cover.
        file: how messages call the file.

    Raises:
        DataError: fewer than two classes, a class for nearly each row, too many classes, decimal
            numbers, or several labels in a cell.
    """
    where = _where(file)
    if len(counts) < 2:
        only = f"every row has the label '{next(iter(counts))}'" if counts else "there is no label"
        raise DataError(
            f"{where}{only} in column '{column}'; classification needs at least two classes."
        )
    _refuse_decimals(counts, column, where, "")
    if num_rows > 2 and len(counts) == num_rows:
        _refuse_unique(column, num_rows, where)
    if len(counts) > num_rows / 2 and num_rows >= 20:
        raise DataError(
            f"{where}the label column '{column}' has {len(counts):,} different values in "
            f"{num_rows:,} rows: too few examples of each; name another with --label-column."
        )
    if len(counts) > MAX_CLASSES:
        raise DataError(
            f"{where}the label column '{column}' has {len(counts):,} different values; at most "
            f"{MAX_CLASSES:,} classes can be learned. Name another with --label-column."
        )
    found = _several_labels(counts)
    if found:
        _refuse_several(column, found, where, "")


def _scalar(cell: Cell) -> str:
    """Writes JSON's numbers and truth values as JSON does."""
    return str(cell).lower() if isinstance(cell, bool) else str(cell)


def _where(file: str | None) -> str:
    return f"{file}: " if file else ""


def _profile(name: str, cells: Sequence[Cell]) -> _Profile:
    filled = [c for c in cells if c is not None and not (isinstance(c, str) and not c.strip())]
    values = [c.strip() if isinstance(c, str) else _scalar(c) for c in filled]
    num_filled = max(len(values), 1)
    return _Profile(
        name,
        _kind(filled, values),
        len(values),
        len(set(values)),
        sum(map(len, values)) / num_filled,
        sum(map(num_words, values)) / num_filled,
    )


def _kind(cells: Sequence[Cell], values: Sequence[str]) -> str:
    """Names what nearly all of the cells are."""
    if not cells:
        return "empty"

    def most(matches: Iterable[object]) -> bool:
        return sum(map(bool, matches)) >= 0.9 * len(cells)

    if most(isinstance(cell, list | dict) for cell in cells):
        return "lists or objects"
    if most(isinstance(cell, bool) for cell in cells):
        return "truth values"
    if most(map(_WHOLE.fullmatch, values)):
        return "whole numbers"
    if most(_WHOLE.fullmatch(value) or _DECIMAL.fullmatch(value) for value in values):
        return "decimal numbers"
    if most(map(_URL.fullmatch, values)):
        return "addresses"
    if most(map(_DATE.fullmatch, values)):
        return "dates"
    # Words have digits now and then, identifiers nearly always, and they hardly recur. Scripts
    # that put no space between words write whole sentences without one.
    marked = [
        value.isascii() and any(map(str.isdigit, value)) and not re.search(r"\s", value)
        for value in values
    ]
    if most(marked) and len(set(values)) > 0.8 * len(values) > 2:
        return "identifiers"
    return "text"


def _name_rank(profile: _Profile, strong: frozenset[str], weak: frozenset[str]) -> int:
    """Ranks how a name fits: 4 is one of the usual ones, 3 nearly, 2 and 1 hold one, 0 is none."""
    words = profile.words
    if "".join(words) in strong:
        return 4
    if "".join(words) in weak:
        return 3
    # In compound names the last word says what the thing is: `airline_sentiment`, `review_id`.
    if words and words[-1] in strong:
        return 2
    return 1 if any(w in strong for w in words) or (words and words[-1] in weak) else 0


def _text_rank(profile: _Profile) -> int:
    return _name_rank(profile, STRONG_TEXT_NAMES, WEAK_TEXT_NAMES)


def _label_rank(profile: _Profile) -> int:
    return _name_rank(profile, STRONG_LABEL_NAMES, WEAK_LABEL_NAMES)


def _obvious_text(profiles: Sequence[_Profile]) -> tuple[int, ...]:
    """Returns the column that is text by name and content and therefore cannot be the label."""
    found = [i for i, p in enumerate(profiles) if _text_rank(p) == 4 and p.may_be_text]
    longest = sorted(found, key=lambda i: -profiles[i].mean_characters)[:1]
    return tuple(longest)


def _guess_label(
    profiles: Sequence[_Profile], taken: Sequence[int], file: str | None
) -> tuple[int, str]:
    """Returns the label column's position and the reason."""
    free = [i for i in range(len(profiles)) if i not in taken]
    fitting = [i for i in free if profiles[i].may_be_label]
    # A column that is called the label is taken even if it does not fit: the check that follows
    # then says what is wrong with it, instead of another column being taken in silence.
    called = [i for i in free if _label_rank(profiles[i]) == 4 and profiles[i].num_filled]
    candidates = sorted(fitting, key=lambda i: _label_order(profiles[i], i))
    if called and not (candidates and _label_rank(profiles[candidates[0]]) == 4):
        candidates = called
    # Likewise a column of another task, if nothing else can be meant.
    other_tasks = [i for i in free if profiles[i].kind in ("decimal numbers", "lists or objects")]
    candidates = candidates or [i for i in other_tasks if _label_rank(profiles[i])]
    candidates = candidates or (other_tasks if len(free) == 1 else [])
    if not candidates:
        _refuse_choice(profiles, "label", file)
    best = candidates[0]
    profile, rank = profiles[best], _label_rank(profiles[best])
    values = "1 value" if profile.num_distinct == 1 else f"{profile.num_distinct:,} values"
    reason = f"{'named so' if rank else 'short values that recur'}, {values}"
    reason += f" in the first {profile.num_filled:,} rows"
    others = [profiles[i].name for i in candidates[1:] if _label_rank(profiles[i]) >= min(rank, 2)]
    if others:
        reason += f"; it could also be {', '.join(repr(name) for name in others[:3])}"
    return best, f"label column '{profile.name}': {reason}"


def _label_order(profile: _Profile, position: int) -> tuple[bool, int, int, int]:
    """Orders label candidates: by name, then few values, then the last column.

    A constant column comes last unless it is called the label: then the file is sorted by class.
    """
    rank = _label_rank(profile)
    return (profile.num_distinct < 2 and rank < 4, -rank, profile.num_distinct, -position)


def _guess_text(
    profiles: Sequence[_Profile], label_at: int | None, file: str | None
) -> tuple[tuple[int, ...], list[str]]:
    """Returns the text columns' positions and the reasons."""
    fitting = [i for i, p in enumerate(profiles) if i != label_at and p.may_be_text]
    fitting = [
        i
        for i in fitting
        if _text_rank(profiles[i]) or not (profiles[i].few_valued and profiles[i].mean_words < 3)
    ]
    if not fitting:
        _refuse_choice(profiles, "text", file)
    # Among equally named columns the longest; a name beats any length.
    best = max(fitting, key=lambda i: (_text_rank(profiles[i]), profiles[i].mean_characters))
    pair = _pair_of(profiles, fitting, best)
    if pair is not None:
        names = " and ".join(f"'{profiles[i].name}'" for i in pair)
        return pair, [f"text columns {names}: their names belong together"]
    profile = profiles[best]
    why = "named so" if _text_rank(profile) else "the longest text"
    return (best,), [
        f"text column '{profile.name}': {why}, {profile.mean_characters:.0f} characters on average"
    ]


def _pair_of(
    profiles: Sequence[_Profile], fitting: Sequence[int], best: int
) -> tuple[int, int] | None:
    """Returns the two columns that belong together and of which one is the best text column."""
    by_name = {"".join(name_words(profiles[i].name)): i for i in fitting}
    name = "".join(name_words(profiles[best].name))
    pairs = list(_PAIRS)
    for first, second in (("1", "2"), ("a", "b")):
        if name.endswith((first, second)) and len(name) > 1:
            pairs.insert(0, (name[:-1] + first, name[:-1] + second))
    for first, second in pairs:
        if name in (first, second) and first in by_name and second in by_name:
            return by_name[first], by_name[second]
    return None


def _refuse_choice(profiles: Sequence[_Profile], wanted: str, file: str | None) -> NoReturn:
    looks = ", ".join(profile.describe() for profile in profiles[:12])
    more = f" and {len(profiles) - 12} more" if len(profiles) > 12 else ""
    raise DataError(
        f"{_where(file)}no column looks like the {wanted}: {looks}{more}. Name it with "
        f"--{wanted}-column (a name or a number)."
    )


def _check_label_sample(sample: Sequence[Row], at: int, column: str, file: str | None) -> None:
    """Raises DataError when the sample shows that the label column belongs to another task."""
    where = _where(file)
    lines: dict[str, int] = {}
    num_filled = num_rows = 0
    for row in sample:
        cell = row.cells[at]
        if isinstance(cell, list) or (isinstance(cell, str) and _LIST.fullmatch(cell.strip())):
            _refuse_several(column, str(cell), where, f", line {row.line}")
        num_rows += 1
        if cell is None or isinstance(cell, dict) or not (value := _scalar(cell).strip()):
            continue
        num_filled += 1
        lines.setdefault(value, row.line)
    if num_rows and not num_filled:
        raise DataError(
            f"{where}the label column '{column}' holds no label; name another with --label-column."
        )
    decimal = next((value for value in lines if _DECIMAL.fullmatch(value)), "")
    _refuse_decimals(lines, column, where, f", line {lines.get(decimal)}")
    if num_filled > 2 and len(lines) == num_filled:
        _refuse_unique(column, num_filled, where)
    found = _several_labels(lines)
    if found:
        _refuse_several(column, found, where, f", line {lines[found]}")


def _refuse_decimals(values: Iterable[str], column: str, where: str, line: str) -> None:
    """Raises DataError when all values are numbers and one of them has decimals."""
    decimals = [value for value in values if _DECIMAL.fullmatch(value)]
    if decimals and all(_WHOLE.fullmatch(v) or _DECIMAL.fullmatch(v) for v in values):
        raise DataError(
            f"{where}the label column '{column}' holds decimal numbers ({decimals[0]}{line}): "
            "regression is another task. If they are classes, write them as words or whole numbers."
        )


def _refuse_unique(column: str, num_rows: int, where: str) -> NoReturn:
    raise DataError(
        f"{where}the label column '{column}' has a different value in each of {num_rows:,} rows, "
        "so nothing can be learned from it; name another with --label-column."
    )


def _refuse_several(column: str, value: str, where: str, line: str) -> NoReturn:
    shown = value if len(value) <= 60 else value[:59] + "…"
    raise DataError(
        f"{where}the label column '{column}' holds several labels in a cell ({shown}{line}): "
        "multi-label is another task. Keep one label a row, or name another with --label-column."
    )


def _several_labels(values: Iterable[str]) -> str | None:
    """Returns a value that is made of other labels, when the whole column seems to be so."""
    values = set(values)
    for separator in _SEPARATORS:
        combined = sorted(value for value in values if separator in value)
        pieces: Counter[str] = Counter()
        for value in combined:
            pieces.update({piece.strip() for piece in value.split(separator) if piece.strip()})
        if len(pieces) < 2:
            continue
        alone = sum(piece in values for piece in pieces)
        recurring = sum(count > 1 for count in pieces.values())
        # Names such as "Korea, South" share pieces by chance; real lists are made of labels that
        # mostly stand alone elsewhere, or of a few that are combined again and again.
        combined_again = separator != "," and len(combined) >= 3 and recurring >= 0.8 * len(pieces)
        if alone >= 0.5 * len(pieces) or combined_again:
            return combined[0]
    return None
