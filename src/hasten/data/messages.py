"""Chats: lists of messages, each with a role and a content, as chat models are trained on.

[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from hasten.data.columns import CellError
from hasten.data.rows import Cell

LEARNED_ROLE = "assistant"
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}


def messages_of(cells: Sequence[Cell]) -> tuple[str, ...]:
    """Returns a cell's chat as compact JSON: role, content, role, content ...

    Raises:
        CellError: it is not a list of messages, a content is empty, or nobody answers.
    """
    (cell,) = cells
    if isinstance(cell, str):
        try:
            cell = json.loads(cell)
        except ValueError:
            raise CellError("the messages are not JSON") from None
    if not isinstance(cell, list) or not cell:
        raise CellError("the messages are not a list of at least one")
    turns: list[str] = []
    for message in cell:
        if not isinstance(message, dict):
            raise CellError("a message is not a JSON object")
        role = message.get("role", message.get("from"))  # the second as ShareGPT names it
        content = message.get("content", message.get("value"))
        role = _ROLES.get(role, role) if isinstance(role, str) else None
        if not isinstance(role, str) or not isinstance(content, str):
            raise CellError("a message lacks a role or a content")
        if not content.strip():
            raise CellError(f"the content of a message of the {role} is empty")
        turns += [role, content.strip()]
    if LEARNED_ROLE not in turns[::2]:
        raise CellError(f"no message is the {LEARNED_ROLE}'s")
    return (json.dumps(turns, ensure_ascii=False),)


def read_messages(text: str) -> tuple[str, ...]:
    """Returns role, content, role, content ... of a chat as ``messages_of`` writes it."""
    return tuple(json.loads(text))


def learned_turns(turns: Sequence[str]) -> list[int]:
    """Returns 1 for each text that is learned, the assistant's contents, and 0 for all others."""
    return [int(i % 2 == 1 and turns[i - 1] == LEARNED_ROLE) for i in range(len(turns))]
