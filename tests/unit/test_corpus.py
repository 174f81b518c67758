"""A file's usable rows: none lost without a reason, the same ones held out everywhere."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from builders import corpus_of, labelled_rows, write_rows
from hasten.core.errors import DataError, UsageError
from hasten.data import corpus as corpus_module
from hasten.data.corpus import (
    Corpus,
    Reading,
    check_rejected,
    held_out_rows,
    held_out_tail,
    open_corpus,
)
from hasten.data.rows import Cell, RowFile, open_rows


def from_rows(folder: Path, rows, name: str = "rows.csv") -> Corpus:
    path = write_rows(folder / name, rows, ("text", "label"))
    return corpus_of(open_rows(path, delimiter=",", header=True))


@pytest.mark.usefixtures("own_cache")
class TestReading:
    def test_rows_come_back_as_they_were(self, tmp_path: Path):
        rows = [("première ligne", "b"), ("with, comma", "a"), ("two\nlines", "b"), ("中文", "c")]
        corpus = from_rows(tmp_path, rows)
        assert list(corpus.texts()) == [(text,) for text, _ in rows]
        assert list(corpus.texts(np.array([2, 0]))) == [("two\nlines",), ("première ligne",)]
        assert corpus.label_names == ("b", "a", "c")
        assert corpus.labels.tolist() == [0, 1, 0, 2]
        assert corpus.lines.tolist() == [2, 3, 4, 6]
        assert corpus.class_counts() == {"b": 2, "a": 1, "c": 1}
        assert (len(corpus), corpus.num_read, corpus.rejected) == (4, 4, ())
        assert corpus.num_characters == sum(len(text.encode()) for text, _ in rows)

    def test_every_row_read_is_used_or_rejected_with_its_line(self, tmp_path: Path):
        path = tmp_path / "rows.csv"
        path.write_text("text,label\ngood,a\n,a\nno label,\nmore good,b\ntoo,many,cells\nlast,b\n")
        corpus = corpus_of(open_rows(path, header=True))
        assert [text for (text,) in corpus.texts()] == ["good", "more good", "last"]
        assert corpus.lines.tolist() == [2, 5, 7]
        assert [(r.line, r.file) for r in corpus.rejected] == [(n, str(path)) for n in (3, 4, 6)]
        assert "text" in corpus.rejected[0].reason and "label" in corpus.rejected[1].reason
        assert len(corpus) + len(corpus.rejected) == corpus.num_read == 6

    def test_several_columns_in_the_order_asked_for(self, tmp_path: Path):
        path = write_rows(tmp_path / "a.csv", [("1", "x", "y"), ("2", "z", "w")], ("l", "p", "q"))
        corpus = corpus_of(open_rows(path, header=True), text=("q", "p"), label="l")
        assert corpus.columns == ("q", "p") and corpus.num_texts == 2 and corpus.label_column == "l"
        assert list(corpus.texts()) == [("y", "x"), ("w", "z")]
        assert list(corpus.texts(np.array([1]))) == [("w", "z")]

    def test_without_labels(self, tmp_path: Path):
        path = write_rows(tmp_path / "a.csv", [("one", "x"), ("two", "y")], ("text", "label"))
        corpus = corpus_of(open_rows(path, header=True), label=None)
        assert corpus.label_column is None and corpus.label_names == ()
        assert corpus.labels.tolist() == [-1, -1]

    def test_json_values_are_text_and_labels(self, tmp_path: Path):
        values = [("a", 1), ("b", True), ("c", "x"), (7, False), ("\ud800", 1), ("e", 0.5)]
        path = tmp_path / "a.jsonl"
        path.write_text("".join(json.dumps({"text": t, "label": v}) + "\n" for t, v in values))
        corpus = corpus_of(open_rows(path))
        assert corpus.label_names == ("1", "true", "x", "false")
        assert [t for (t,) in corpus.texts()] == ["a", "b", "c", "7"]
        assert [r.line for r in corpus.rejected] == [5, 6]
        assert "surrogate" in corpus.rejected[0].reason

    @settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        cells=st.lists(
            st.tuples(
                st.text(
                    st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), max_size=8
                ),
                st.sampled_from(["a", "b", "", "  ", "NA", "null"]),
            ),
            min_size=2,
            max_size=15,
        )
    )
    def test_nothing_is_lost(self, cells, tmp_path: Path):
        path = write_rows(tmp_path / "f.csv", [("first", "a"), *cells], ("text", "label"))
        corpus = corpus_of(open_rows(path, delimiter=",", header=True))
        used = [(t.strip(), v.strip()) for t, v in cells if t.strip() and v.strip()]
        found = [
            (text, corpus.label_names[label])
            for (text,), label in zip(corpus.texts(), corpus.labels.tolist(), strict=True)
        ]
        assert found == [("first", "a"), *used]
        assert corpus.num_read == len(corpus) + len(corpus.rejected) == 1 + len(cells)


def test_a_file_is_parsed_once(own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    builds = []
    original = corpus_module._build
    monkeypatch.setattr(corpus_module, "_build", lambda *args: builds.append(1) or original(*args))
    rows = labelled_rows(30)
    first = from_rows(tmp_path, rows)
    again = from_rows(tmp_path, rows, "other-name.csv")
    assert len(builds) == 1 and again.key == first.key
    assert again.name.endswith("other-name.csv")
    # The columns are part of the key, and so is the content.
    path = write_rows(tmp_path / "rows.csv", rows, ("text", "label"))
    swapped = corpus_of(open_rows(path), text=("label",), label="text")
    assert len(builds) == 2 and swapped.key != first.key
    corpus_of(open_rows(path), label=None)
    assert len(builds) == 3
    from_rows(tmp_path, [*rows, ("one more", "bird")])
    assert len(builds) == 4


def test_how_a_file_is_read_is_part_of_its_key(own_cache: Path, tmp_path: Path):
    path = tmp_path / "a.csv"
    path.write_bytes("text,label\ncaf\xe9,a\nth\xe9,b\n".encode("latin-1"))
    texts = []
    for encoding in ("latin-1", "cp1251"):
        corpus = corpus_of(open_rows(path, encoding=encoding))
        texts.append([t for (t,) in corpus.texts()])
    assert texts == [["café", "thé"], ["cafй", "thй"]]


def test_what_is_read_of_a_row_is_part_of_the_key(own_cache: Path, tmp_path: Path):
    path = write_rows(tmp_path / "a.csv", [("one", "x"), ("two", "y")], ("text", "label"))
    keys = set()
    for task, form in (("a", "f"), ("a", "g"), ("b", "f")):

        def read_row(cells: Sequence[Cell], mark: str = f" {task} {form}") -> tuple[str, ...]:
            return (cells[0] + mark,)

        corpus = open_corpus([open_rows(path)], Reading(task, form, ("text",), None, read_row))
        assert list(corpus.texts()) == [(f"one {task} {form}",), (f"two {task} {form}",)]
        keys.add(corpus.key)
    assert len(keys) == 3


def test_a_row_may_have_another_number_of_texts_than_of_columns(own_cache: Path, tmp_path: Path):
    path = write_rows(tmp_path / "a.csv", [("one,1", "x"), ("two,2", "y")], ("text", "label"))
    reading = Reading("t", "f", ("text",), "label", lambda cells: tuple(cells[0].split(",")))
    corpus = open_corpus([open_rows(path)], reading)
    assert (corpus.columns, corpus.num_texts, corpus.label_column) == (("text",), 2, "label")
    assert list(corpus.texts()) == [("one", "1"), ("two", "2")]
    assert corpus.num_bytes(np.array([1, 0])).tolist() == [[3, 1], [3, 1]]


# Several files

THREE = {
    "a.csv": ("text,label\nfirst,x\n,y\nsecond line,y\n", ","),
    "b.tsv": ("label\tother\ttext\nz\t1\tthird\ny\t2\tfoürth\n", "\t"),
    "c.jsonl": ('{"text": "fifth", "label": "x"}\n\n{"text": "sixth"}\n', None),
}


def write_three(folder: Path) -> list[RowFile]:
    files = []
    for name, (content, delimiter) in THREE.items():
        (folder / name).write_text(content, encoding="utf-8")
        files.append(open_rows(folder / name, delimiter=delimiter, display_name=name))
    return files


def test_several_files_are_one_corpus_in_the_order_given(own_cache: Path, tmp_path: Path):
    corpus = corpus_of(*write_three(tmp_path))
    texts = ["first", "second line", "third", "foürth", "fifth"]
    assert [text for (text,) in corpus.texts()] == texts
    assert [corpus.label_names[label] for label in corpus.labels.tolist()] == list("xyzyx")
    assert corpus.label_names == ("x", "y", "z")
    assert corpus.num_bytes(np.array([4, 3, 0])).tolist() == [[5], [7], [5]]
    assert [corpus.place(row) for row in range(len(corpus))] == [
        ("a.csv", 2),
        ("a.csv", 4),
        ("b.tsv", 2),
        ("b.tsv", 3),
        ("c.jsonl", 1),
    ]
    assert corpus.files == (("a.csv", 0), ("b.tsv", 2), ("c.jsonl", 4))
    assert [(r.file, r.line) for r in corpus.rejected] == [("a.csv", 3), ("c.jsonl", 3)]
    assert corpus.num_read == 7
    assert "a.csv" in corpus.name and "2 more" in corpus.name
    other_way = corpus_of(*write_three(tmp_path)[::-1])
    assert other_way.key != corpus.key
    assert [text for (text,) in other_way.texts()] == ["fifth", "third", "foürth", *texts[:2]]
    assert other_way.place(0) == ("c.jsonl", 1)


def test_a_file_without_usable_rows_is_passed_over(own_cache: Path, tmp_path: Path):
    first = write_rows(tmp_path / "a.csv", [("", "x"), ("", "y")], ("text", "label"))
    other = write_rows(tmp_path / "b.csv", [("one", "x"), ("two", "y")], ("text", "label"))
    for order in ((first, other), (other, first), (first, other, first)):
        corpus = corpus_of(*map(open_rows, order))
        assert [corpus.place(row) for row in range(2)] == [(str(other), 2), (str(other), 3)]
        assert {r.file for r in corpus.rejected} == {str(first)}
        assert len(corpus.rejected) == 2 * order.count(first)


def test_several_files_are_parsed_once_under_whatever_names(
    own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    corpus_of(*write_three(tmp_path))
    monkeypatch.setattr(corpus_module, "_build", None)
    renamed = []
    for name in THREE:
        (tmp_path / name).rename(tmp_path / f"new-{name}")
        renamed.append(open_rows(tmp_path / f"new-{name}", delimiter=THREE[name][1]))
    again = corpus_of(*renamed)
    assert again.place(2) == (str(tmp_path / "new-b.tsv"), 2)
    assert again.rejected[1].file == str(tmp_path / "new-c.jsonl")


def test_a_message_names_the_file_of_the_first_row_that_is_rejected(
    own_cache: Path, tmp_path: Path
):
    good = write_rows(tmp_path / "good.csv", [("a", "x"), ("b", "y")], ("text", "label"))
    bad = write_rows(tmp_path / "bad.csv", [("c", "x"), ("", "y")], ("text", "label"))
    corpus = corpus_of(open_rows(good), open_rows(bad))
    check_rejected(corpus, 0.25)
    with pytest.raises(DataError, match=r"1 of 4 rows.*bad\.csv line 3: ") as caught:
        check_rejected(corpus, 0.2)
    assert str(caught.value).startswith(f"{good} and 1 more: ")


def test_a_column_that_one_of_the_files_lacks_is_an_error(own_cache: Path, tmp_path: Path):
    good = write_rows(tmp_path / "good.csv", [("a", "x"), ("b", "y")], ("text", "label"))
    bad = write_rows(tmp_path / "bad.csv", [("c", "x"), ("d", "y")], ("words", "label"))
    with pytest.raises(UsageError, match="'text'"):
        corpus_of(open_rows(good), open_rows(bad))


def test_too_many_rejections_are_an_error(own_cache: Path, tmp_path: Path):
    corpus = from_rows(tmp_path, [("a", "x"), ("b", "y"), ("", "x"), ("d", "y")])
    check_rejected(corpus, 0.25)
    with pytest.raises(DataError, match=r"1 of 4 rows.*24%.*line 4: .*text") as caught:
        check_rejected(corpus, 0.24)
    assert caught.value.exit_code == 3
    nothing = from_rows(tmp_path, [("", "x"), ("b", "")], "n.csv")
    with pytest.raises(DataError, match="2 of 2 rows"):
        check_rejected(nothing, 1.0)


def continuous(folder: Path, sizes: Sequence[int]) -> Corpus:
    """A text cut into rows of the given numbers of bytes, each longer than two."""
    path = folder / "blocks.jsonl"
    rows = [{"text": "x" * (size - size % 2) + "é" * (size % 2)} for size in sizes]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = corpus_of(open_rows(path), label=None)
    assert len(corpus) == len(sizes)
    return corpus


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(2, 60), min_size=1, max_size=30),
    fraction=st.sampled_from([0.0, 0.05, 0.1, 0.3, 0.5, 0.99]),
)
def test_the_end_of_a_continuous_text_is_held_out(
    sizes: list[int], fraction: float, tmp_path: Path
):
    corpus = continuous(tmp_path, sizes)
    num_bytes = corpus.num_bytes(np.arange(len(sizes))).sum(1).tolist()
    held = held_out_tail(corpus, fraction).tolist()
    num_held = sum(held)
    assert held == [False] * (len(sizes) - num_held) + [True] * num_held
    assert num_held < len(sizes)
    # As many rows as fit into the share.
    room = fraction * sum(num_bytes) + 1e-6
    assert sum(num_bytes[len(sizes) - num_held :]) <= room
    if num_held < len(sizes) - 1:
        assert sum(num_bytes[len(sizes) - num_held - 1 :]) > room - 2e-6


LABELLED = [(f"text {i} {'x' * (i % 7)}", "abbcccc"[i % 7]) for i in range(700)]


def held_texts(corpus: Corpus, fraction: float = 0.1) -> set[str]:
    held = held_out_rows(corpus, fraction)
    return {text for (text,) in corpus.texts(np.flatnonzero(held))}


def test_a_tenth_of_each_class_is_held_out(own_cache: Path, tmp_path: Path):
    corpus = from_rows(tmp_path, LABELLED)
    held = held_out_rows(corpus, 0.1)
    counts = Counter(corpus.label_names[label] for label in corpus.labels[held].tolist())
    assert counts == {"a": 10, "b": 20, "c": 40}
    assert held_out_rows(corpus, 0.0).sum() == 0


def test_the_same_rows_are_held_out_whatever_their_order_and_file(own_cache: Path, tmp_path: Path):
    expected = held_texts(from_rows(tmp_path, LABELLED))
    for seed in range(3):
        shuffled = random.Random(seed).sample(LABELLED, len(LABELLED))
        assert held_texts(from_rows(tmp_path, shuffled, f"{seed}.csv")) == expected
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"other": 1, "label": v, "text": t}) for t, v in LABELLED]
    path.write_text("\n".join(lines) + "\n")
    assert held_texts(corpus_of(open_rows(path))) == expected


def test_adding_rows_moves_few_others(own_cache: Path, tmp_path: Path):
    before = held_texts(from_rows(tmp_path, LABELLED))
    more = [(f"new {i}", "abbcccc"[i % 7]) for i in range(70)]
    after = held_texts(from_rows(tmp_path, LABELLED + more, "b.csv"))
    assert len(before - after) <= 0.25 * len(before)


def test_rows_of_equal_text_stay_together(own_cache: Path, tmp_path: Path):
    rows = [(f"text {i % 50}", "ab"[i % 2]) for i in range(500)]
    corpus = from_rows(tmp_path, rows)
    held = held_out_rows(corpus, 0.2)
    texts = [text for (text,) in corpus.texts()]
    assert 0 < held.sum() < 500
    for text in set(texts):
        assert len({bool(held[i]) for i, t in enumerate(texts) if t == text}) == 1


def test_equal_text_under_two_labels_stays_together(own_cache: Path, tmp_path: Path):
    """Otherwise validation would be judged on a text that training has seen."""
    rows = [(f"text {i // 2}", "ab"[i % 2]) for i in range(200)]
    rows += [(f"only a {i}", "a") for i in range(300)]
    corpus = from_rows(tmp_path, rows)
    held = held_out_rows(corpus, 0.2)
    texts = np.array([text for (text,) in corpus.texts()])
    assert not set(texts[held]) & set(texts[~held])
    assert 0.15 < held.mean() < 0.25
    shuffled = random.Random(1).sample(rows, len(rows))  # b now comes first at times
    assert held_texts(from_rows(tmp_path, shuffled, "s.csv"), 0.2) == set(texts[held].tolist())


def test_a_class_keeps_a_row_to_train_on(own_cache: Path, tmp_path: Path):
    rows = [("same text", "a")] * 5 + [("single", "b")] + [(f"c {i}", "c") for i in range(20)]
    corpus = from_rows(tmp_path, rows)
    for fraction in (0.1, 0.5, 0.99):
        held = held_out_rows(corpus, fraction)
        assert set(corpus.labels[~held].tolist()) == {0, 1, 2}


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 6).map("text {}".format), st.sampled_from("abcd")),
        min_size=2,
        max_size=40,
    ),
    fraction=st.sampled_from([0.1, 0.3, 0.5, 0.95]),
)
def test_whatever_the_rows_no_class_and_no_text_is_torn_apart(
    rows: list[tuple[str, str]], fraction: float, tmp_path: Path
):
    corpus = from_rows(tmp_path, rows)
    held = held_out_rows(corpus, fraction)
    assert set(corpus.labels[~held].tolist()) == set(corpus.labels.tolist())
    texts = np.array([text for (text,) in corpus.texts()])
    assert not set(texts[held]) & set(texts[~held])


def test_the_hash_parts_cells(own_cache: Path, tmp_path: Path):
    path = write_rows(
        tmp_path / "a.csv", [("ab", "c", "x"), ("a", "bc", "y"), ("ab", "c", "y")], ("p", "q", "l")
    )
    hashes = corpus_of(open_rows(path, header=True), text=("p", "q"), label="l").hashes.tolist()
    assert hashes[0] != hashes[1] and hashes[0] == hashes[2]
