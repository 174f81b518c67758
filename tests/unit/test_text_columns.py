"""Columns of texts to continue: how instructions and inputs are joined, and what is told of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import write_rows
from hasten.data.columns import CellError
from hasten.data.rows import open_rows
from hasten.task.contract import WantedColumns
from hasten.task.text_columns import FORMS
from hasten.task.text_generation import TextGeneration
from hasten.training.sources import sample_rows

NAMES = ("instruction", "input", "output")
JOINED = "prompt: the instruction and, where there is one, a blank line and the input"


@given(st.text(), st.text(), st.text().filter(str.strip))
def test_an_instruction_is_joined_to_its_input(instruction: str, given_text: str, output: str):
    """What a row is read as is what a row to predict is joined to."""
    form = FORMS["instruction"]
    if not instruction.strip():
        with pytest.raises(CellError, match="the instruction is empty"):
            form.read_row((instruction, given_text, output))
        return
    texts = form.read_row((instruction, given_text, output))
    first, second = instruction.strip(), given_text.strip()
    assert texts == (f"{first}\n\n{second}" if second else first, output.strip())
    assert form.join(instruction, given_text) == texts[0]
    if not second:
        assert form.join(instruction) == form.read_row((instruction, None, output))[0] == first


@given(st.text().filter(str.strip), st.text().filter(str.strip))
def test_pairs_and_questions_are_read_as_they_are_predicted(first: str, second: str):
    pair, question = FORMS["pair"], FORMS["question"]
    assert pair.join(first) == pair.read_row((first, second))[0] == first.strip()
    joined = f"{second.strip()}\n{first.strip()}"
    assert question.join(first, second) == question.read_row((first, second, "x"))[0] == joined


@pytest.mark.parametrize("bad", [["a"], {"a": "b"}])
def test_an_input_that_is_no_text_is_refused(bad: Any):
    with pytest.raises(CellError, match="the input is a JSON"):
        FORMS["instruction"].read_row(("do it", bad, "done"))


@pytest.mark.parametrize(
    ("names", "wanted", "form", "columns", "told"),
    [
        (NAMES, {}, "instruction", NAMES, JOINED),
        (NAMES[::-1], {}, "instruction", NAMES, JOINED),
        (("id", "Instruction", "context", "Response"), {}, "instruction",
         ("Instruction", "context", "Response"), JOINED),
        (NAMES, {"text": NAMES[:2], "label": "output"}, "instruction", NAMES, JOINED),
        (NAMES, {"text": ("1", "2", "3")}, "instruction", NAMES, JOINED),
        # Named in another order they are what three named columns always are.
        (NAMES, {"text": ("input", "instruction", "output")}, "question",
         ("input", "instruction", "output"), "context column 'input': as asked for"),
        (NAMES, {"source": "instruction", "target": "output"}, "pair",
         ("instruction", "output"), "prompt column 'instruction': as asked for"),
        (("instruction", "output"), {}, "pair", ("instruction", "output"),
         "response column 'output': 'instruction' and 'output'"),
        (("prompt", "input", "response"), {}, "pair", ("prompt", "response"),
         "prompt column 'prompt': 'prompt' and 'response'"),
        (("question", "context", "answer"), {}, "question", ("context", "question", "answer"),
         "context column 'context': by its name"),
    ],
)  # fmt: skip
def test_which_columns_are_read_and_what_is_told(
    names: tuple[str, ...],
    wanted: dict[str, Any],
    form: str,
    columns: tuple[str, ...],
    told: str,
    tmp_path: Path,
):
    rows = [tuple(f"{name} {i}, some words" for name in names) for i in range(20)]
    file = open_rows(write_rows(tmp_path / "t.csv", rows, names))
    reading, reasons = TextGeneration.choose_reading(
        file, sample_rows(file), WantedColumns(**wanted)
    )
    assert (reading.form, reading.columns) == (form, columns)
    assert told in reasons
    assert (JOINED in reasons) == (form == "instruction")
