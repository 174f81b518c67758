"""Windows over contexts: every answer that fits is whole in one, and its tokens lead back to it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, processors

from hasten.core.batch import PackedBatch
from hasten.data import windows as windows_module
from hasten.data.corpus import Corpus, open_corpus
from hasten.data.rows import open_rows
from hasten.data.spans import Answer, answers_from_json, answers_to_json, cover_text, token_span
from hasten.data.template import Template
from hasten.data.tokenizer import KINDS, train_tokenizer
from hasten.data.windows import (
    Passage,
    Passages,
    WindowForm,
    Windows,
    encode_passages,
    open_passages,
)
from hasten.task.question_answering import QuestionAnswering

# Composed and decomposed accents, marks out of their canonical order, Korean syllables in parts,
# emoji of several code points, scripts without spaces, and what looks like a special token.
PIECES = [
    *(
        "the",
        "river",
        " ",
        " ",
        "\n",
        ", ",
        "3.14",
        "-",
        "Zürich",
        "cafe\u0301",
        "e\u0301",
        "\u00e9",
    ),
    *("a\u0323\u0302", "a\u0302\u0323", "q\u0307\u0323", "\u1100\u1161", "\u1100\u1161\u11a8"),
    *(
        "👍🏽",
        "👩\u200d🚀",
        "中",
        "华人民",
        "的",
        "、",
        "東京です",
        "各",
        "ไทย",
        "אב",
        "[SEP]",
        "\u00a0",
        "ﬁ",
    ),
]
TEXT = st.lists(st.sampled_from(PIECES), min_size=1, max_size=60).map("".join)
CORPUS = ["".join(PIECES), " ".join(PIECES), "the river in Zürich, the café 中华人民的 3.14"] * 4


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Tokenizer]:
    return {
        kind: train_tokenizer(CORPUS, kind=kind, vocab_size=420, split_han=True) for kind in KINDS
    }


@st.composite
def passages_with_answers(draw: st.DrawFn) -> Passage:
    context = draw(TEXT.filter(str.strip))
    start = draw(st.integers(0, len(context) - 1))
    piece = context[start : start + draw(st.integers(1, 12))]
    assume(piece.strip())
    start += len(piece) - len(piece.lstrip())
    return Passage(context, draw(TEXT.filter(str.strip)), (start, start + len(piece.strip())))


TEMPLATES = (
    Template((2,), (3,), (3,), numbers_segments=True),  # BERT
    Template((0,), (2, 2), (2,)),  # RoBERTa
)
OWN_FORMS = st.builds(WindowForm, st.integers(8, 48), st.integers(1, 40), st.booleans())
FORMS = OWN_FORMS | st.builds(
    WindowForm,
    st.integers(8, 48),
    st.integers(1, 40),
    st.just(value=False),
    st.sampled_from(TEMPLATES),
)


@settings(max_examples=400)
@given(
    passages=st.lists(passages_with_answers(), min_size=1, max_size=3),
    form=FORMS,
    kind=st.sampled_from(KINDS),
)
def test_an_answer_that_fits_is_whole_in_a_window_and_its_tokens_lead_back_to_it(
    passages: list[Passage], form: WindowForm, kind: str, tokenizers: dict[str, Tokenizer]
):
    tokenizer = tokenizers[kind]
    encoded = encode_passages(tokenizer, passages, form)
    windows = Windows.over(encoded, np.arange(len(passages)), form, tokenizer)
    held = [False] * len(passages)
    for window, (first, last) in enumerate(windows.targets.tolist()):
        passage = passages[windows.questions[window]]
        assert passage.answer is not None
        begin = int(windows.context_starts[window])
        if (first, last) == (0, 0):
            continue
        held[windows.questions[window]] = True
        assert begin <= first <= last < windows.context_ends[window]
        start, end = windows.characters(window, first, last)
        # All of the answer, and no token that has no part in it.
        assert start <= passage.answer[0] and passage.answer[1] <= end
        assert windows.characters(window, first, first)[1] > passage.answer[0]
        assert windows.characters(window, last, last)[0] < passage.answer[1]
    for number in range(len(passages)):
        first, last = encoded.answers[number].tolist()
        assert 0 <= first <= last < encoded.num_context_tokens[number]
        room = form.room(int(encoded.num_question_tokens[number]))
        if last - first + 1 <= min(form.overlap, room // 2) + 1:
            assert held[number]


@settings(max_examples=200)
@given(passage=passages_with_answers(), kind=st.sampled_from(["char", "byte"]))
def test_where_a_token_is_a_character_the_answer_is_found_to_the_letter(
    passage: Passage, kind: str, tokenizers: dict[str, Tokenizer]
):
    assume("[SEP]" not in passage.context and not set(passage.context) & set(COMBINING))
    form = WindowForm(4000, 1)
    encoded = encode_passages(tokenizers[kind], [passage], form)
    windows = Windows.over(encoded, np.array([0]), form, tokenizers[kind])
    assert windows.characters(0, *windows.targets[0].tolist()) == passage.answer


COMBINING = "\u0301\u0302\u0307\u0323\u1161\u11a8"


@settings(max_examples=300)
@given(text=TEXT, kind=st.sampled_from(KINDS))
def test_every_character_but_white_space_belongs_to_a_token(
    text: str, kind: str, tokenizers: dict[str, Tokenizer]
):
    encoding = tokenizers[kind].encode(text, add_special_tokens=False)
    places = cover_text(np.array(encoding.offsets).reshape(-1, 2), text)
    held = {i for start, end in places.tolist() for i in range(start, end)}
    assert all(i in held or character.isspace() for i, character in enumerate(text))
    assert (np.diff(places[:, 0]) >= 0).all() and (places[:, 1] <= len(text)).all()


def test_offsets_by_hand(tokenizers: dict[str, Tokenizer]):
    text = "cafe\u0301 \u1100\u1161"
    encoding = tokenizers["char"].encode(text)
    assert encoding.offsets == [(0, 1), (1, 2), (2, 3), (3, 4), (5, 6), (6, 7)]
    places = cover_text(np.array(encoding.offsets), text)
    assert places.tolist() == [[0, 1], [1, 2], [2, 3], [3, 5], [5, 6], [6, 8]]
    assert token_span(places, 0, 5) == (0, 3) and token_span(places, 7, 8) == (5, 5)
    # White space between words belongs to no token, and the text is not changed.
    words = np.array([(0, 3), (4, 7)])
    assert cover_text(words, "one two").tolist() == words.tolist()
    assert cover_text(np.empty((0, 2), dtype=np.int64), "one").tolist() == []


@settings(max_examples=100)
@given(
    texts=st.lists(
        st.tuples(TEXT.filter(str.strip), TEXT.filter(str.strip)), min_size=1, max_size=4
    ),
    form=OWN_FORMS,
    kind=st.sampled_from(["bpe", "wordpiece"]),
    seed=st.integers(0, 9),
)
def test_a_packed_window_is_class_token_question_separator_and_a_part_of_the_context(
    texts: list[tuple[str, str]],
    form: WindowForm,
    kind: str,
    seed: int,
    tokenizers: dict[str, Tokenizer],
):
    tokenizer = tokenizers[kind]
    encoded = encode_passages(tokenizer, [Passage(*pair) for pair in texts], form)
    draw = np.random.default_rng(seed)
    rows = draw.permutation(len(texts))
    windows = Windows.over(encoded, rows, form, tokenizer)
    order = draw.permutation(len(windows))
    batch = windows.pack(order, weight=3.0)
    cls, sep = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    assert batch.weight == 3.0 and batch.example_ids.tolist() == order.tolist()
    seen: dict[int, set[int]] = {row: set() for row in range(len(texts))}
    for window, ids, types in sequences(batch):
        row = int(rows[windows.questions[window]])
        context, question = (tokenizer.encode(t, add_special_tokens=False).ids for t in texts[row])
        head = [cls, *question[: form.max_length // 2], sep]
        first = int(windows.firsts[window])
        part = context[first : first + form.max_length - len(head)]
        assert ids == head + part and len(ids) <= form.max_length
        assert types == [0] * len(head) + types_of(part, head[1:-1], form.marks_matches)
        assert len(ids) == windows.lengths[window] and len(head) == windows.context_starts[window]
        seen[row] |= set(range(first, first + len(part)))
        assert bool(encoded.is_cut[row]) == (len(question) > form.max_length // 2)
    for row, (context, _) in enumerate(texts):
        assert seen[row] == set(range(len(tokenizer.encode(context).ids)))
    assert batch.targets is not None and not batch.targets[:, :2].any()  # nothing was answered


@settings(max_examples=100)
@given(
    question=TEXT.filter(str.strip),
    context=TEXT.filter(str.strip),
    template=st.sampled_from(TEMPLATES),
)
def test_a_template_stands_around_question_and_context_as_in_the_pretrained_tokenizer(
    question: str, context: str, template: Template, tokenizers: dict[str, Tokenizer]
):
    tokenizer = Tokenizer.from_str(tokenizers["wordpiece"].to_str())
    if template.numbers_segments:
        tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    else:
        tokenizer.post_processor = processors.RobertaProcessing(("[CLS]", 2), ("[PAD]", 0))
    form = WindowForm(4000, 1, marks_matches=False, template=template)
    encoded = encode_passages(tokenizer, [Passage(context, question)], form)
    batch = Windows.over(encoded, np.array([0]), form, tokenizer).pack(np.array([0]))
    wanted = tokenizer.encode(question, context)
    assert batch.token_ids.tolist() == wanted.ids
    if template.numbers_segments:
        assert batch.token_types is not None and batch.token_types.tolist() == wanted.type_ids
    else:
        assert batch.token_types is None
    assert batch.targets is not None
    (first, end) = batch.targets[0, 2:].tolist()
    assert wanted.ids[first:end] == tokenizer.encode(context, add_special_tokens=False).ids


def types_of(context: list[int], question: list[int], marks_matches: bool) -> list[int]:
    """What the types are said to be, in words: 1, or 2 in the question, or 3 with a neighbour."""
    asked = set(itertools.pairwise(question))
    types = []
    for i, token in enumerate(context):
        found = set(itertools.pairwise(context[max(0, i - 1) : i + 2])) & asked
        types.append(3 if found else 2 if token in question else 1)
    return types if marks_matches else [1] * len(context)


def sequences(batch: PackedBatch) -> list[tuple[int, list[int], list[int]]]:
    assert batch.token_types is not None
    lengths = list(batch.layout.lengths)
    parts = zip(
        batch.example_ids.tolist(),
        torch.split(batch.token_ids, lengths),
        torch.split(batch.token_types, lengths),
        strict=True,
    )
    return [(number, ids.tolist(), types.tolist()) for number, ids, types in parts]


def test_targets_by_hand(tokenizers: dict[str, Tokenizer]):
    # 10 tokens in all: class token, 2 of the question, separator, 6 of the context.
    passages = [Passage("abcdefghijkl", "?!", (4, 7)), Passage("abcdefghijkl", "?!", None)]
    form = WindowForm(10, 3)
    encoded = encode_passages(tokenizers["char"], passages, form)
    windows = Windows.over(encoded, np.array([0, 1]), form, tokenizers["char"])
    assert encoded.context_offsets.tolist() == [0, 12]  # the context is encoded once
    assert windows.questions.tolist() == [0, 0, 0, 1, 1, 1]
    assert windows.firsts.tolist() == [0, 3, 6] * 2
    assert windows.lengths.tolist() == [10] * 6
    assert windows.targets.tolist() == [[0, 0], [5, 7], [0, 0], *[[0, 0]] * 3]
    assert windows.characters(1, 5, 7) == (4, 7)


def test_no_questions_have_no_windows(tokenizers: dict[str, Tokenizer]):
    form = WindowForm()
    encoded = encode_passages(tokenizers["bpe"], [], form)
    assert len(Windows.over(encoded, np.arange(0), form, tokenizers["bpe"])) == 0


def test_an_empty_context_has_one_empty_window(tokenizers: dict[str, Tokenizer]):
    form = WindowForm()
    encoded = encode_passages(tokenizers["bpe"], [Passage("", "who?")], form)
    windows = Windows.over(encoded, np.arange(1), form, tokenizers["bpe"])
    assert windows.lengths.tolist() == windows.context_starts.tolist()
    assert windows.pack(np.array([0])).num_tokens == windows.lengths[0]


# From files


def corpus_of(path: Path, rows: list[dict[str, Any]]) -> Corpus:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    columns = ("context", "question", "answer")
    return open_corpus([open_rows(path)], QuestionAnswering.reading_of("answers", columns, None))


def test_the_cache_holds_what_encoding_gives(
    tokenizers: dict[str, Tokenizer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    contexts = ["the river in Zürich", "中华人民的 café", "the the river, the river"]
    rows = [
        {"context": contexts[i // 3 % 3], "question": f"what {i}?", "answer": answer}
        for i, answer in enumerate(
            ["river", None, "Zürich", "人民", "café", "", "the", "river", ""]
        )
    ]
    corpus = corpus_of(tmp_path / "t.jsonl", rows)
    passages = [
        Passage(context, question, spans[0] if spans else None)
        for context, question, answers in corpus.texts()
        for spans in [[(a.start, a.end) for a in answers_from_json(answers)]]
    ]
    form = WindowForm(20, 5)
    wanted = encode_passages(tokenizers["bpe"], passages, form)
    monkeypatch.setattr(windows_module, "_CHUNK", 4)  # a context in two chunks
    found = open_passages(corpus, tokenizers["bpe"], form)
    again = open_passages(corpus, tokenizers["bpe"], form)
    for name in Passages.__annotations__:
        assert getattr(again, name).dtype == getattr(found, name).dtype
        assert np.array_equal(getattr(again, name), getattr(found, name))
    pairs = [
        Windows.over(p, np.arange(len(rows)), form, tokenizers["bpe"]) for p in (wanted, found)
    ]
    one, other = (sequences(windows.pack(np.arange(len(windows)))) for windows in pairs)
    assert one == other
    assert np.array_equal(pairs[0].targets, pairs[1].targets)
    for window, (first, last) in enumerate(pairs[0].targets.tolist()):
        if first:
            assert pairs[0].characters(window, first, last) == pairs[1].characters(
                window, first, last
            )


def test_what_is_cached_depends_on_tokenizer_and_lengths(
    tokenizers: dict[str, Tokenizer], tmp_path: Path
):
    rows = [{"context": "the river " * 20, "question": "what " * 20, "answer": "river"}]
    corpus = corpus_of(tmp_path / "t.jsonl", rows)
    one = open_passages(corpus, tokenizers["bpe"], WindowForm(64, 8))
    other = open_passages(corpus, tokenizers["char"], WindowForm(64, 8))
    short = open_passages(corpus, tokenizers["bpe"], WindowForm(16, 8))
    assert len(one.context_ids) != len(other.context_ids)
    assert len(short.question_ids) == 8 < len(one.question_ids)


@given(
    answers=st.lists(
        st.builds(Answer, st.text(max_size=5), st.integers(-1, 9), st.integers(-1, 9)), max_size=4
    )
)
def test_answers_are_read_as_they_were_written(answers: list[Answer]):
    assert answers_from_json(answers_to_json(answers)) == answers


# Tokenizers that keep Han characters apart


@pytest.mark.parametrize("kind", KINDS)
def test_no_token_holds_two_han_characters(kind: str):
    text = "中华人民共和国在1949年成立，首都是北京。Beijing is 北京 too"
    split = train_tokenizer([text] * 9, kind=kind, vocab_size=400, split_han=True)
    encoding = split.encode(text)
    pieces = [text[start:end] for start, end in encoding.offsets]
    assert all(len(piece) == 1 or not any("一" <= c <= "鿿" for c in piece) for piece in pieces)
    if kind == "bpe":
        assert len(pieces) < len(text) and "是" in pieces and " is" in pieces
    if kind in ("bpe", "wordpiece"):
        joined = train_tokenizer([text] * 9, kind=kind, vocab_size=400)
        assert len(joined.encode(text).ids) < len(encoding.ids)
    if kind in ("byte", "char"):
        joined = train_tokenizer([text] * 9, kind=kind, vocab_size=400)
        assert joined.to_str() == split.to_str()
