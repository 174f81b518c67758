"""Which file is meant for which task: by its format, its columns' names, and its contents."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from builders import COMMON, Recorder, write_rows
from hasten.config.load import build_config
from hasten.core.errors import DataError, HastenError, UsageError
from hasten.task.registry import TASKS
from hasten.training.sources import Sources, open_sources

CLASSIFICATION, GENERATION = "text-classification", "text-generation"
TRANSLATION, ANSWERING = "translation", "question-answering"
NUM_ROWS = 60


def said(seed: int, count: int = NUM_ROWS, words: int = 12) -> list[str]:
    """Texts of which none is like another."""
    draw = random.Random(seed)
    return [
        " ".join([f"{draw.choice(COMMON)}{i}", *draw.choices(COMMON, k=draw.randint(3, words))])
        for i in range(count)
    ]


def drawn(values: Sequence[Any], seed: int = 9) -> list[Any]:
    draw = random.Random(seed)
    return [draw.choice(values) for _ in range(NUM_ROWS)]


def table(folder: Path, **columns: Sequence[Any]) -> dict[str, Any]:
    """A CSV file of the given columns."""
    path = write_rows(folder / "data.csv", list(zip(*columns.values(), strict=True)), [*columns])
    return {"data.train": (str(path),)}


def lines(folder: Path, **columns: Sequence[Any]) -> dict[str, Any]:
    """A JSONL file of the given columns."""
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return written(folder, "data.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def written(folder: Path, name: str, text: str) -> dict[str, Any]:
    (folder / name).write_text(text, encoding="utf-8")
    return {"data.train": (str(folder / name),)}


def aligned(folder: Path) -> dict[str, Any]:
    written(folder, "x.en", "\n".join(said(1)))
    written(folder, "x.de", "\n".join(said(2)))
    return {"data.source": str(folder / "x.en"), "data.target": str(folder / "x.de")}


def chats(*, as_text: bool) -> list[Any]:
    found = [
        [{"role": "user", "content": a}, {"role": "assistant", "content": b}]
        for a, b in zip(said(1), said(2), strict=True)
    ]
    return [json.dumps(chat) for chat in found] if as_text else found


def questions() -> dict[str, Sequence[str]]:
    contexts = said(1, words=30)
    return {
        "context": contexts,
        "question": [f"{text}?" for text in said(2)],
        "answer": [context.split()[1] for context in contexts],
    }


def squad(folder: Path) -> dict[str, Any]:
    columns = questions()
    paragraphs = [
        {
            "context": context,
            "qas": [
                {
                    "id": str(i),
                    "question": question,
                    "answers": [{"text": answer, "answer_start": context.index(answer)}],
                }
            ],
        }
        for i, (context, question, answer) in enumerate(zip(*columns.values(), strict=True))
    ]
    document = {"version": "1.1", "data": [{"title": "t", "paragraphs": paragraphs}]}
    return written(folder, "data.json", json.dumps(document))


class Case(NamedTuple):
    """A file, the task it is for, the reason that is told, and what is read of it."""

    write: Callable[[Path], dict[str, Any]]
    task: str
    reason: str
    columns: tuple[str, ...]
    form: str = ""


CASES = {
    # Plain text
    ".txt": Case(
        lambda folder: written(folder, "data.txt", "\n".join(said(1))),
        GENERATION,
        "a file of plain text",
        ("text",),
        "text",
    ),
    ".txt with commas": Case(
        lambda folder: written(folder, "data.txt", "\n".join(f"{t}, and {t}" for t in said(1))),
        GENERATION,
        "a file of plain text",
        ("text",),
        "text",
    ),
    # Pairs of texts
    "two aligned files": Case(
        aligned, TRANSLATION, "two line-aligned files", ("source", "target"), "pair"
    ),
    "en,de": Case(
        lambda folder: table(folder, en=said(1), de=said(2)),
        TRANSLATION,
        "columns 'en' and 'de'",
        ("en", "de"),
    ),
    "id,de_DE,fr": Case(
        lambda folder: table(folder, id=range(NUM_ROWS), de_DE=said(1), fr=said(2)),
        TRANSLATION,
        "columns 'de_DE' and 'fr'",
        ("de_DE", "fr"),
    ),
    "id,en": Case(
        lambda folder: table(folder, id=range(NUM_ROWS), en=said(2)),
        GENERATION,
        "the only one of text",
        ("en",),
    ),
    "id,en of Indonesian": Case(
        lambda folder: table(folder, id=said(1), en=said(2)),
        TRANSLATION,
        "columns 'id' and 'en'",
        ("id", "en"),
    ),
    "English,German": Case(
        lambda folder: lines(folder, English=said(1), German=said(2)),
        TRANSLATION,
        "columns 'English' and 'German'",
        ("English", "German"),
    ),
    "target,source": Case(
        lambda folder: table(folder, target=said(1), source=said(2)),
        TRANSLATION,
        "columns 'source' and 'target'",
        ("source", "target"),
    ),
    "word,pronunciation": Case(
        lambda folder: table(
            folder,
            word=[f"word{'abcdefghij'[i % 10]}{'klmnop'[i // 10]}" for i in range(NUM_ROWS)],
            pronunciation=[f"W ER D {'ABCDEFGHIJ'[i % 10]} {i // 10}" for i in range(NUM_ROWS)],
        ),
        TRANSLATION,
        "columns 'word' and 'pronunciation'",
        ("word", "pronunciation"),
    ),
    "two columns of free text": Case(
        lambda folder: table(folder, before=said(1), after=said(2)),
        TRANSLATION,
        "two columns of text, and no column of few values",
        ("before", "after"),
    ),
    # Questions
    "context,question,answer": Case(
        lambda folder: table(folder, **questions()),
        ANSWERING,
        "columns 'context', 'question', 'answer'",
        ("context", "question", "answer"),
    ),
    "SQuAD": Case(
        squad, ANSWERING, "questions in the layout of SQuAD", ("context", "question", "answers")
    ),
    "context,question,answer in other words": Case(
        lambda folder: table(folder, **{**questions(), "answer": said(3)}),
        GENERATION,
        "by its name",
        ("context", "question", "answer"),
        "question",
    ),
    # Labels
    "text,label": Case(
        lambda folder: table(folder, text=said(1), label=drawn(["good", "bad"])),
        CLASSIFICATION,
        "the column 'label' holds labels",
        ("text",),
    ),
    "premise,hypothesis,label": Case(
        lambda folder: table(
            folder, premise=said(1), hypothesis=said(2), label=drawn(["yes", "no", "maybe"])
        ),
        CLASSIFICATION,
        "the column 'label' holds labels",
        ("premise", "hypothesis"),
    ),
    "sentence,stars": Case(
        lambda folder: table(folder, sentence=said(1), stars=drawn([1, 2, 3, 4, 5])),
        CLASSIFICATION,
        "the column 'stars' holds labels",
        ("sentence",),
    ),
    "question,context,answer of yes and no": Case(
        lambda folder: table(
            folder, question=said(1), context=said(2), answer=drawn(["yes", "no"])
        ),
        CLASSIFICATION,
        "the column 'answer' holds labels",
        ("question", "context"),
    ),
    # Texts to continue
    "prompt,response": Case(
        lambda folder: table(folder, prompt=said(1), response=said(2)),
        GENERATION,
        "'prompt' and 'response'",
        ("prompt", "response"),
        "pair",
    ),
    "instruction,output": Case(
        lambda folder: lines(folder, instruction=said(1), output=said(2)),
        GENERATION,
        "'instruction' and 'output'",
        ("instruction", "output"),
        "pair",
    ),
    "instruction,input,output": Case(
        lambda folder: lines(
            folder,
            instruction=said(1),
            input=[text if i % 3 else "" for i, text in enumerate(said(2))],
            output=said(3),
        ),
        GENERATION,
        "'instruction', 'input' and 'output'",
        ("instruction", "input", "output"),
        "instruction",
    ),
    "question,answer": Case(
        lambda folder: table(folder, question=said(1), answer=said(2)),
        GENERATION,
        "'question' and 'answer'",
        ("question", "answer"),
        "pair",
    ),
    "messages": Case(
        lambda folder: lines(folder, messages=chats(as_text=False)),
        GENERATION,
        "by its name",
        ("messages",),
        "messages",
    ),
    "messages in a table": Case(
        lambda folder: table(folder, id=range(NUM_ROWS), messages=chats(as_text=True)),
        GENERATION,
        "by its name",
        ("messages",),
        "messages",
    ),
    "one column of text": Case(
        lambda folder: table(folder, text=said(1)),
        GENERATION,
        "the only one of text",
        ("text",),
        "documents",
    ),
    "one column of text among others": Case(
        lambda folder: lines(
            folder,
            id=[f"a-{i}" for i in range(NUM_ROWS)],
            url=[f"https://example.org/{i}" for i in range(NUM_ROWS)],
            body=said(1),
        ),
        GENERATION,
        "the only one of text",
        ("body",),
        "documents",
    ),
}


def opened(settings: dict[str, Any]) -> tuple[Sources, Recorder]:
    observer = Recorder()
    return open_sources(build_config(overrides=settings), observer), observer


@pytest.mark.parametrize("name", CASES)
def test_a_file_says_what_it_is_for(name: str, tmp_path: Path):
    case = CASES[name]
    if case.task not in TASKS:
        pytest.skip(f"there is no {case.task} yet")
    sources, observer = opened(case.write(tmp_path))
    assert sources.task.name == case.task
    (told,) = [note for note in observer.notes if note.startswith("task: ")]
    assert told.startswith(f"task: {case.task} ({case.reason}") and told.endswith(")")
    assert sources.reading.columns[: len(case.columns)] == case.columns
    if case.form:
        assert sources.reading.form == case.form
    notes = [note for note in observer.notes if note != told]
    # Each column that is read is named with a reason, where there are columns to choose from.
    if case.form != "text":
        for column in case.columns:
            quoted = f"'{column}'"
            assert any("column" in note and quoted in note for note in notes), notes
    assert len(sources.corpora["train"]) > 0 and not sources.rejected


# What a person says counts for more than what a file looks like

OVERRIDDEN = {
    # the task asked for, and what is read then
    ("en,de", GENERATION, "--text-column en"): ("documents", ("en",)),
    ("prompt,response", TRANSLATION, ""): ("pair", ("prompt", "response")),
    ("text,label", GENERATION, ""): ("documents", ("text",)),
    ("premise,hypothesis,label", TRANSLATION, ""): ("pair", ("premise", "hypothesis")),
    ("sentence,stars", GENERATION, ""): ("documents", ("sentence",)),
    ("two aligned files", GENERATION, ""): None,
    ("two aligned files", CLASSIFICATION, ""): None,
}
FLAGS = {
    "--text-column": "data.text_columns",
    "--source": "data.source",
    "--target": "data.target",
    "--label-column": "data.label_column",
}


@pytest.mark.parametrize(("name", "task", "flags"), OVERRIDDEN)
def test_a_task_that_is_asked_for_is_taken(name: str, task: str, flags: str, tmp_path: Path):
    settings = {**CASES[name].write(tmp_path), "task": task}
    words = flags.split()
    settings |= {FLAGS[flag]: value for flag, value in zip(words[::2], words[1::2], strict=True)}
    expected = OVERRIDDEN[name, task, flags]
    if expected is None:
        with pytest.raises(HastenError):
            opened(settings)
        return
    sources, observer = opened(settings)
    assert f"task: {task} (as asked for)" in observer.notes
    assert (sources.reading.form, sources.reading.columns) == expected


@pytest.mark.parametrize(
    ("name", "flags", "task", "columns"),
    [
        ("text,label", "--source text --target label", TRANSLATION, ("text", "label")),
        ("prompt,response", "--source response", TRANSLATION, ("response", "prompt")),
        ("prompt,response", "--target prompt", TRANSLATION, ("response", "prompt")),
        ("en,de", "--label-column de", CLASSIFICATION, None),
        ("sentence,stars", "--label-column 2", CLASSIFICATION, ("sentence",)),
        ("id,de_DE,fr", "--source fr --target de_DE", TRANSLATION, ("fr", "de_DE")),
    ],
)
def test_named_columns_say_it_too(
    name: str, flags: str, task: str, columns: tuple[str, ...] | None, tmp_path: Path
):
    words = flags.split()
    named = {FLAGS[flag]: value for flag, value in zip(words[::2], words[1::2], strict=True)}
    settings = {**CASES[name].write(tmp_path), **named}
    if columns is None:  # each of its values is another: no label
        with pytest.raises(DataError, match=r"--label-column"):
            opened(settings)
        return
    sources, observer = opened(settings)
    assert sources.task.name == task and sources.reading.columns == columns
    (told,) = [note for note in observer.notes if note.startswith("task: ")]
    assert flags.split()[0] in told


def test_an_unknown_task_is_refused_with_the_nearest(tmp_path: Path):
    settings = CASES[".txt"].write(tmp_path)
    with pytest.raises(UsageError, match=r"'text-generator'.*Did you mean 'text-generation'\?"):
        opened({**settings, "task": "text-generator"})


def test_a_file_for_no_task_says_what_it_lacks(tmp_path: Path):
    settings = table(tmp_path, x=range(NUM_ROWS), y=[i / 7 for i in range(NUM_ROWS)])
    with pytest.raises(DataError, match=r"data\.csv: no column looks like the text"):
        opened(settings)


def test_several_columns_of_text_and_no_label_have_to_be_named(tmp_path: Path):
    settings = table(tmp_path, a=said(1), b=said(2), c=said(3))
    with pytest.raises(DataError, match=r"data\.csv: "):
        opened(settings)
    sources, _ = opened({**settings, "task": TRANSLATION, "data.source": "c", "data.target": "a"})
    assert sources.reading.columns == ("c", "a")
    with pytest.raises(DataError, match=r"--source and --target"):
        opened({**settings, "task": TRANSLATION})
    with pytest.raises(DataError, match=r"--text-column"):
        opened({**settings, "task": GENERATION})
    sources, _ = opened({**settings, "task": GENERATION, "data.text_columns": "b"})
    assert sources.reading.columns == ("b",)
    sources, _ = opened({**settings, "task": GENERATION, "data.text_columns": "b,c"})
    assert (sources.reading.form, sources.reading.columns) == ("pair", ("b", "c"))


@pytest.mark.parametrize("name", CASES)
def test_a_second_look_gives_the_same(name: str, tmp_path: Path):
    """Of a file seen before only the cache is read, and a run is resumed with what is settled."""
    case = CASES[name]
    if case.task not in TASKS:
        pytest.skip(f"there is no {case.task} yet")
    settings = case.write(tmp_path)
    (first, _), (second, _) = opened(settings), opened(settings)
    assert first.reading.columns == second.reading.columns
    for split, rows in first.rows.items():
        assert rows.tolist() == second.rows[split].tolist()
        corpora = [s.corpora.get(split, s.corpora["train"]) for s in (first, second)]
        assert list(corpora[0].texts(rows[:3])) == list(corpora[1].texts(rows[:3]))
    named = sources_again(settings, first)
    assert named.task is first.task and named.reading.columns == first.reading.columns


def sources_again(settings: dict[str, Any], found: Sources) -> Sources:
    """The sources of a configuration in which the task is settled, as resuming has it."""
    return opened({**settings, "task": found.task.name})[0]
