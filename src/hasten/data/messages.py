"""Chats: lists of messages, each with a role and a content, as chat models are trained on.

[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from hasten.data.columns import CellError
from hasten.data.rows import Cell

LEARNED_ROLE = "assistant"
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}


def messages_of(cells: Sequence[Cell]) -> tuple[str, ...]:
    """Returns a cell's chat as compact JSON: role, content, role, content ...

    Raises:
        CellError: it is not a list of messages, a content is empty, or nobody answers.
    """
    turns = _turns(_listed(cells[0]))
    if LEARNED_ROLE not in turns[::2]:
        raise CellError(f"no message is the {LEARNED_ROLE}'s")
    return (json.dumps(turns, ensure_ascii=False),)


def asked_messages(cell: Cell) -> tuple[str, ...]:
    """Returns role, content, role, content ... of a chat in which the assistant has the word.

    A last message of the assistant's is left out: another one is wanted in its place.

    Args:
        cell: a list of messages, also as JSON; or a text, which is the user's.

    Raises:
        CellError: there is nothing to answer, or a message cannot be used.
    """
    if isinstance(cell, str) and not _is_chat(cell):
        return ("user", cell.strip())
    messages = _listed(cell)
    if isinstance(messages[-1], dict) and _role_of(messages[-1]) == LEARNED_ROLE:
        messages = messages[:-1]
    if not messages:
        raise CellError(f"there is no message before the {LEARNED_ROLE}'s")
    return tuple(_turns(messages))


def _is_chat(text: str) -> bool:
    try:
        found = json.loads(text)
    except ValueError:
        return False
    is_list = isinstance(found, list) and len(found) > 0
    return is_list and all(isinstance(m, dict) and _role_of(m) is not None for m in found)


def _listed(cell: Cell) -> list[Any]:
    if isinstance(cell, str):
        try:
            cell = json.loads(cell)
        except ValueError:
            raise CellError("the messages are not JSON") from None
    if not isinstance(cell, list) or not cell:
        raise CellError("the messages are not a list of at least one")
    return cell


def _turns(messages: Sequence[Any]) -> list[str]:
    turns: list[str] = []
    for message in messages:
        if not isinstance(message, dict):
            raise CellError("a message is not a JSON object")
        role = _role_of(message)
        content = message.get("content", message.get("value"))  # the second as ShareGPT names it
        if role is None or not isinstance(content, str):
            raise CellError("a message lacks a role or a content")
        if not content.strip():
            raise CellError(f"the content of a message of the {role} is empty")
        turns += [role, content.strip()]
    return turns


def _role_of(message: Mapping[str, Any]) -> str | None:
    role = message.get("role", message.get("from"))
    return _ROLES.get(role, role) if isinstance(role, str) else None


def read_messages(text: str) -> tuple[str, ...]:
    """Returns role, content, role, content ... of a chat as ``messages_of`` writes it."""
    return tuple(json.loads(text))


def learned_turns(turns: Sequence[str]) -> list[int]:
    """Returns 1 for each text that is learned, the assistant's contents, and 0 for all others."""
    return [int(i % 2 == 1 and turns[i - 1] == LEARNED_ROLE) for i in range(len(turns))]
