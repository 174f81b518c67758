"""Opening a run's files: every way of naming them, the task they are for, what is held out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from builders import Recorder, labelled_rows, write_labelled, write_rows
from hasten.config.load import build_config
from hasten.config.schema import DataConfig
from hasten.core.errors import DataError, HastenError, UsageError
from hasten.training.sources import Sources, expand, open_sources, open_split, warn_about_rows

PAIRS = [(f"source line {i}", f"target line number {i}") for i in range(30)]


def sources_of(recorder: Recorder | None = None, **settings: Any) -> Sources:
    """Opens files; settings are dotted keys with an underscore for each dot."""
    overrides = {key.replace("__", "."): value for key, value in settings.items()}
    return open_sources(build_config(overrides=overrides), recorder or Recorder())


def write_lines(folder: Path, name: str, lines: list[str]) -> str:
    path = folder / name
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)


def write_pair(folder: Path, name: str) -> tuple[str, str]:
    """Writes two line-aligned files."""
    source, target = (list(side) for side in zip(*PAIRS, strict=True))
    return write_lines(folder, f"{name}.en", source), write_lines(folder, f"{name}.de", target)


# Which files


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_every_way_of_naming_a_splits_files(split: str, tmp_path: Path):
    table = str(write_labelled(tmp_path / "a.csv", 9))
    other = str(write_labelled(tmp_path / "b.csv", 9))
    source, target = write_pair(tmp_path, "c")
    (file,) = open_split(DataConfig.model_validate({split: table}), split)
    assert file.path == Path(table)
    files = open_split(DataConfig.model_validate({split: [other, table]}), split)
    assert [file.path for file in files] == [Path(other), Path(table)]
    prefix = "" if split == "train" else f"{split}_"
    aligned = DataConfig.model_validate({f"{prefix}source": source, f"{prefix}target": target})
    (file,) = open_split(aligned, split)
    assert file.format == "aligned" and file.paths == (Path(source), Path(target))
    flag = prefix.replace("_", "-")
    for side in ("source", "target"):
        half = DataConfig.model_validate({f"{prefix}{side}": source})
        with pytest.raises(UsageError, match=f"--{flag}source and --{flag}target go together"):
            open_split(half, split)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_split_is_one_file_or_a_pair_not_both(split: str, tmp_path: Path):
    path = str(write_labelled(tmp_path / "a.csv", 9))
    with pytest.raises(UsageError, match=f"--{split} or --{split}-source .* not both"):
        open_split(DataConfig.model_validate({split: path, f"{split}_source": path}), split)
    assert open_split(DataConfig(), split) == []


def test_there_must_be_something_to_train_on():
    with pytest.raises(UsageError, match="no training file"):
        open_split(DataConfig(), "train")


@pytest.mark.parametrize(
    ("options", "columns"),
    [
        ({"delimiter": ";"}, ("a,b", "c")),
        ({"header": False}, ("1", "2")),
        ({"encoding": "latin-1", "header": True}, ("a", "b;c")),
    ],
)
def test_reading_options_hold_for_every_file(options: dict, columns: tuple, tmp_path: Path):
    path = tmp_path / "a.csv"
    path.write_bytes("a,b;c\nth\xe9,one;two\nr,s;t\n".encode("latin-1"))
    data = DataConfig.model_validate({"encoding": "latin-1", **options, "train": [str(path)] * 2})
    assert [file.columns for file in open_split(data, "train")] == [columns] * 2


@pytest.mark.parametrize(
    ("columns", "read"),
    [
        (("source", "target"), ("source", "target")),  # as back-translation writes them
        (("target", "source"), ("source", "target")),
        (("en", "de"), ("en", "de")),
        (("de", "en"), ("en", "de")),  # the names of the files say which way
        (("one", "two"), ("one", "two")),
    ],
)
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_line_aligned_files_and_tables_of_pairs_are_trained_on_together(
    columns: tuple[str, str], read: tuple[str, str], suffix: str, tmp_path: Path
):
    """All pairs are there, each the same way round."""
    source, target = write_pair(tmp_path, "a")
    made = [(f"made text {i}", f"another target {i}") for i in range(20)]
    cells = [pair if columns == read else pair[::-1] for pair in made]
    table = tmp_path / f"made{suffix}"
    if suffix == ".csv":
        write_rows(table, cells, columns)
    else:
        lines = [json.dumps(dict(zip(columns, pair, strict=True))) for pair in cells]
        write_lines(tmp_path, table.name, lines)
    recorder = Recorder()
    found = sources_of(recorder, data__train=str(table), data__source=source, data__target=target)
    assert found.task.name == "translation" and found.reading.columns == read
    assert sorted(found.corpora["train"].texts()) == sorted([*made, *PAIRS])
    assert "also a.en + a.de, line-aligned: 30 lines each" in recorder.notes
    assert len(found.rows["train"]) + len(found.rows["validation"]) == 50


def test_several_tables_and_other_splits_go_with_line_aligned_files(tmp_path: Path):
    source, target = write_pair(tmp_path, "a")
    tables = [str(write_rows(tmp_path / f"{n}.csv", PAIRS[:9], ("en", "de"))) for n in "bc"]
    settings = {"data__train": tables, "data__source": source, "data__target": target}
    found = sources_of(
        **settings, data__validation_source=source, data__validation_target=target,
        data__test=tables[0],
    )  # fmt: skip
    assert {name: len(rows) for name, rows in found.rows.items()} == {
        "train": 48,
        "validation": 30,
        "test": 9,
    }
    # A table alone, too, is measured on line-aligned files, which have no names for their columns.
    found = sources_of(
        data__train=tables[0], data__validation_source=source, data__validation_target=target
    )
    assert list(found.corpora["validation"].texts()) == PAIRS


def test_columns_or_files_but_not_perhaps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    source, target = write_pair(tmp_path, "a")
    table = str(write_rows(tmp_path / "t.csv", PAIRS, ("en", "de")))

    def names(source: str | None, target: str | None) -> dict[str, Any]:
        given = {"data__source": source, "data__target": target}
        return {"data__train": table} | {k: v for k, v in given.items() if v is not None}

    for refused, message in (
        (names("a.en", "a.dee"), r"--target a\.dee: there is no such file, to go with a\.en, nor"),
        (names("b.en", "a.de"), r"--source b\.en: there is no such file, to go with a\.de, nor"),
        (names("a.en", None), "--source and --target go together"),
        (names("x", "y"), "no column 'x'"),
    ):
        with pytest.raises(UsageError, match=message):
            sources_of(**refused)
    assert len(sources_of(**names("en", "de")).corpora["train"]) == 30
    Path(source).rename("en")
    assert len(sources_of(**names("en", "de")).corpora["train"]) == 30  # one of them is no file
    Path(target).rename("de")
    with pytest.raises(UsageError, match=r"'en' is a column of .*t\.csv and a file: .* \./en"):
        sources_of(**names("en", "de"))
    assert len(sources_of(**names("1", "2")).corpora["train"]) == 30
    both = sources_of(**names("./en", "./de"))
    assert list(both.corpora["train"].texts()) == PAIRS * 2 and both.reading.columns == ("en", "de")
    reverse = sources_of(**names("./de", "./en"))
    assert list(reverse.corpora["train"].texts()) == [pair[::-1] for pair in PAIRS] * 2


def test_patterns_name_files_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("b.txt", "a.txt", "c.csv", "[x].txt", "deep/er/d.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text\n")
    (tmp_path / "folder.txt").mkdir()
    monkeypatch.chdir(tmp_path)
    assert expand(["*.txt"]) == ["[x].txt", "a.txt", "b.txt"]
    assert expand(["c.csv", "[ab].txt"]) == ["c.csv", "a.txt", "b.txt"]
    assert expand(["**/d.txt"]) == ["deep/er/d.txt"]
    assert expand([f"{tmp_path}/b.*"]) == [f"{tmp_path}/b.txt"]
    assert expand(["[x].txt"]) == ["[x].txt"]  # there is a file of this very name
    assert expand(["missing.csv"]) == ["missing.csv"]  # reading it says what is wrong
    with pytest.raises(DataError, match=r"\*\.tsv: no file fits"):
        expand(["a.txt", "*.tsv"])


# Which task


FILES: dict[str, tuple[str, str]] = {
    "text-classification": ("a.csv", "text,label\n" + "one two,x\nthree,y\n" * 20),
    "text-generation": (
        "a.txt",
        "It was a dark and stormy night; the rain fell in torrents.\n" * 9,
    ),
    "translation": ("a.csv", "en,de\n" + "".join(f"a house {i},ein Haus {i}\n" for i in range(30))),
}


@pytest.mark.parametrize("task", FILES)
def test_the_task_is_recognised_and_the_reason_told(task: str, tmp_path: Path):
    name, content = FILES[task]
    (tmp_path / name).write_text(content)
    recorder = Recorder()
    found = sources_of(recorder, data__train=str(tmp_path / name))
    assert found.task.name == found.reading.task == task and found.task_reason
    assert f"task: {task} ({found.task_reason})" in recorder.notes


def test_a_task_asked_for_is_taken_and_columns_decide_else(tmp_path: Path):
    path = str(write_rows(tmp_path / "a.csv", PAIRS, ("text", "label")))
    asked = sources_of(data__train=path, task="translation", data__source="text")
    assert asked.task.name == "translation" and asked.task_reason == "as asked for"
    named = sources_of(data__train=path, data__source="text", data__target="label")
    assert named.task.name == "translation" and "columns" in named.task_reason
    with pytest.raises(UsageError, match=r"unknown task 'translashun'.*'translation'"):
        sources_of(data__train=path, task="translashun")


def test_a_file_of_no_task_says_what_is_missing(tmp_path: Path):
    path = write_rows(tmp_path / "a.csv", [(str(i), str(-i)) for i in range(30)], ("n", "m"))
    with pytest.raises(HastenError, match=r"a\.csv: .*column"):
        sources_of(data__train=str(path))


# Which rows


def test_a_table_holds_out_a_share_of_each_class(tmp_path: Path):
    path = str(write_labelled(tmp_path / "a.csv", 90))
    recorder = Recorder()
    found = sources_of(recorder, data__train=path, data__validation_fraction=0.2)
    corpus, rows = found.corpora["train"], found.rows
    both = np.concatenate([rows["train"], rows["validation"]])
    assert sorted(both.tolist()) == list(range(90)) and set(found.corpora) == {"train"}
    assert np.bincount(corpus.labels[rows["validation"]]).tolist() == [6, 6, 6]
    assert any("18 rows" in note and "20% of each class" in note for note in recorder.notes)


def test_a_continuous_text_holds_out_its_end(tmp_path: Path):
    lines = [f"Line {i} of a long text, which goes on and on and on." for i in range(2000)]
    path = write_lines(tmp_path, "a.txt", lines)
    found = sources_of(data__train=path)
    train, validation = found.rows["train"], found.rows["validation"]
    assert len(validation) and train.tolist() == list(range(len(train)))
    assert validation.tolist() == list(range(len(train), len(train) + len(validation)))
    none = sources_of(data__train=path, data__validation_fraction=0.0)
    assert len(none.rows["validation"]) == 0


def test_a_validation_file_is_what_is_validated_on(tmp_path: Path):
    train = str(write_labelled(tmp_path / "a.csv", 60))
    others = [str(write_labelled(tmp_path / f"{name}.csv", 20, seed=1)) for name in "bc"]
    found = sources_of(data__train=train, data__validation=others, data__test=others[0])
    assert {name: len(rows) for name, rows in found.rows.items()} == {
        "train": 60,
        "validation": 40,
        "test": 20,
    }
    assert found.corpora["validation"].place(20) == (others[1], 2)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_file_that_lacks_a_column_is_named(split: str, tmp_path: Path):
    good = str(write_labelled(tmp_path / "good.csv", 60))
    bad = str(write_rows(tmp_path / "bad.csv", labelled_rows(9), ("text", "lable")))
    settings: dict[str, Any] = {"data__train": good, f"data__{split}": (good, bad)}
    with pytest.raises(DataError, match=r"bad\.csv: .*'label'"):
        sources_of(**settings)


def test_rejections_of_every_file_are_kept_and_the_first_is_told(tmp_path: Path):
    good = str(write_labelled(tmp_path / "good.csv", 60))
    bad = str(
        write_rows(tmp_path / "bad.csv", [*labelled_rows(40), ("", "bird")], ("text", "label"))
    )
    recorder = Recorder()
    found = sources_of(recorder, data__train=(good, bad), data__test=bad)
    assert [(entry.file, entry.line) for entry in found.rejected] == [(bad, 42), (bad, 42)]
    warn_about_rows(found, recorder)
    first, second = [text for text in recorder.warnings if "1 rejected" in text]
    assert f"{good} and 1 more: 101 rows read, 100 used" in first and f"{bad} line 42: " in first
    assert f"{bad}: 41 rows read, 40 used" in second and "(first: line 42: " in second
    with pytest.raises(DataError, match=r"bad\.csv: 1 of 41 rows"):
        sources_of(data__train=good, data__test=bad, data__max_rejected_fraction=0.01)
