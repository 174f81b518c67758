"""SentencePiece models cut texts here as in the package of that name, and damage is refused."""

from __future__ import annotations

import struct
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from hasten.core.errors import DamagedError, HastenError, UsageError
from hasten.data.sentencepiece import Kind, build_tokenizer, read_sentencepiece
from hasten.data.tokenizer import reading_names_as_text
from sentencepiece_folders import GEMMA, LLAMA, T5_NUMBERS, train

sentencepiece = pytest.importorskip("sentencepiece")

MODELS: dict[str, dict[str, Any]] = {
    "unigram": {},
    "t5": T5_NUMBERS,
    "unigram with bytes": {"byte_fallback": True, "vocab_size": 460},
    "no normal form": {"normalization_rule_name": "identity"},
    "bpe": {"model_type": "bpe"},
    "llama": LLAMA,
    "gemma": GEMMA,
}
# Words, parts of them, and what a normal form changes or removes.
PARTS = (
    *("bako", "ritu", "tion", "über", "é", "e\u0301", "1", "22", "333", ".", "?!"),
    *(" ", "  ", "   ", "\n", "\n\n", "\t", "\u3000", "\u200b", "\u00a0"),
    *("東京", "大", "ﬁ", "Ⅷ", "２", "🙂", "👩\u200d👧", "ё", "𝒳", "\x00", "…", "▁"),
)
TEXTS = st.one_of(st.lists(st.sampled_from(PARTS), max_size=12).map("".join), st.text(max_size=12))


@cache
def trained(name: str) -> bytes:
    return train(**MODELS[name])


@cache
def both(name: str) -> tuple[Any, Tokenizer]:
    theirs = sentencepiece.SentencePieceProcessor(model_proto=trained(name))
    return theirs, reading_names_as_text(tokenizer_of(trained(name)))


def tokenizer_of(content: bytes) -> Tokenizer:
    model = model_of(content)
    return build_tokenizer(model, model.pieces)


def model_of(content: bytes) -> Any:
    class InMemory:
        """A file that is on no disk."""

        def is_file(self) -> bool:
            return True

        def read_bytes(self) -> bytes:
            return content

    file: Any = InMemory()
    return read_sentencepiece(file)


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=150)
@given(text=TEXTS)
def test_texts_are_cut_as_by_the_package(name: str, text: str):
    theirs, ours = both(name)
    if name == "no normal form":  # without one the package takes the mark of a space for one
        text = text.replace("▁", "")
    ids = ours.encode(text).ids
    assert ids == theirs.encode(text)
    if theirs.unk_id() not in ids:  # which the package shows as a question mark
        assert ours.decode(ids) == theirs.decode(ids)


@pytest.mark.parametrize("name", MODELS)
def test_pieces_have_their_numbers_scores_and_kinds(name: str):
    theirs, ours = both(name)
    pieces = model_of(trained(name)).pieces
    assert len(pieces) == len(theirs) == ours.get_vocab_size()
    for number, piece in enumerate(pieces):
        assert piece.text == theirs.id_to_piece(number) == ours.id_to_token(number)
        assert piece.score == theirs.get_score(number)
        assert (piece.kind is Kind.CONTROL) == theirs.is_control(number)
        assert (piece.kind is Kind.BYTE) == theirs.is_byte(number)
        assert (piece.kind is Kind.UNKNOWN) == theirs.is_unknown(number)


@pytest.mark.parametrize("name", MODELS)
@given(texts=st.lists(st.sampled_from(["</s>", "<s>", "<unk>", "<pad>", "<0x41>", "ba"])))
def test_names_of_special_tokens_are_text(name: str, texts: list[str]):
    theirs, ours = both(name)
    named = {i for i in range(len(theirs)) if theirs.is_control(i)}
    ids = ours.encode("".join(texts)).ids
    assert not named.intersection(ids)
    if theirs.unk_id() not in ids:
        assert ours.decode(ids) == "".join(texts)


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_a_cut_off_file_is_refused(name: str):
    content = trained(name)
    for size in range(len(content)):
        if size < 500 or size > len(content) - 500 or size % 997 == 0:
            with pytest.raises(DamagedError, match="not a SentencePiece model, or damaged"):
                model_of(content[:size])


@settings(max_examples=100)
@given(data=st.data())
def test_an_altered_file_is_refused_or_read(data: st.DataObject):
    content = bytearray(trained("t5"))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    try:
        tokenizer = tokenizer_of(bytes(content))
    except HastenError:
        return
    tokenizer.decode(tokenizer.encode("bako ritu ﬁ 東京 </s>").ids)


@given(content=st.binary(max_size=200))
def test_any_bytes_are_refused(content: bytes):
    with pytest.raises(DamagedError):
        model_of(content)


def test_damaged_tables_of_characters_are_refused():
    content = trained("t5")
    table = model_of(content).charsmap
    size = struct.unpack("<I", table[:4])[0]
    for wrong in (size + 4, size - 1, 2**32 - 4, 0):
        with pytest.raises(DamagedError, match="table of characters"):
            model_of(content.replace(table[:64], struct.pack("<I", wrong) + table[4:64]))
    astray = table[:4] + struct.pack("<I", 0x7FFFFC00) + table[8:64]  # the root's unit
    with pytest.raises(DamagedError, match="leads out of itself"):
        model_of(content.replace(table[:64], astray))


def test_what_is_not_honoured_is_refused(tmp_path: Path):
    with pytest.raises(UsageError, match="neither unigram nor BPE"):
        model_of(train(model_type="word"))
    with pytest.raises(UsageError, match="spaces stand after words"):
        model_of(train(treat_whitespace_as_suffix=True))
    with pytest.raises(UsageError, match="no such SentencePiece model"):
        read_sentencepiece(tmp_path / "none.spm")
