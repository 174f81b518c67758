"""Which columns hold contexts, questions and answers, and how a row of them is read.

    RowFile, sample --choose--> columns (context, question, answers[, answer_start]), reasons
    their cells --read_question--> context, question, answers as JSON; or CellError

Answers come as text, as a list of texts or of ``{"text", "answer_start"}``, or as one such dict
of lists. Places are code points in the context, which is kept as it stands, white space and all.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from hasten.core.errors import DataError, UsageError
from hasten.data.columns import CellError, resolve_columns, text_of
from hasten.data.rows import Cell, Row, RowFile
from hasten.data.spans import Answer, answers_to_json, find_answer
from hasten.task.contract import Certainty, Recognised, WantedColumns

_NAMES = {
    "context": ("context", "passage", "paragraph", "document", "上下文", "文章", "段落"),
    "question": ("question", "query", "问题"),
    "answer": ("answers", "answer", "answertext", "答案"),
}
_START = "answerstart"
_LOOKED_AT = 100


def recognise_questions(file: RowFile, sample: Sequence[Row]) -> Recognised | None:
    """Takes SQuAD files, and files with columns so named whose answers are in their contexts."""
    if file.format == "squad":
        return Recognised(Certainty.FORMAT, "questions in the layout of SQuAD")
    named = {role: _column_named(file.columns, names) for role, names in _NAMES.items()}
    columns = [name for name in named.values() if name is not None]
    if len(columns) < len(_NAMES):
        return None
    positions = resolve_columns(file.columns, columns)
    num_answered = num_found = 0
    for row in sample[:_LOOKED_AT]:
        cells = [row.cells[i] for i in positions]
        num_answered += bool(cells[2])
        try:
            num_found += read_question(cells)[2] != answers_to_json([])
        except CellError:
            continue
    # In yes-no questions, for one, answers are not found.
    if not num_answered or num_found < num_answered / 2:
        return None
    listed = ", ".join(f"'{name}'" for name in columns)
    return Recognised(Certainty.FORMAT, f"columns {listed}, and answers that are in their contexts")


def choose_question_columns(
    file: RowFile, sample: Sequence[Row], wanted: WantedColumns
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Chooses the columns, those that nobody named by their names.

    Returns:
        Context, question, answers and, where there is one, where they start; and the reasons, one
        line a column.

    Raises:
        UsageError: a named column is not there or has no place in this task.
        DataError: a column that nobody named is not found.
    """
    if wanted.source or wanted.target:
        raise UsageError("question-answering has no --source and --target columns.")
    if wanted.text is not None and len(wanted.text) != 2:
        raise UsageError(
            "question-answering has two text columns: --text-column CONTEXT --text-column QUESTION."
        )
    asked = (*(wanted.text or (None, None)), wanted.label)
    columns, reasons = [], []
    for (role, names), given in zip(_NAMES.items(), asked, strict=True):
        found = _column_named(file.columns, names) if given is None else given
        if found is None:
            raise DataError(
                f"{file.display_name}: no column has the usual name of a {role}; name them with "
                "--text-column CONTEXT --text-column QUESTION --label-column ANSWER. The columns "
                f"are: {', '.join(file.columns[:20])}."
            )
        column = file.columns[resolve_columns(file.columns, [found])[0]]
        columns.append(column)
        why = "by its name" if given is None else "as asked for"
        reasons.append(f"{role} column '{column}': {why}")
    start = _column_named(file.columns, (_START,))
    if start is not None:
        columns.append(start)
        reasons.append(f"column '{start}': where answers start, by its name")
    positions = resolve_columns(file.columns, columns)
    several, placed = _count_ambiguous([[row.cells[i] for i in positions] for row in sample])
    if several:
        reasons.append(
            f"{several:,} of the first {placed:,} answers are in their context more than once; "
            "the first place is taken"
        )
    return tuple(columns), tuple(reasons)


def read_question(cells: Sequence[Cell]) -> tuple[str, str, str]:
    """Reads one row.

    Args:
        cells: context, question, answers and, where there is such a column, where they start.

    Returns:
        Context as it stands, question without surrounding white space, and the answers as
        ``answers_to_json`` writes them; blank ones are none.

    Raises:
        CellError: context or question is empty, the answers cannot be read, or not one of them is
            in the context. An answer beside others that are is kept as a text without a place:
            it counts where answers are compared.
    """
    context, question = _text(cells[0], "context"), _text(cells[1], "question").strip()
    answers, faults = [], []
    for text, start in _stated_answers(cells[2], cells[3] if len(cells) > 3 else None):
        try:
            found = find_answer(context, text, start)
            answers.append(Answer(text.strip(), found.start, found.end))
        except CellError as fault:
            answers.append(Answer(text.strip()))
            faults.append(fault)
    if answers and len(faults) == len(answers):
        raise faults[0]
    return context, question, answers_to_json(answers)


def _text(cell: Cell, what: str) -> str:
    try:
        text = text_of(cell)
    except CellError as error:
        raise CellError(str(error).replace("the text", f"the {what}")) from None
    return cell if isinstance(cell, str) else text


def _stated_answers(cell: Cell, start: Cell) -> Iterator[tuple[str, int | None]]:
    """Yields the text of each answer that is not blank, and where it is said to start."""
    for text, place in _entries(cell, start):
        if not isinstance(text, str):
            raise CellError("the answer is not a text")
        if text.strip():
            yield text, _whole_number(place)


def _entries(cell: Any, start: Any) -> Iterator[tuple[Any, Any]]:
    if cell is None:
        return
    if isinstance(cell, list):
        for entry in cell:
            yield from _entries(entry, None)
    elif isinstance(cell, dict):
        texts, starts = cell.get("text"), cell.get("answer_start")
        if isinstance(texts, list):
            if not isinstance(starts, list):
                starts = [None] * len(texts)
            if len(starts) != len(texts):
                raise CellError("the answers' texts and starts are not of the same number")
            yield from zip(texts, starts, strict=True)
        else:
            yield texts, starts
    else:
        yield (cell if isinstance(cell, str) else text_of(cell)), start


def _whole_number(place: Any) -> int | None:
    """Returns where an answer is said to start; None where that is not said (-1 says so too)."""
    if place is None or (isinstance(place, str) and not place.strip()):
        return None
    try:
        number = float(place)
    except (TypeError, ValueError):
        number = 0.5
    if not number.is_integer() or isinstance(place, bool):
        raise CellError(f"where the answer starts is not a whole number ({place})")
    return int(number) if number >= 0 else None


def _count_ambiguous(rows: Sequence[Sequence[Cell]]) -> tuple[int, int]:
    """Returns how many answers could stand in several places, and how many were looked at."""
    several = placed = 0
    for cells in rows:
        try:
            context = _text(cells[0], "context")
            stated = list(_stated_answers(cells[2], cells[3] if len(cells) > 3 else None))
            found = [(find_answer(context, text, start), start) for text, start in stated]
        except CellError:
            continue
        placed += len(found)
        several += sum(start is None and span.occurrences > 1 for span, start in found)
    return several, placed


def _column_named(columns: Sequence[str], names: Sequence[str]) -> str | None:
    """Returns the first column, in the order of ``names``, that has one of them."""
    plain = {re.sub(r"[\s_-]+", "", column.lower()): column for column in columns}
    return next((plain[name] for name in names if name in plain), None)
