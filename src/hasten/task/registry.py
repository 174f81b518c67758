"""The tasks by name, in the order in which they are tried on a file of unknown purpose."""

from __future__ import annotations

from hasten.core.errors import UsageError, nearest
from hasten.task.contract import Task
from hasten.task.question_answering import QuestionAnswering
from hasten.task.text_classification import TextClassification
from hasten.task.text_generation import TextGeneration
from hasten.task.translation import Translation

_ALL = (TextClassification, TextGeneration, Translation, QuestionAnswering)

TASKS: dict[str, type[Task]] = {task.name: task for task in _ALL}


def task_named(name: str) -> type[Task]:
    """Returns the task of a name.

    Raises:
        UsageError: there is none, naming the nearest.
    """
    if name not in TASKS:
        raise UsageError(
            f"unknown task '{name}'; there are {', '.join(TASKS)}.{nearest(name, TASKS)}"
        )
    return TASKS[name]
