"""Inspecting a file: the counts agree with a plain count, and no file is too bad to describe."""

from __future__ import annotations

import csv
import json
import statistics
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hasten.core.errors import DataError, UsageError
from hasten.data import inspection
from hasten.data.inspection import inspect_file


def write(folder: Path, rows: list[tuple[str, ...]], name: str = "file.csv") -> Path:
    path = folder / name
    with path.open("w", newline="", encoding="utf-8") as handle:
        csv.writer(handle).writerows(rows)
    return path


examples = st.tuples(
    st.text(st.sampled_from("ab \n\t\u00a0中"), max_size=8), st.sampled_from(["x", "y", "z", " "])
)


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(rows=st.lists(examples, min_size=1, max_size=40))
def test_counts_agree_with_a_plain_count(tmp_path, rows):
    path = write(tmp_path, [("text", "label"), *rows])
    found = inspect_file(path, delimiter=",", text=["text"], label="label", header=True)
    used = [(t.strip(), y.strip()) for t, y in rows if t.strip() and y.strip()]
    assert found.num_rows == len(rows)
    assert found.num_used + found.num_rejected == found.num_rows
    assert sum(reason.count for reason in found.rejected_reasons) == found.num_rejected
    if found.label_column is None:  # its sample showed that it is no label column
        assert found.problems
        return
    assert found.num_used == len(used)
    assert dict(found.classes) == Counter(label for _, label in used)
    if not used:
        assert found.characters is None
        return
    assert found.num_duplicates == len(used) - len(set(used))
    labels = {text: {y for t, y in used if t == text} for text, _ in used}
    assert found.num_contradictory_texts == sum(len(ys) > 1 for ys in labels.values())
    for lengths, measured in (
        (found.characters, [len(text) for text, _ in used]),
        (found.words, [len(text.split()) for text, _ in used]),
    ):
        assert lengths is not None
        assert (lengths.minimum, lengths.maximum) == (min(measured), max(measured))
        assert lengths.mean == pytest.approx(statistics.mean(measured))
        assert lengths.median == statistics.median_low(measured)


def test_the_whole_answer(tmp_path):
    rows: list[tuple[str, ...]] = [("text", "label")]
    rows += [(f"good film number {i}", "pos") for i in range(30)]
    rows += [("bad film", "neg")] * 11 + [("bad film", "pos"), ("", "pos"), ("x", "rare"), ("y",)]
    found = inspect_file(write(tmp_path, rows))
    assert found.text_columns == ("text",)
    assert found.label_column == "label"
    assert found.classes == (("pos", 31), ("neg", 11), ("rare", 1))
    assert found.small_classes == (("rare", 1),)
    assert found.num_small_classes == 1
    assert found.majority_share == pytest.approx(31 / 43)
    assert (found.num_rows, found.num_used, found.num_rejected) == (45, 43, 2)
    assert [(r.reason, r.count, r.first_line) for r in found.rejected_reasons] == [
        ("the text is empty", 1, 44),
        ("1 cell where the header has 2", 1, 46),
    ]
    assert found.num_duplicates == 10
    assert found.num_contradictory_texts == 1
    assert found.sample[0] == {"text": "good film number 0", "label": "pos"}
    assert len(found.sample) == 3
    assert found.longest_text_line == 12
    assert found.problems == ()
    assert found.rows_per_second > 0
    as_json = json.loads(json.dumps(found.as_dict()))
    assert as_json["classes"] == {"pos": 31, "neg": 11, "rare": 1}
    assert as_json["characters"]["maximum"] == len("good film number 10")
    assert as_json["rejected_reasons"][0]["first_line"] == 44


def test_without_labels(tmp_path):
    rows = [("id", "text"), *[(str(i), f"some text, the {i}th") for i in range(30)]]
    found = inspect_file(write(tmp_path, rows))
    assert found.label_column is None
    assert found.text_columns == ("text",)
    assert found.num_used == 30
    assert found.num_classes == 0
    assert found.majority_share is None
    assert len(found.problems) == 1
    assert "no column looks like the label" in found.problems[0]


def test_without_anything_to_learn_from(tmp_path):
    rows = [("id", "price"), *[(str(i), f"{i}.5") for i in range(30)]]
    found = inspect_file(write(tmp_path, rows))
    assert (found.label_column, found.text_columns) == (None, ())
    assert found.num_used == found.num_rows == 30
    assert found.characters is None
    assert found.problems


@pytest.mark.parametrize(
    "labels, part",
    [
        (["a"] * 40, "every row has the label 'a'"),
        ([f"{i / 7:.3f}" for i in range(40)], "regression is another task"),
        ([f"u{i}" for i in range(40)], "a different value in each"),
        (["a", "b", "a;b", "b"] * 10, "multi-label is another task"),
        (["1", "2"] * 1000 + ["1.5"], "regression is another task"),
        (["a", "b"] * 20 + [""] * 10, "10 of 50 rows cannot be used; 10 because: the label is"),
    ],
)
def test_problems_do_not_end_the_inspection(tmp_path, labels, part):
    rows = [("text", "label"), *[(f"this is row {i}", label) for i, label in enumerate(labels)]]
    found = inspect_file(write(tmp_path, rows))
    assert found.num_rows == len(labels)
    assert any(part in problem for problem in found.problems), found.problems


def test_no_usable_row(tmp_path):
    found = inspect_file(write(tmp_path, [("text", "label"), ("a",), ("b",)]), header=True)
    assert (found.num_rows, found.num_used) == (2, 0)
    assert "2 of 2 rows cannot be used" in found.problems[0]


def test_options_reach_the_reader(tmp_path):
    path = tmp_path / "file.csv"
    path.write_bytes("caf\xe9 noir;x\nth\xe9 vert;y\neau;x\n".encode("latin-1"))
    found = inspect_file(path, encoding="latin-1", delimiter=";", header=False, label="2")
    assert found.columns == ("1", "2")
    assert found.sample[0] == {"1": "café noir", "2": "x"}
    with pytest.raises(UsageError, match="there is no column 'label'"):
        inspect_file(path, encoding="latin-1", label="label")
    with pytest.raises(DataError, match="line 1"):
        inspect_file(path)


def test_several_text_columns(tmp_path):
    rows = [("title", "body", "label")]
    rows += [(f"title {i}", f"the body of number {i}", "ab"[i % 2]) for i in range(10)]
    rows += [("", "a body only", "a"), ("", "", "a")]
    found = inspect_file(write(tmp_path, rows))
    assert found.text_columns == ("title", "body")
    assert found.num_used == 11
    assert found.words is not None
    assert (found.words.minimum, found.words.maximum) == (3, 7)


def test_json_lines(tmp_path):
    path = tmp_path / "file.jsonl"
    lines = [{"text": f"some text {i}", "label": bool(i % 2)} for i in range(20)]
    path.write_text("\n".join(map(json.dumps, lines)) + '\n{"text": "x", "label": 0.5}\nnot json\n')
    found = inspect_file(path)
    assert dict(found.classes) == {"true": 10, "false": 10}
    assert found.num_rejected == 2
    assert found.format == "jsonl"


OTHER_FORMATS = {
    "text": (
        "novel.txt",
        "It was a dark night.\nThe rain fell.\n",
        "no column looks like the label",
    ),
    "jsonl": (
        "chats.jsonl",
        '{"messages": [{"role": "user", "content": "Hi"}]}\n{"messages": []}\n',
        "no column looks like the text",
    ),
    "json": ("rows.json", '[{"text": "a b", "label": "x"}, {"text": "c", "label": "y"}]', None),
    "squad": (
        "questions.json",
        json.dumps(
            {
                "data": [
                    {
                        "paragraphs": [
                            {
                                "context": "One of two.",
                                "qas": [
                                    {
                                        "id": str(i),
                                        "question": "Which one?",
                                        "answers": [{"text": "One", "answer_start": 0}],
                                    }
                                    for i in range(2)
                                ],
                            }
                        ]
                    }
                ]
            }
        ),
        None,
    ),
}


@pytest.mark.parametrize("name", OTHER_FORMATS)
def test_what_is_not_a_table_of_labels_is_described_all_the_same(tmp_path, name):
    file, content, problem = OTHER_FORMATS[name]
    (tmp_path / file).write_text(content)
    found = inspect_file(tmp_path / file)
    assert found.format == name
    assert found.num_used == found.num_rows == (1 if name == "text" else 2)
    assert json.loads(json.dumps(found.as_dict()))["sample"] == list(found.sample)
    assert list(found.sample[0]) == list(found.columns)
    if problem is not None:
        assert [p for p in found.problems if problem in p]


def test_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"text": ["a b", "c", "d"], "label": [1, 0, 1]})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    found = inspect_file(tmp_path / "rows.parquet")
    assert (found.format, found.num_used) == ("parquet", 3)
    assert found.classes == (("1", 2), ("0", 1))
    assert json.loads(json.dumps(found.as_dict()))["sample"][0] == {"text": "a b", "label": 1}


def test_long_texts_are_measured_closely(tmp_path):
    rows = [("text", "label"), *[("x" * (5000 + 100 * i), "ab"[i % 2]) for i in range(101)]]
    lengths = inspect_file(write(tmp_path, rows), text=["text"]).characters
    assert lengths is not None
    assert (lengths.minimum, lengths.maximum) == (5000, 15_000)
    assert lengths.mean == pytest.approx(10_000)
    assert lengths.median == pytest.approx(10_000, rel=0.02)
    assert lengths.p95 == pytest.approx(14_500, rel=0.02)


def test_many_reasons_are_gathered(tmp_path):
    rows = [("text", "label"), *[(f"text {i}", "ab"[i % 2]) for i in range(40)]]
    found = inspect_file(write(tmp_path, [*rows, *[("x",) * n for n in range(3, 33)]]))
    assert len(found.rejected_reasons) == 10
    assert found.rejected_reasons[0].reason == "3 cells where the header has 2"
    assert found.rejected_reasons[-1].reason == "other reasons"
    assert sum(reason.count for reason in found.rejected_reasons) == 30


def test_places_do_not_divide_reasons(tmp_path):
    path = tmp_path / "file.jsonl"
    good = '{"text": "a b", "label": 1}\n{"text": "b", "label": 2}\n'
    path.write_text(good + "\n".join('{"a"' + " " * i + "x" for i in range(30)))
    reasons = inspect_file(path).rejected_reasons
    assert [(r.reason, r.count, r.first_line) for r in reasons] == [
        ("not JSON: Expecting ':' delimiter", 30, 3)
    ]


def test_repeats_are_estimated_in_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(inspection, "_MAX_HASHES", 1000)
    texts = [f"text number {i}" for i in range(5000)]
    rows = [("text", "label"), *[(t, "a") for t in texts], *[(t, "b") for t in texts]]
    rows += [(t, "a") for t in texts]
    found = inspect_file(write(tmp_path, rows))
    assert found.duplicates_estimated
    assert found.num_duplicates == pytest.approx(5000, rel=0.25)
    assert found.num_contradictory_texts == pytest.approx(5000, rel=0.25)


def test_a_column_of_too_many_labels(tmp_path, monkeypatch):
    monkeypatch.setattr(inspection, "_MAX_COUNTED_LABELS", 50)
    rows = [("text", "label"), *[(f"text {i}", f"l{i // 2}") for i in range(400)]]
    found = inspect_file(write(tmp_path, rows))
    assert found.num_used == 400
    assert found.num_classes == 50
    assert "more than 50 different values" in found.problems[0]


def test_reading_needs_no_torch():
    code = "import hasten.data.inspection, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
