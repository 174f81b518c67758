"""Choosing columns: guesses with reasons, other tasks refused by name, cells turned to strings."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.core.errors import DataError, UsageError
from hasten.data.columns import (
    CellError,
    check_label_values,
    choose_columns,
    choose_text_columns,
    label_of,
    resolve_columns,
    text_of,
    texts_of,
)
from hasten.data.rows import Row

rng = random.Random(0)
WORDS = ["the", "film", "actor", "was", "very", "good", "bad", "never", "again", "time", "so"]


def prose(num_words: int = 12) -> str:
    return " ".join(rng.choices(WORDS, k=num_words)) + f" {rng.random():.6f}"


def one_of(*values: object):
    return lambda: rng.choice(values)


def count_up():
    numbers = iter(range(1, 10**9))
    return lambda: str(next(numbers))


def sample(num_rows: int = 60, **columns) -> tuple[list[Row], list[str]]:
    """Builds rows (the first in line 2) from a maker of cells for each column."""
    rows = [
        Row(line, tuple(make() for make in columns.values())) for line in range(2, num_rows + 2)
    ]
    return rows, list(columns)


def table(names: str, *rows: Sequence[object]) -> tuple[list[Row], list[str]]:
    return [Row(i, tuple(row)) for i, row in enumerate(rows, start=2)], names.split(",")


# --- guesses ---------------------------------------------------------------------------------

GUESSES = {
    "by name": ({"text": prose, "label": one_of("pos", "neg")}, "text", "label"),
    "label first": ({"label": one_of("pos", "neg"), "text": prose}, "text", "label"),
    "by content": ({"v1": one_of("ham", "spam"), "v2": prose}, "v2", "v1"),
    "numbers for names": ({"1": prose, "2": one_of("0", "1")}, "1", "2"),
    "ids, dates, addresses and numbers are neither": (
        {
            "review_id": count_up(),
            "url": lambda: f"https://example.org/{rng.random()}",
            "date": lambda: f"2024-05-{rng.randint(10, 28)}",
            "code": lambda: f"B00{rng.randrange(10**7)}X",
            "price": lambda: f"{rng.random():.2f}",
            "star_rating": one_of("1", "2", "3", "4", "5"),
            "review_body": prose,
        },
        "review_body",
        "star_rating",
    ),
    "tweets": (
        {
            "tweet_id": count_up(),
            "airline_sentiment": one_of("positive", "negative", "neutral"),
            "airline_sentiment_confidence": lambda: f"{rng.random():.4f}",
            "airline": one_of("A", "B", "C"),
            "name": lambda: f"user{rng.randrange(10**6)}",
            "text": prose,
            "user_description": lambda: prose(40),
        },
        "text",
        "airline_sentiment",
    ),
    "index of pandas": (
        {"column 1": count_up(), "phrase": prose, "value": one_of("x", "y")},
        "phrase",
        "value",
    ),
    "title and text": (
        {"label": one_of("1", "2"), "title": lambda: prose(4), "text": lambda: prose(30)},
        "title text",
        "label",
    ),
    "class index, title, description": (
        {
            "Class Index": one_of("1", "2", "3", "4"),
            "Title": lambda: prose(6),
            "Description": lambda: prose(30),
        },
        "Title Description",
        "Class Index",
    ),
    "sentence pairs": (
        {"idx": count_up(), "sentence1": prose, "sentence2": prose, "label": one_of("0", "1")},
        "sentence1 sentence2",
        "label",
    ),
    "inference": (
        {"premise": lambda: prose(20), "hypothesis": prose, "label": one_of("yes", "no", "maybe")},
        "premise hypothesis",
        "label",
    ),
    "labelled json": (
        {"text": prose, "label": one_of(True, False), "meta": lambda: {"a": 1}},
        "text",
        "label",
    ),
    "chinese": (
        {"编号": count_up(), "内容": lambda: "这部电影" + prose(1), "类别": one_of("好", "坏")},
        "内容",
        "类别",
    ),
    "single words as text": (
        {
            "surname": lambda: "".join(rng.choices("abcdefghij", k=7)),
            "country": one_of("de", "fr", "it"),
        },
        "surname",
        "country",
    ),
    "constant columns are not the label": (
        {"body": prose, "market": lambda: "US", "kind": one_of("a", "b")},
        "body",
        "kind",
    ),
    "a file sorted by its label": ({"text": prose, "label": lambda: "neg"}, "text", "label"),
}


@pytest.mark.parametrize("columns, text, label", GUESSES.values(), ids=GUESSES)
def test_guess(columns, text, label):
    rows, names = sample(**columns)
    choice = choose_columns(rows, names)
    assert choice.text == tuple(text.split())
    assert choice.label == label
    assert len(choice.reasons) == 2
    assert f"'{label}'" in choice.reasons[-1]


def test_reasons():
    rows, names = sample(review=lambda: "x" * 93 + " y", label=one_of("a", "b"), other=one_of("c"))
    assert choose_columns(rows, names).reasons == (
        "text column 'review': named so, 95 characters on average",
        "label column 'label': named so, 2 values in the first 60 rows",
    )
    rows, names = sample(v1=prose, v2=one_of("a", "b"), v3=one_of("a", "b", "c"))
    reason = choose_columns(rows, names).reasons[-1]
    assert "short values that recur" in reason
    assert "it could also be 'v3'" in reason


def test_two_rows_are_enough():
    rows, names = table("text,label", ("good film", "pos"), ("bad film", "neg"))
    assert choose_columns(rows, names).label == "label"
    rows, names = table("1,2", ("a", "0"), ("b", "1"), ("c", "0"))
    assert choose_columns(rows, names).text == ("1",)


def test_columns_as_asked_for():
    rows, names = sample(a=prose, b=prose, text=prose, label=one_of("x", "y"), c=one_of("u", "v"))
    choice = choose_columns(rows, names, text=["b", "1"], label="5")
    assert (choice.text, choice.label) == (("b", "a"), "c")
    assert choice.reasons[0] == "text column 'b': as asked for"
    assert choose_columns(rows, names, text=["a"]).label == "label"
    assert choose_columns(rows, names, label="c").text == ("text",)
    with pytest.raises(UsageError, match="both text and label"):
        choose_columns(rows, names, text=["a"], label="a")
    with pytest.raises(UsageError, match="twice"):
        choose_columns(rows, names, text=["a", "1"])


def test_nothing_fits():
    rows, names = sample(id=count_up(), price=lambda: f"{rng.random():.3f}", kind=one_of("a", "b"))
    with pytest.raises(DataError) as caught:
        choose_columns(rows, names, file="x.csv")
    message = str(caught.value)
    assert message.startswith("x.csv: no column looks like the text: 'id' (whole numbers, all diff")
    assert "--text-column" in message
    rows, names = sample(text=prose)
    with pytest.raises(DataError, match=r"no column looks like the label.*--label-column"):
        choose_columns(rows, names)


@pytest.mark.parametrize(
    "columns", [{"score": rng.random}, {"id": count_up(), "score": rng.random}]
)
def test_numbers_beside_the_text_are_regression(columns):
    rows, names = sample(text=prose, **columns)
    with pytest.raises(DataError, match=r"'score' holds decimal numbers .* regression is another"):
        choose_columns(rows, names)


def test_only_the_text():
    rows, names = sample(id=count_up(), content=prose)
    assert choose_text_columns(rows, names)[0] == ("content",)
    assert choose_text_columns(rows, names, text=["1"])[0] == ("id",)
    rows, names = sample(id=count_up())
    with pytest.raises(DataError, match="no column looks like the text"):
        choose_text_columns(rows, names)


# --- other tasks -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "label, part",
    [
        (lambda: f"{rng.random():.3f}", "regression is another task"),
        (rng.random, "regression is another task"),
        (one_of("1", "2", "2.5"), "regression is another task"),
        (lambda: ["a", "b"], "multi-label is another task"),
        (one_of("['a', 'b']", "['a']"), "multi-label is another task"),
        (one_of('["a", "b"]', "[]"), "multi-label is another task"),
        (one_of("[1, 2]", "[1]"), "multi-label is another task"),
        (one_of("a", "b", "c", "a;b"), "multi-label is another task"),
        (one_of("a", "b", "a, b"), "multi-label is another task"),
        (one_of("a|b", "b|c", "a|c"), "multi-label is another task"),
        (count_up(), "different value in each of 60 rows"),
        (lambda: " ", "holds no label"),
        (lambda: {"a": 1}, "holds no label"),
    ],
)
@pytest.mark.parametrize("asked", [True, False])
def test_label_columns_of_other_tasks(label, part, asked):
    rows, names = sample(text=prose, label=label)
    with pytest.raises(DataError) as caught:
        choose_columns(rows, names, label="label" if asked else None, file="x.csv")
    message = str(caught.value)
    if label() == " " and not asked:
        part = "no column looks like the label"
    assert part in message
    assert message.startswith("x.csv: ")
    assert "'label'" in message
    if "another task" in part:
        assert ", line " in message


@pytest.mark.parametrize(
    "values",
    [
        ("Korea, South", "Korea, North", "Japan"),
        ("Albany, NY", "Buffalo, NY", "New York, NY"),
        ("Sports", "Sports|Football", "Sports|Tennis", "News"),
        ("Arts, Crafts & Sewing", "Toys", "Health, Care"),
        ("[deleted]", "kept"),
        ("1.0 beta", "2.0 beta"),
        ("1", "2", "0.5", "unknown"),
        ("nan", "1"),
    ],
)
def test_single_labels_with_marks_in_them(values):
    rows, names = sample(text=prose, label=one_of(*values))
    assert choose_columns(rows, names).label == "label"
    check_label_values(dict.fromkeys(values, 10), "label", 10 * len(values))


@pytest.mark.parametrize(
    "counts, num_rows, part",
    [
        ({}, 0, "there is no label"),
        ({"a": 100}, 100, "every row has the label 'a'"),
        ({str(i): 1 for i in range(50)}, 50, "a different value in each of 50 rows"),
        ({str(i): 1 for i in range(50)} | {"x": 2}, 52, "51 different values in 52 rows"),
        ({str(i): 3 for i in range(10_001)}, 30_003, "at most 10,000 classes"),
        ({"1": 500_000, "2": 400_000, "0.5": 1}, 900_001, "regression is another task"),
        ({"a": 9, "b": 9, "a;b": 1}, 19, "multi-label is another task"),
    ],
)
def test_labels_of_the_whole_file(counts, num_rows, part):
    with pytest.raises(DataError) as caught:
        check_label_values(counts, "kind", num_rows, file="x.csv")
    assert part in str(caught.value)
    assert "column 'kind'" in str(caught.value)
    assert str(caught.value).startswith("x.csv: ")


def test_labels_that_can_be_learned():
    check_label_values({"a": 1, "b": 1}, "label", 2)
    check_label_values({"a": 2, "b": 1}, "label", 3)
    check_label_values({"1": 2, "-1": 3}, "label", 5)
    check_label_values({str(i): 3 for i in range(10_000)}, "label", 30_000)


# --- cells -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cell, text",
    [(" a b ", "a b"), ("NA", "NA"), (12, "12"), (1.5, "1.5"), (True, "true"), ("中文", "中文")],
)
def test_text_of(cell, text):
    assert text_of(cell) == text


@pytest.mark.parametrize(
    "cell, reason",
    [("", "empty"), (" \n", "empty"), (None, "empty"), ([], "JSON list"), ({}, "JSON object")],
)
def test_text_that_cannot_be_used(cell, reason):
    with pytest.raises(CellError, match=reason):
        text_of(cell)


@pytest.mark.parametrize(
    "cell, label",
    [
        (" pos ", "pos"),
        ("null", "null"),
        (3, "3"),
        (True, "true"),
        (False, "false"),
        ("0.5", "0.5"),
    ],
)
def test_label_of(cell, label):
    assert label_of(cell) == label


@pytest.mark.parametrize(
    "cell, reason",
    [
        ("", "the label is empty"),
        ("  ", "the label is empty"),
        (None, "the label is empty"),
        (0.5, "regression"),
        (1.0, "regression"),
        (["a"], "multi-label"),
        ({"a": 1}, "JSON object"),
    ],
)
def test_label_that_cannot_be_used(cell, reason):
    with pytest.raises(CellError, match=reason):
        label_of(cell)


def test_several_texts_of_a_row():
    assert texts_of(("a", "", None, " b "), (0, 3)) == ("a", "b")
    assert texts_of(("a", "", None, " b "), (1, 2, 0)) == ("", "", "a")
    with pytest.raises(CellError, match="the text is empty"):
        texts_of(("a", "", None), (1, 2))
    with pytest.raises(CellError, match="JSON list"):
        texts_of(("a", ["b"]), (0, 1))


@given(st.one_of(st.text(), st.integers(), st.booleans(), st.none(), st.floats()))
def test_cells_become_stripped_strings_or_say_why(cell):
    for convert in (text_of, label_of):
        try:
            result = convert(cell)
        except CellError as error:
            assert str(error)
        else:
            assert result
            assert result == result.strip()


# --- names and numbers -----------------------------------------------------------------------


def test_resolve_columns():
    columns = ["text", " label ", "3", "x"]
    assert resolve_columns(columns, ["label", " text"]) == (1, 0)
    assert resolve_columns(columns, ["1", "4"]) == (0, 3)
    assert resolve_columns(columns, ["3"]) == (2,), "a name wins over a number"
    assert resolve_columns(["1", "2"], ["2"]) == (1,)
    with pytest.raises(UsageError) as caught:
        resolve_columns(columns, ["txet"])
    assert "Did you mean 'text'? The columns are: 'text', 'label', '3', 'x'." in str(caught.value)
    for wrong in ("0", "5", "-1", ""):
        with pytest.raises(UsageError, match="there is no column"):
            resolve_columns(columns, [wrong])
