"""Chats: what is read of them, why one is refused, and which of their tokens are learned."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.data.columns import CellError
from hasten.data.messages import learned_turns, messages_of, read_messages
from hasten.data.tokenizer import train_tokenizer
from hasten.data.tokens import EncodingFormat, encode_texts

ROLES = st.sampled_from(["system", "user", "assistant", "tool"])
CONTENTS = st.text(min_size=1).filter(str.strip).map(str.strip)
CHATS = st.lists(st.tuples(ROLES, CONTENTS), min_size=1, max_size=6).filter(
    lambda turns: "assistant" in [role for role, _ in turns]
)


def chat(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


@given(CHATS, st.booleans())
def test_what_is_written_is_read_back(turns, as_text: bool):
    cell: Any = chat(*turns)
    cell = json.dumps(cell) if as_text else cell  # as a cell of a CSV file, or of JSON lines
    (text,) = messages_of([cell])
    assert read_messages(text) == tuple(part for turn in turns for part in turn)


def test_white_space_around_a_content_and_other_keys_are_left_aside():
    message = {"role": "assistant", "content": " yes,\n or no\n", "name": "x", "weight": 1}
    assert read_messages(messages_of([[message]])[0]) == ("assistant", "yes,\n or no")


YES = {"role": "assistant", "content": "yes"}


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        (None, "the messages are not a list of at least one"),
        ([], "the messages are not a list of at least one"),
        ("", "the messages are not JSON"),
        ("hello", "the messages are not JSON"),
        ('{"role": "user"}', "the messages are not a list of at least one"),
        (7, "the messages are not a list of at least one"),
        ([YES, "hi"], "a message is not a JSON object"),
        ([YES, {"content": "hi"}], "a message lacks a role or a content"),
        ([YES, {"role": "user"}], "a message lacks a role or a content"),
        ([YES, {"role": "user", "content": None}], "a message lacks a role or a content"),
        (
            [YES, {"role": "user", "content": [{"type": "text", "text": "hi"}]}],
            "a message lacks a role or a content",
        ),
        (
            [YES, {"role": "user", "content": " \n"}],
            "the content of a message of the user is empty",
        ),
        (chat(("system", "x"), ("user", "hi")), "no message is the assistant's"),
        # What is said does not make an answer of it.
        (chat(("user", "assistant")), "no message is the assistant's"),
    ],
)
def test_why_a_chat_is_refused(cell: Any, reason: str):
    with pytest.raises(CellError) as refused:
        messages_of([cell])
    assert str(refused.value) == reason


@given(CHATS)
def test_only_what_the_assistant_says_is_learned(turns):
    parts = [part for turn in turns for part in turn]
    expected = [0] * len(parts)
    for number, (role, _) in enumerate(turns):
        expected[2 * number + 1] = int(role == "assistant")
    assert learned_turns(parts) == expected


def test_the_tokens_of_a_chat_by_hand():
    said = ["system", "b c", "user", "d e", "assistant", "f g h", "user", "i", "assistant", "j"]
    tokenizer = train_tokenizer(said * 2, kind="word", vocab_size=50)
    form = EncodingFormat(
        max_length=0, class_token=True, separate_segments=True, end_token=True, messages=True
    )
    row = messages_of([chat(*zip(said[::2], said[1::2], strict=True))])
    (found,) = encode_texts(tokenizer, [row], form)
    tokens = [tokenizer.id_to_token(i) for i in found.token_ids]
    asked = "[CLS] system [SEP] b c [SEP] user [SEP] d e [SEP] assistant [SEP]"
    parts = [(asked, 0), ("f g h [SEP]", 1), ("user [SEP] i [SEP] assistant [SEP]", 0)]
    parts.append(("j [SEP]", 1))
    expected = [(token, kind) for text, kind in parts for token in text.split()]
    assert list(zip(tokens, found.token_types, strict=True)) == expected
