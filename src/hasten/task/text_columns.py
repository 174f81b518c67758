"""Which columns hold texts to continue: documents, prompts, questions, instructions, or chats."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from hasten.core.errors import UsageError
from hasten.data.columns import CellError, free_text_columns, resolve_columns, text_of
from hasten.data.messages import messages_of
from hasten.data.rows import Cell, Row, RowFile
from hasten.task.contract import Certainty, Recognised, WantedColumns

_PROMPTS = (
    ("prompt", "response"),
    ("prompt", "completion"),
    ("prompt", "answer"),
    ("prompt", "output"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("instruction", "completion"),
    ("question", "answer"),
    ("question", "response"),
)
_INPUTS = ("input", "context")
"""What an instruction is to be carried out on; empty in many rows."""
_QUESTIONS = (
    ("context", "passage", "paragraph", "document"),
    ("question", "query"),
    ("answer", "answers", "answer_text"),
)
_CHATS = ("messages", "conversation", "conversations", "chat")


def _exact_text(cells: Sequence[Cell]) -> tuple[str, ...]:
    (cell,) = cells
    if not isinstance(cell, str) or not cell:
        raise CellError("the text is empty")
    return (cell,)


def _texts(cells: Sequence[Cell], roles: tuple[str, ...]) -> tuple[str, ...]:
    texts = []
    for role, cell in zip(roles, cells, strict=True):
        try:
            texts.append(text_of(cell))
        except CellError as error:
            raise CellError(str(error).replace("the text", f"the {role}")) from None
    return tuple(texts)


def join_question(context: str, question: str) -> str:
    """Returns the prompt that asks a question about a context."""
    return f"{question.strip()}\n{context.strip()}"


def join_instruction(instruction: str, given: str = "") -> str:
    """Returns the prompt of an instruction and what it is to be carried out on, if anything."""
    return "\n\n".join(filter(None, (instruction.strip(), given.strip())))


def _question(cells: Sequence[Cell]) -> tuple[str, ...]:
    context, question, answer = cells
    if isinstance(answer, list):  # as in SQuAD: several ways to say it
        first = answer[0] if answer else None
        answer = first.get("text") if isinstance(first, dict) else first
    roles = ("context", "question", "answer")
    context, question, answer = _texts((context, question, answer), roles)
    return (join_question(context, question), answer)


def _instruction(cells: Sequence[Cell]) -> tuple[str, ...]:
    instruction, given, output = cells
    instruction, output = _texts((instruction, output), ("instruction", "output"))
    is_blank = given is None or (isinstance(given, str) and not given.strip())
    given = "" if is_blank else _texts((given,), ("input",))[0]
    return (join_instruction(instruction, given), output)


@dataclass(frozen=True)
class Form:
    """One way of reading texts.

    Attributes:
        roles: what each column is; of several the last is what is generated.
        read_row: the cells of these columns -> texts.
        join: the texts of all columns but the last -> the prompt.
        num_optional: how many of the texts that ``join`` takes may be left out, the last ones.
        note: how columns become a prompt, where that is to be told.
    """

    roles: tuple[str, ...]
    read_row: Callable[[Sequence[Cell]], tuple[str, ...]]
    join: Callable[..., str] = str
    num_optional: int = 0
    note: str | None = None

    def describe(self, columns: Sequence[str], reason: str) -> tuple[str, ...]:
        """Returns what is read, to be printed: one line a column, and the note."""
        lines = [
            f"{role} column '{name}': {reason}"
            for role, name in zip(self.roles, columns, strict=True)
        ]
        return (*lines, *([] if self.note is None else [self.note]))


FORMS = {
    "text": Form(("text",), _exact_text),
    "documents": Form(("text",), partial(_texts, roles=("text",))),
    "pair": Form(("prompt", "response"), partial(_texts, roles=("prompt", "response")), str.strip),
    "question": Form(("context", "question", "answer"), _question, join_question),
    "instruction": Form(
        ("instruction", "input", "output"),
        _instruction,
        join_instruction,
        num_optional=1,
        note="prompt: the instruction and, where there is one, a blank line and the input",
    ),
    "messages": Form(("messages",), messages_of),
}


@dataclass(frozen=True)
class FoundForm:
    """A guess at how a file is to be read.

    Attributes:
        form: a key of ``FORMS``.
        columns: their names.
        recognised: how sure it is.
    """

    form: str
    columns: tuple[str, ...]
    recognised: Recognised

    @property
    def reasons(self) -> tuple[str, ...]:
        """Lines to be printed."""
        return FORMS[self.form].describe(self.columns, self.recognised.reason)


def guess_form(file: RowFile, sample: Sequence[Row]) -> FoundForm | None:
    """Returns how a file of texts looks to be meant, or None where it does not look like one."""
    by_name = {name.strip().lower(): name for name in file.columns}
    for name in _CHATS:
        if name in by_name:
            reason = Recognised(Certainty.NAMES, "by its name")
            return FoundForm("messages", (by_name[name],), reason)
    asked = [next((by_name[n] for n in names if n in by_name), None) for names in _QUESTIONS]
    if all(asked):
        # Less sure than extractive question answering, which has the same columns.
        reason = Recognised(Certainty.GUESS, "by its name")
        return FoundForm("question", tuple(name for name in asked if name), reason)
    for prompt, response in _PROMPTS:
        if prompt in by_name and response in by_name:
            given = next((name for name in _INPUTS if name in by_name), None)
            if prompt == "instruction" and given is not None:
                reason = Recognised(Certainty.NAMES, f"'{prompt}', '{given}' and '{response}'")
                columns = (by_name[prompt], by_name[given], by_name[response])
                return FoundForm("instruction", columns, reason)
            # Questions and answers are as often something else.
            sure = Certainty.GUESS if prompt == "question" else Certainty.NAMES
            columns = (by_name[prompt], by_name[response])
            return FoundForm("pair", columns, Recognised(sure, f"'{prompt}' and '{response}'"))
    texts = free_text_columns(sample, file.columns)
    if len(texts) == 1:
        return FoundForm("documents", texts, Recognised(Certainty.GUESS, "the only one of text"))
    return None


def named_columns(file: RowFile, wanted: WantedColumns) -> tuple[str, ...] | None:
    """Returns the columns that a person named.

    These are one of texts or chats; prompts and responses; contexts, questions and answers; or
    instructions, inputs and outputs.

    Raises:
        UsageError: a column that is not there.
    """
    names = wanted.text or tuple(n for n in (wanted.source, wanted.target) if n is not None)
    if wanted.label is not None:
        names = (*names, wanted.label)
    if not names:
        return None
    if len(names) > 3:
        raise UsageError("text generation reads at most three columns.")
    return tuple(file.columns[i] for i in resolve_columns(file.columns, names))
