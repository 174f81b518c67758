"""The tasks by name."""

from __future__ import annotations

from hasten.task.text_classification import TextClassification

TASKS = {TextClassification.name: TextClassification}
