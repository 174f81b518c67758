"""JSON documents: every question and every object is a row, or is rejected with its reason."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from hasten.core.errors import DataError
from hasten.data.rows import Rejected, Row, open_rows, spool_standard_input

CMRC = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "cmrc2018"
COLUMNS = ("context", "question", "answers", "id", "title")
SETTINGS = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=4,
)
answers = st.lists(
    st.fixed_dictionaries({"text": texts, "answer_start": st.integers(0, 9)}), max_size=2
)
questions = st.fixed_dictionaries(
    {"id": texts, "question": texts, "answers": answers},
    optional={"is_impossible": st.booleans(), "plausible_answers": answers},
)
paragraphs = st.fixed_dictionaries(
    {"context": texts, "qas": st.lists(questions, max_size=3)}, optional={"id": texts}
)
articles = st.fixed_dictionaries(
    {"title": texts, "paragraphs": st.lists(paragraphs, max_size=3)}, optional={"id": texts}
)
squads = st.fixed_dictionaries(
    {"data": st.lists(articles, min_size=1, max_size=3)}, optional={"version": texts}
)


def write(folder: Path, content: Any, name: str = "file.json", **options: Any) -> Path:
    path = folder / name
    if not isinstance(content, str | bytes):
        content = json.dumps(content, **options)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refused(path: Path, *parts: str) -> None:
    with pytest.raises(DataError) as caught:
        open_rows(path)
    for part in (str(path), *parts):
        assert part in str(caught.value), str(caught.value)


def squad(*questions: Any, **paragraph: Any) -> dict[str, Any]:
    """One article with one paragraph, whose keys may be replaced."""
    inner = {"context": "An owl saw a saw.", "qas": list(questions), **paragraph}
    return {"version": "1.1", "data": [{"title": "Owls", "paragraphs": [inner]}]}


GOOD = {"id": "q1", "question": "Who?", "answers": [{"text": "An owl", "answer_start": 0}]}
GOOD_ROW = ("An owl saw a saw.", "Who?", GOOD["answers"], "q1", "Owls")


# --- SQuAD -----------------------------------------------------------------------------------


@SETTINGS
@given(
    document=squads,
    indent=st.sampled_from([None, 0, 2]),
    ascii_only=st.booleans(),
    gz=st.booleans(),
)
def test_every_question_is_a_row(tmp_path, document, indent, ascii_only, gz):
    expected = [
        (
            paragraph["context"],
            entry["question"],
            [] if entry.get("is_impossible") else entry["answers"],
            entry["id"],
            article["title"],
        )
        for article in document["data"]
        for paragraph in article["paragraphs"]
        for entry in paragraph["qas"]
    ]
    text = json.dumps(document, indent=indent, ensure_ascii=ascii_only).encode()
    path = write(
        tmp_path, gzip.compress(text) if gz else text, "file.json.gz" if gz else "file.json"
    )
    if not expected:
        refused(path, "holds no question")
        return
    source = open_rows(path)
    assert (source.format, source.columns) == ("squad", COLUMNS)
    assert "questions are numbered from 1" in source.notes[-1]
    rows = list(source)
    assert rows == [Row(number, cells) for number, cells in enumerate(expected, start=1)]
    assert rows == list(source), "reading again gives the same"


# What may be wrong with a question, as what stands in its place.
BREAKS = [
    lambda entry: None,
    lambda entry: [entry],
    lambda entry: entry | {"question": 7},
    lambda entry: entry | {"question": "\ud83d"},
    lambda entry: {key: value for key, value in entry.items() if key != "question"},
    lambda entry: {key: value for key, value in entry.items() if key != "id"},
    lambda entry: entry | {"answers": [{"text": "x"}]},
    lambda entry: entry | {"is_impossible": "yes"},
]


@SETTINGS
@given(document=squads, breaks=st.lists(st.none() | st.sampled_from(BREAKS), max_size=20))
def test_a_broken_question_is_rejected_and_no_other(tmp_path, document, breaks):
    document["data"].append(squad(GOOD)["data"][0])  # at least one is usable
    before = list(open_rows(write(tmp_path, document)))
    wanted = iter(breaks)
    is_broken: list[bool] = []
    for article in document["data"][:-1]:
        for paragraph in article["paragraphs"]:
            for at, entry in enumerate(paragraph["qas"]):
                change = next(wanted, None)
                is_broken.append(change is not None)
                paragraph["qas"][at] = entry if change is None else change(entry)
    after = list(open_rows(write(tmp_path, document)))
    assert [isinstance(row, Rejected) for row in after] == [*is_broken, False]
    assert [row.line for row in after] == list(range(1, len(before) + 1))
    pairs = zip(before, after, [*is_broken, False], strict=True)
    assert all(one == other for one, other, broken in pairs if not broken)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Returns the way to every value within a document."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    found: list[tuple[Any, ...]] = []
    for key, inner in items:
        found.append((*path, key))
        if isinstance(inner, dict | list):
            found += places(inner, (*path, key))
    return found


@SETTINGS
@given(document=squads, data=st.data(), replacement=json_values)
def test_any_value_anywhere_is_read_or_refused(tmp_path, document, data, replacement):
    where = data.draw(st.sampled_from(places(document)))
    holder: Any = document
    for key in where[:-1]:
        holder = holder[key]
    holder[where[-1]] = replacement
    path = write(tmp_path, document)
    try:
        rows = list(open_rows(path))
    except DataError as error:
        assert str(path) in str(error)
        return
    assert [row.line for row in rows] == list(range(1, len(rows) + 1))
    for row in rows:
        if isinstance(row, Row):
            context, question, found, key, title = row.cells
            assert all(isinstance(cell, str) for cell in (context, question, key, title or ""))
            for answer in found:
                assert {name: type(value) for name, value in answer.items()} == {
                    "text": str,
                    "answer_start": int,
                }


FAULTS: dict[str, tuple[Any, str]] = {
    "no question": ({"id": "x", "answers": []}, "the question has no 'question'"),
    "question is a list": ({**GOOD, "question": ["Who?"]}, "'question' of the question is not a s"),
    "no id": ({"question": "Who?", "answers": []}, "the question has no 'id'"),
    "id is a truth value": ({**GOOD, "id": True}, "'id' of the question is not a string"),
    "id is a fraction": ({**GOOD, "id": 1.5}, "'id' of the question is not a string"),
    "answers is an object": ({**GOOD, "answers": {"text": ["x"]}}, "'answers' of the question is"),
    "answer is a string": ({**GOOD, "answers": ["An owl"]}, "the answer is not an object"),
    "no start": ({**GOOD, "answers": [{"text": "x"}]}, "the answer has no 'answer_start'"),
    "start is a string": (
        {**GOOD, "answers": [{"text": "x", "answer_start": "0"}]},
        "'answer_start' of the answer is not a whole number",
    ),
    "start is a truth value": (
        {**GOOD, "answers": [{"text": "x", "answer_start": True}]},
        "'answer_start' of the answer is not a whole number",
    ),
    "impossible is a string": ({**GOOD, "is_impossible": "no"}, "'is_impossible' of the question"),
    "a string": ("Who?", "the question is not an object"),
    "half a character": ({**GOOD, "question": "\ud83d"}, "half of a surrogate pair"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_of_a_question(tmp_path, name):
    entry, reason = FAULTS[name]
    path = write(tmp_path, squad(GOOD, entry, {**GOOD, "id": "q3"}))
    first, second, third = open_rows(path)
    assert first == Row(1, GOOD_ROW)
    assert isinstance(second, Rejected)
    assert (second.file, second.line) == (str(path), 2)
    assert second.reason.startswith(reason) or reason in second.reason
    assert second.reason.endswith("(article 1, paragraph 1)")
    assert isinstance(third, Row) and (third.line, third.cells[3]) == (3, "q3")


def test_faults_of_paragraphs_and_articles(tmp_path):
    document = squad(GOOD, GOOD, context=None)
    document["data"] += [
        "an article",
        {"title": "none"},
        {"paragraphs": [7, {"context": "x"}, {"context": "x", "qas": {}}]},
        {"title": 7, "paragraphs": [{"context": "x", "qas": [GOOD]}]},
        squad(GOOD)["data"][0],
    ]
    rows = list(open_rows(write(tmp_path, document)))
    assert [row.reason if isinstance(row, Rejected) else row.cells for row in rows] == [
        "'context' of the paragraph is not a string (article 1, paragraph 1)",
        "'context' of the paragraph is not a string (article 1, paragraph 1)",
        "the article is not an object (article 2)",
        "the article has no 'paragraphs' (article 3)",
        "the paragraph is not an object (article 4, paragraph 1)",
        "the paragraph has no 'qas' (article 4, paragraph 2)",
        "'qas' of the paragraph is not a list (article 4, paragraph 3)",
        "'title' of the article is not a string (article 5, paragraph 1)",
        GOOD_ROW,
    ]
    assert [row.line for row in rows] == list(range(1, 10))


def test_questions_without_answers(tmp_path):
    entries = [
        {"id": "a", "question": "?", "answers": []},
        {"id": "b", "question": "?", "answers": [], "is_impossible": True},
        {"id": "c", "question": "?", "answers": GOOD["answers"], "is_impossible": True},
        {"id": "d", "question": "?"},
        {"id": 5, "question": "?", "answers": None, "is_impossible": False},
    ]
    rows = [row for row in open_rows(write(tmp_path, squad(*entries))) if isinstance(row, Row)]
    assert [row.cells[2] for row in rows] == [[]] * 5
    assert [row.cells[3] for row in rows] == ["a", "b", "c", "d", "5"]


def test_faults_of_the_whole(tmp_path):
    read = ("SQuAD", "array of objects", "one object a line")
    refused(write(tmp_path, {"version": "1.1", "data": {}}), "'data' is not a list", *read)
    refused(write(tmp_path, {"version": "1.1", "data": []}), "holds no question")
    refused(write(tmp_path, {"data": [{"text": "a"}]}), "no question can be used", "'paragraphs'")
    one = {"name": "x", "rows": [1]}
    refused(write(tmp_path, one, indent=1), "one JSON object", "'name', 'rows'", *read)
    broken = json.dumps(squad(GOOD), indent=1)
    refused(write(tmp_path, broken[:-10]), "line 2", "not JSON", *read)
    refused(write(tmp_path, broken.replace("{", "{,", 2)), "line 1", "not JSON")


@pytest.mark.skipif(not CMRC.exists(), reason=f"cmrc2018 is not in {CMRC}")
@pytest.mark.parametrize("name, num_questions", [("dev", 3219), ("trial", 1002)])
def test_cmrc2018(name, num_questions):
    source = open_rows(CMRC / f"{name}.json")
    assert source.format == "squad"
    rows = list(source)
    assert len(rows) == num_questions
    num_exact = 0
    for row in rows:
        assert isinstance(row, Row)
        context, question, found, key, title = row.cells
        assert found and isinstance(title, str) and key.startswith(name.upper())
        # Two questions of the trial set are empty strings.
        assert question or (name, row.line) in (("trial", 748), ("trial", 809))
        start, text = found[0]["answer_start"], found[0]["text"]
        num_exact += context[start : start + len(text)] == text
    assert num_exact > 0.9 * num_questions


# --- arrays and lines ------------------------------------------------------------------------


@SETTINGS
@given(
    objects=st.lists(st.dictionaries(texts, json_values, max_size=4), min_size=1, max_size=6),
    indent=st.sampled_from([None, 0, 2]),
)
def test_arrays_round_trip(tmp_path, objects, indent):
    assume(any(objects))
    source = open_rows(write(tmp_path, objects, indent=indent))
    assert source.format == "json"
    assert any("objects are numbered from 1" in note for note in source.notes)
    assert set(source.columns) == {key for o in objects for key in o}
    expected = [tuple(o.get(column) for column in source.columns) for o in objects]
    assert list(source) == [Row(number, cells) for number, cells in enumerate(expected, start=1)]


def test_elements_that_are_no_objects_are_rejected(tmp_path):
    source = open_rows(write(tmp_path, [{"a": 1}, [1], None, {"a": "\ud83d"}, {"b": 2}]))
    rows = list(source)
    assert source.columns == ("a", "b")
    assert [rows[0], rows[4]] == [Row(1, (1, None)), Row(5, (None, 2))]
    reasons = [(row.line, row.reason) for row in rows if isinstance(row, Rejected)]
    assert reasons == [
        (2, "not a JSON object but a list"),
        (3, "not a JSON object but null"),
        (4, "a string holds half of a surrogate pair"),
    ]


def test_arrays_without_objects_are_refused(tmp_path):
    refused(write(tmp_path, "[]"), "empty JSON array")
    refused(write(tmp_path, "[1, 2]"), "element 1", "not a JSON object but a number", "SQuAD")
    refused(write(tmp_path, "[{}]"), "objects are empty")
    refused(write(tmp_path, '[{"a": 1},\n{"a" 2}]'), "line 2", "not JSON")
    refused(write(tmp_path, "[" * 100_000), "not readable as JSON")


@pytest.mark.parametrize(
    "content, part",
    [
        ('"text"\n', "holds a string"),
        ("12", "holds a number"),
        ("null", "holds null"),
        ("text,label\na,1\n", "is not JSON"),
        ("1\n2\n", "is not JSON"),
    ],
)
def test_other_content_is_refused(tmp_path, content, part):
    refused(write(tmp_path, content), part, "SQuAD", "array of objects", "one object a line")


LINES = {
    "several": ('{"a": 1}\n{"a": 2}\n', [Row(1, (1,)), Row(2, (2,))]),
    "one": ('\n {"a": {"data": 1}} \n', [Row(2, ({"data": 1},))]),
    "with data": ('{"data": [1]}\n\n{"data": [2]}\n', [Row(1, ([1],)), Row(3, ([2],))]),
    "of SQuAD": (
        json.dumps(squad(GOOD)) + "\n" + json.dumps({"data": 1}) + "\n",
        [Row(1, ("1.1", squad(GOOD)["data"])), Row(2, (None, 1))],
    ),
}


@pytest.mark.parametrize("name", LINES)
def test_lines_in_a_json_file(tmp_path, name):
    content, rows = LINES[name]
    source = open_rows(write(tmp_path, content))
    assert source.format == "jsonl"
    assert list(source) == rows


def test_a_bad_first_line_is_rejected_like_any_other(tmp_path):
    first, second = open_rows(write(tmp_path, '{"a": }\n{"a": 2}\n'))
    assert isinstance(first, Rejected) and first.reason.startswith("not JSON")
    assert second == Row(2, (2,))


# --- by content ------------------------------------------------------------------------------


CONTENTS = {
    "array": (b'\xef\xbb\xbf [ {"a": 1}]', ".json", "json"),
    "SQuAD in one line": (json.dumps(squad(GOOD)).encode(), ".json", "squad"),
    "SQuAD, indented": (json.dumps(squad(GOOD), indent=1).encode(), ".json", "squad"),
    "SQuAD, other order": (
        json.dumps({"data": squad(GOOD)["data"], "version": "x"}).encode(),
        ".json",
        "squad",
    ),
    "SQuAD, other keys first": (
        json.dumps({"about": "owls"} | squad(GOOD), indent=1).encode(),
        ".json",
        "squad",
    ),
    "lines": (b'{"a": 1}\n{"a": 2}\n', ".jsonl", "jsonl"),
    "lines like SQuAD": (b'{"data": 1, "b": "\\"paragraphs\\""}\n' * 2, ".jsonl", "jsonl"),
    "lines of documents": (b'{"data": 1, "paragraphs": []}\n' * 2, ".json", "jsonl"),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_standard_input_and_files_without_a_suffix(tmp_path, name):
    content, suffix, file_format = CONTENTS[name]
    path = spool_standard_input(io.BytesIO(content), tmp_path)
    assert (path.suffix, path.read_bytes()) == (suffix, content)
    assert open_rows(path).format == file_format
    assert open_rows(write(tmp_path, content, "file")).format == file_format
    compressed = spool_standard_input(io.BytesIO(gzip.compress(content)), tmp_path)
    assert open_rows(compressed).format == file_format
