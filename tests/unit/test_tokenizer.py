"""Tokenizers of every kind: the same everywhere, for every script, never nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from builders import labelled_rows
from hasten.core.errors import DamagedError, DataError, UsageError
from hasten.data.tokenizer import (
    KINDS,
    SPECIAL_TOKENS,
    choose_vocab_size,
    load_tokenizer,
    train_tokenizer,
    unknown_id,
)
from hasten.data.tokens import EncodingFormat, encode_texts

CHINESE = [
    "我喜欢学习新的语言。",
    "今天天气很好，我们去公园吧！",
    "机器学习需要很多数据。",
    "他们在北京大学学习语言。",
    "这本书很有意思，我很喜欢。",
    "今天我们学习机器翻译。",
]
ENGLISH = [text for text, _ in labelled_rows(150)]
CORPUS = [
    *ENGLISH,
    *CHINESE * 3,
    "Don't stop: it's 3.14 (or so)!",
    "naïve café",
    "a\nb\tc",
    "a\nb\tc",
]


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Tokenizer]:
    return {kind: train_tokenizer(CORPUS, kind=kind, vocab_size=400) for kind in KINDS}


def train_in_child(kind: str, threads: int) -> str:
    code = (
        "import json, sys; from hasten.data.tokenizer import train_tokenizer; "
        "kind, texts = json.load(sys.stdin); "
        "sys.stdout.write(train_tokenizer(texts, kind=kind, vocab_size=180).to_str())"
    )
    environment = {
        **os.environ,
        "RAYON_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "true" if threads > 1 else "false",
    }
    # Many ties between equally frequent pairs, more than one thread's share of texts.
    texts = [
        *CORPUS,
        *(f"w{i % 97} x{i % 89} 字{chr(0x4E00 + i % 61)}{i % 83}" for i in range(900)),
    ]
    return subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps([kind, texts]),
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    ).stdout


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_the_same_in_every_process(kind: str):
    first, *others = (train_in_child(kind, threads) for threads in (1, 1, 2, 3))
    assert json.loads(first)["model"]["vocab"]
    for other in others:
        assert other == first


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_have_the_same_ids(kind: str, tokenizers: dict[str, Tokenizer]):
    assert [tokenizers[kind].token_to_id(t) for t in SPECIAL_TOKENS] == [0, 1, 2, 3, 4]
    ids = tokenizers[kind].get_vocab()
    assert sorted(ids.values()) == list(range(len(ids)))
    assert tokenizers[kind].get_vocab_size() <= 400


@pytest.mark.parametrize("kind", KINDS)
def test_saving_and_loading_changes_nothing(
    kind: str, tokenizers: dict[str, Tokenizer], tmp_path: Path
):
    tokenizers[kind].save(str(tmp_path / "tokenizer.json"))
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = load_tokenizer(path)
        assert loaded.to_str() == tokenizers[kind].to_str()


@settings(max_examples=100)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_no_text_is_without_tokens_and_none_is_over_length(text: str):
    for kind in KINDS:
        tokenizer = _cached(kind)
        (encoded,) = encode_texts(tokenizer, [(text,)], EncodingFormat(max_length=8))
        assert 1 <= len(encoded.token_ids) <= 8
        assert all(0 <= i < tokenizer.get_vocab_size() for i in encoded.token_ids)


_TRAINED: dict[str, Tokenizer] = {}


def _cached(kind: str) -> Tokenizer:
    if kind not in _TRAINED:
        _TRAINED[kind] = train_tokenizer(CORPUS, kind=kind, vocab_size=400)
    return _TRAINED[kind]


@pytest.mark.parametrize("text", [*CHINESE, ENGLISH[0], "naïve café"])
@pytest.mark.parametrize("kind", ["bpe", "byte", "char"])
def test_what_is_encoded_can_be_read_back(kind: str, text: str, tokenizers: dict[str, Tokenizer]):
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert unknown_id(tokenizer) not in ids
    assert tokenizer.decode(ids).strip() == text


@settings(max_examples=100)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20))
def test_byte_level_kinds_know_every_text(text: str):
    import unicodedata

    for kind in ("bpe", "byte"):
        tokenizer = _cached(kind)
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        wanted = unicodedata.normalize("NFC", text)
        assert tokenizer.decode(ids, skip_special_tokens=False) in (wanted, " " + wanted)


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "word"])
def test_frequent_words_are_one_or_two_tokens(kind: str, tokenizers: dict[str, Tokenizer]):
    ids = tokenizers[kind].encode("hammer and apple", add_special_tokens=False).ids
    assert 3 <= len(ids) <= 7 and unknown_id(tokenizers[kind]) not in ids


def test_characters_are_tokens_line_ends_included(tokenizers: dict[str, Tokenizer]):
    assert tokenizers["char"].encode("a\nb\tc", add_special_tokens=False).tokens == list("a\nb\tc")
    assert len(tokenizers["byte"].encode("é中", add_special_tokens=False).ids) in (5, 6)


def test_lowercase_folds_case():
    folded = train_tokenizer(["Ab ab AB cd"] * 3, kind="word", vocab_size=50, lowercase=True)
    kept = train_tokenizer(["Ab ab AB cd"] * 3, kind="word", vocab_size=50)
    assert folded.encode("AB").ids == folded.encode("ab").ids
    assert kept.encode("AB").ids != kept.encode("ab").ids


@pytest.mark.parametrize("kind", KINDS)
def test_composed_and_decomposed_letters_are_the_same(kind: str, tokenizers: dict[str, Tokenizer]):
    tokenizer = tokenizers[kind]
    assert tokenizer.encode("cafe\u0301").ids == tokenizer.encode("caf\u00e9").ids


def test_the_vocabulary_grows_with_the_text_between_two_bounds():
    sizes = [choose_vocab_size(n, "bpe")[0] for n in (0, 10**4, 10**6, 10**7, 10**9)]
    assert sizes == sorted(sizes) and sizes[0] == 1000 and sizes[-1] == 32000
    assert choose_vocab_size(10**9, "byte")[0] == 261
    assert train_tokenizer(ENGLISH, kind="byte", vocab_size=261).get_vocab_size() == 261


def test_bad_tokenizers_are_refused(tmp_path: Path):
    with pytest.raises(UsageError, match="'sentence'"):
        train_tokenizer(["a"], kind="sentence", vocab_size=10)
    with pytest.raises(DataError, match="no text"):
        train_tokenizer([], kind="word", vocab_size=10)
    with pytest.raises(UsageError, match="no such tokenizer file"):
        load_tokenizer(tmp_path / "missing.json")
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(DamagedError, match=r"tokenizer\.json: not a tokenizer"):
        load_tokenizer(tmp_path)
