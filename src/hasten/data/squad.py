"""Reads questions with their passages in the layout of SQuAD 1.1 and 2.0.

    {"version", "data": [ {"title", "paragraphs": [ {"context", "qas": [
        {"id", "question", "answers": [{"text", "answer_start"}], "is_impossible"} ]} ]} ]}

    one Row a question: (context, question, answers, id, title)

Rajpurkar et al. 2016 (arXiv:1606.05250) and 2018 (arXiv:1806.03822). Collections that add keys,
such as CMRC 2018 with an id for each paragraph, are read as well; what is added is left aside. A
fault in one question, paragraph or article rejects that one; whether an answer stands where it
claims to is for the task to say.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from hasten.core.errors import DataError
from hasten.data.json_rows import JSON_READ, load_document, surrogate_fault
from hasten.data.source import Cell, Rejected, Row, RowFile, Source

COLUMNS = ("context", "question", "answers", "id", "title")
_KINDS = {list: "a list", str: "a string", int: "a whole number", bool: "true or false"}


def open_squad(source: Source, notes: list[str]) -> RowFile:
    """Returns what is needed to read a SQuAD file; a Row's line is the question's number.

    The cells are ``context`` and ``question`` (strings), ``answers`` (a list of
    ``{"text", "answer_start"}`` dicts; empty where there is no answer), ``id`` (a string) and
    ``title`` (a string, None where the article has none).

    Args:
        source: the file; its document is held in memory while it is read.
        notes: what is known of the file already; not changed.

    Raises:
        DataError: the file is not JSON, has another layout, or holds no usable question.
    """
    fault: Rejected | None = None
    for item in _iterate_squad(source):
        if isinstance(item, Row):
            break
        fault = fault or item
    else:
        if fault is None:
            raise DataError(f"{source.name}: holds no question.")
        raise DataError(f"{source.name}: no question can be used; the first: {fault.reason}.")
    return RowFile(
        display_name=source.name,
        format="squad",
        columns=COLUMNS,
        notes=(*notes, "SQuAD: questions are numbered from 1"),
        sources=(source,),
        reader=partial(_iterate_squad, source),
    )


class _Fault(Exception):
    """A key that is missing or has a value of the wrong type."""


def _iterate_squad(source: Source) -> Iterator[Row | Rejected]:
    for number, item in enumerate(_questions(_articles(source)), start=1):
        if isinstance(item, tuple):
            yield Row(number, item)
        else:
            yield Rejected(source.name, number, item)


def _articles(source: Source) -> list[Any]:
    document = load_document(source)
    if not isinstance(document, dict) or "data" not in document:
        keys = ", ".join(f"'{key}'" for key in list(document)[:5]) or "none"
        more = " ..." if len(document) > 5 else ""
        raise DataError(
            f"{source.name}: is one JSON object without 'data' (its keys: {keys}{more}); "
            f"{JSON_READ}."
        )
    if not isinstance(document["data"], list):
        raise DataError(f"{source.name}: 'data' is not a list; {JSON_READ}.")
    return document["data"]


def _questions(articles: list[Any]) -> Iterator[tuple[Cell, ...] | str]:
    """Yields each question's cells, or why it (or the whole that holds it) cannot be used."""
    for a, article in enumerate(articles, start=1):
        try:
            paragraphs = _get(article, "article", "paragraphs", list)
        except _Fault as fault:
            yield f"{fault} (article {a})"
            continue
        for p, paragraph in enumerate(paragraphs, start=1):
            where = f"(article {a}, paragraph {p})"
            try:
                questions = _get(paragraph, "paragraph", "qas", list)
            except _Fault as fault:
                yield f"{fault} {where}"
                continue
            for question in questions:
                try:
                    item = _cells(article, paragraph, question)
                except _Fault as fault:
                    item = f"{fault} {where}"
                yield item


def _cells(article: dict[str, Any], paragraph: dict[str, Any], entry: Any) -> tuple[Cell, ...]:
    context = _get(paragraph, "paragraph", "context", str)
    question = _get(entry, "question", "question", str)
    # Evaluation files are keyed by id, and JSON keys are strings.
    is_numbered = type(entry.get("id")) is int
    name = str(entry["id"]) if is_numbered else _get(entry, "question", "id", str)
    title = None if article.get("title") is None else _get(article, "article", "title", str)
    cells = (context, question, _answers(entry), name, title)
    if reason := surrogate_fault(cells):
        raise _Fault(reason)
    return cells


def _answers(entry: dict[str, Any]) -> list[dict[str, Any]]:
    if entry.get("answers") is None:
        return []
    answers = [
        {
            "text": _get(answer, "answer", "text", str),
            "answer_start": _get(answer, "answer", "answer_start", int),
        }
        for answer in _get(entry, "question", "answers", list)
    ]
    if entry.get("is_impossible") is None:
        return answers
    return [] if _get(entry, "question", "is_impossible", bool) else answers


def _get(holder: Any, what: str, key: str, kind: type) -> Any:
    if not isinstance(holder, dict):
        raise _Fault(f"the {what} is not an object")
    if key not in holder:
        raise _Fault(f"the {what} has no '{key}'")
    # type(), not isinstance(): a truth value is no number here.
    if type(holder[key]) is not kind:
        raise _Fault(f"'{key}' of the {what} is not {_KINDS[kind]}")
    return holder[key]
