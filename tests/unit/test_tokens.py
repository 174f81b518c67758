"""Encoding, the token store, and packing from it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from builders import corpus_of, labelled_rows, write_rows
from hasten.core.errors import UsageError
from hasten.data import tokens as tokens_module
from hasten.data.packing import IGNORED, pack_examples, pack_shifted, pack_texts
from hasten.data.rows import open_rows
from hasten.data.tokenizer import train_tokenizer
from hasten.data.tokens import (
    EncodedText,
    EncodingFormat,
    TokenStore,
    encode_texts,
    open_tokens,
)

FORMS = [
    EncodingFormat(max_length=12),
    EncodingFormat(max_length=12, class_token=True),
    EncodingFormat(max_length=12, separate_segments=True),
    EncodingFormat(max_length=12, class_token=True, separate_segments=True),
    EncodingFormat(max_length=12, class_token=True, end_token=True, cells=(1,)),
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["a b c d e f g h"] * 2, kind="word", vocab_size=50)


def words(tokenizer: Tokenizer, text: str) -> list[int]:
    return [tokenizer.token_to_id(word) for word in text.split()]


def test_cells_are_joined_or_kept_apart(tokenizer: Tokenizer):
    row, both = ("a b", "c d e"), [("a b", "c d e")]
    joined = words(tokenizer, "a b c d e")
    (found,) = encode_texts(tokenizer, both, EncodingFormat())
    assert found == EncodedText(joined, [0] * 5, 0)
    (found,) = encode_texts(tokenizer, [row], EncodingFormat(class_token=True))
    assert found == EncodedText([2, *joined], [0] * 6, 0)
    (found,) = encode_texts(tokenizer, [row], EncodingFormat(separate_segments=True))
    # A separator belongs to the segment before it, as in BERT.
    assert found == EncodedText([*joined[:2], 3, *joined[2:]], [0, 0, 0, 1, 1, 1], 0)
    (found,) = encode_texts(
        tokenizer, [row], EncodingFormat(class_token=True, separate_segments=True)
    )
    assert found == EncodedText([2, *joined[:2], 3, *joined[2:]], [0, 0, 0, 0, 1, 1, 1], 0)
    (found,) = encode_texts(tokenizer, [row], EncodingFormat(end_token=True))
    assert found == EncodedText([*joined, 3], [0] * 6, 0)
    (found,) = encode_texts(
        tokenizer, [row], EncodingFormat(separate_segments=True, end_token=True)
    )
    assert found == EncodedText([*joined[:2], 3, *joined[2:], 3], [0, 0, 0, 1, 1, 1, 1], 0)


def test_only_the_cells_asked_for_are_encoded_in_their_order(tokenizer: Tokenizer):
    row = ("a b", "c", "d e")
    for cells, wanted in (((1,), "c"), ((2, 0), "d e a b"), ((), "a b c d e")):
        (found,) = encode_texts(tokenizer, [row], EncodingFormat(cells=cells))
        assert found.token_ids == words(tokenizer, wanted)


def test_without_a_limit_nothing_is_cut(tokenizer: Tokenizer):
    long = " ".join(["a"] * 3000)
    (found,) = encode_texts(tokenizer, [(long, "b")], EncodingFormat(0, end_token=True))
    assert found.token_ids == [*words(tokenizer, long), *words(tokenizer, "b"), 3]
    assert found.num_cut == 0


@settings(max_examples=200)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    max_length=st.integers(1, 40),
    class_token=st.booleans(),
    separate=st.booleans(),
    end_token=st.booleans(),
)
def test_cutting_is_fair_counted_and_never_too_little(
    sizes: list[int], max_length: int, class_token: bool, separate: bool, end_token: bool
):
    tokenizer = _word_tokenizer()
    form = EncodingFormat(max_length, class_token, separate, end_token)
    row = tuple(" ".join(["abcd"[i]] * size) for i, size in enumerate(sizes))
    (found,) = encode_texts(tokenizer, [row], form)
    assert 1 <= len(found.token_ids) == len(found.token_types) <= max_length
    kept = [found.token_ids.count(tokenizer.token_to_id("abcd"[i])) for i in range(len(sizes))]
    extra = class_token + end_token + separate * (len(sizes) - 1)
    room = max(0, max_length - extra)
    if end_token and max_length >= extra:
        assert found.token_ids[-1] == tokenizer.token_to_id("[SEP]")
    assert found.num_cut == sum(sizes) - sum(kept)
    assert sum(kept) == min(sum(sizes), room)
    # Fair: a segment is cut only down to what no other segment exceeds by more than one.
    for size, share in zip(sizes, kept, strict=True):
        if share < size:
            assert max(kept) <= share + 1


_WORDS: list[Tokenizer] = []


def _word_tokenizer() -> Tokenizer:
    if not _WORDS:
        _WORDS.append(train_tokenizer(["a b c d"] * 2, kind="word", vocab_size=50))
    return _WORDS[0]


def test_cutting_keeps_the_beginning_of_a_segment(tokenizer: Tokenizer):
    (found,) = encode_texts(
        tokenizer, [("a b c d e f g h", "h g")], EncodingFormat(6, separate_segments=True)
    )
    assert found.token_ids == [*words(tokenizer, "a b c"), 3, *words(tokenizer, "h g")]
    assert found.num_cut == 5


def test_a_missing_special_token_is_named():
    from tokenizers import models, pre_tokenizers

    bare = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    bare.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(UsageError, match=r"\[CLS\]"):
        encode_texts(bare, [("a",)], EncodingFormat(class_token=True))
    with pytest.raises(UsageError, match=r"\[SEP\]"):
        encode_texts(bare, [("a", "a")], EncodingFormat(separate_segments=True))
    with pytest.raises(UsageError, match=r"\[SEP\]"):
        encode_texts(bare, [("a",)], EncodingFormat(end_token=True))
    assert encode_texts(bare, [("a", "a")], EncodingFormat())[0].token_ids == [0, 0]


def pair_corpus(folder: Path):
    rows = [(text, text[::-1], label) for text, label in labelled_rows(120, seed=4)]
    path = write_rows(folder / "pairs.csv", rows, ("one", "two", "label"))
    return corpus_of(open_rows(path), text=("one", "two"))


@pytest.mark.parametrize("form", FORMS)
def test_the_store_holds_what_encoding_gives(
    form: EncodingFormat, own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tokens_module, "_CHUNK", 7)  # several chunks, the last one short
    corpus = pair_corpus(tmp_path)
    rows = list(corpus.texts())
    tokenizer = train_tokenizer([c for row in rows for c in row], kind="bpe", vocab_size=300)
    store = open_tokens(corpus, tokenizer, form)
    expected = encode_texts(tokenizer, rows, form)
    assert len(store.offsets) == len(rows) + 1
    assert store.lengths.tolist() == [len(text.token_ids) for text in expected]
    assert store.token_ids.tolist() == [i for text in expected for i in text.token_ids]
    if form.separate_segments:
        assert store.token_types is not None
        assert store.token_types.tolist() == [t for text in expected for t in text.token_types]
    else:
        assert store.token_types is None
    assert store.num_truncated == sum(text.num_cut > 0 for text in expected) > 0
    assert store.token_ids.dtype == np.uint16


def test_the_second_opening_encodes_nothing(
    own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    corpus = pair_corpus(tmp_path)
    rows = [cell for row in corpus.texts() for cell in row]
    tokenizer = train_tokenizer(rows, kind="bpe", vocab_size=300)
    calls = []
    original = tokens_module.encode_texts
    monkeypatch.setattr(
        tokens_module, "encode_texts", lambda *args: calls.append(1) or original(*args)
    )
    first = open_tokens(corpus, tokenizer, FORMS[0])
    num_calls = len(calls)
    assert num_calls
    # As another process would: the file under another name, the tokenizer from its file.
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    other = tmp_path / "elsewhere.csv"
    other.write_bytes((tmp_path / "pairs.csv").read_bytes())
    corpus = corpus_of(open_rows(other), text=("one", "two"))
    again = open_tokens(corpus, Tokenizer.from_file(str(tmp_path / "tokenizer.json")), FORMS[0])
    assert len(calls) == num_calls
    assert np.array_equal(again.token_ids, first.token_ids)
    # Whatever changes the tokens does not come from the cache.
    open_tokens(corpus, tokenizer, EncodingFormat(max_length=11))
    assert len(calls) > num_calls
    num_calls = len(calls)
    open_tokens(corpus, train_tokenizer(rows, kind="bpe", vocab_size=310), FORMS[0])
    assert len(calls) > num_calls


@pytest.mark.parametrize("size", [65536, 65537])
def test_the_type_of_ids_holds_the_largest(size: int, own_cache: Path, tmp_path: Path):
    from tokenizers import models, pre_tokenizers

    vocab = {f"w{i}": i for i in range(size)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    path = write_rows(tmp_path / "a.csv", [(f"w1 w{size - 1}", "x"), ("w7", "y")], ("t", "l"))
    corpus = corpus_of(open_rows(path), text=("t",), label="l")
    store = open_tokens(corpus, tokenizer, EncodingFormat())
    assert store.token_ids.tolist() == [1, size - 1, 7]


def test_a_row_of_which_nothing_is_left_is_one_unknown_token():
    from tokenizers import models, normalizers, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Replace("x", "")
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    assert encode_texts(tokenizer, [("xx",)], EncodingFormat()) == [EncodedText([0], [0], 0)]


@pytest.mark.parametrize("form", FORMS)
def test_packing_lays_the_examples_end_to_end(
    form: EncodingFormat, own_cache: Path, tmp_path: Path
):
    corpus = pair_corpus(tmp_path)
    rows = list(corpus.texts())
    tokenizer = train_tokenizer([c for row in rows for c in row], kind="bpe", vocab_size=300)
    store = open_tokens(corpus, tokenizer, form)
    chosen = np.array([5, 0, 119, 7, 7])
    targets = np.arange(120) * 10
    batch = pack_examples(store, chosen, targets=targets[chosen], weight=2.5)
    expected = [encode_texts(tokenizer, [rows[i]], form)[0] for i in chosen.tolist()]
    lengths = [len(text.token_ids) for text in expected]
    assert batch.layout.lengths == tuple(lengths)
    assert batch.token_ids.tolist() == [i for text in expected for i in text.token_ids]
    assert batch.positions.tolist() == [p for n in lengths for p in range(n)]
    assert batch.example_ids.tolist() == chosen.tolist()
    assert batch.targets is not None and batch.targets.tolist() == [50, 0, 1190, 70, 70]
    assert batch.weight == 2.5 and batch.num_filler == 0
    assert batch.token_ids.dtype == torch.int64 and batch.targets.dtype == torch.int64
    if form.separate_segments:
        assert batch.token_types is not None
        assert batch.token_types.tolist() == [t for text in expected for t in text.token_types]
    else:
        assert batch.token_types is None
    in_memory = pack_texts(expected, with_types=form.separate_segments)
    for name in ("token_ids", "positions"):
        assert torch.equal(getattr(in_memory, name), getattr(batch, name))
    assert in_memory.layout.lengths == batch.layout.lengths and in_memory.targets is None
    if batch.token_types is not None:
        assert torch.equal(in_memory.token_types, batch.token_types)
    assert pack_examples(store, chosen).targets is None
    numbered = pack_examples(store, chosen, example_ids=np.array([4, 3, 2, 1, 0]))
    assert numbered.example_ids.tolist() == [4, 3, 2, 1, 0]
    assert torch.equal(numbered.token_ids, batch.token_ids)


def test_targets_may_have_several_numbers_each(own_cache: Path, tmp_path: Path):
    corpus = pair_corpus(tmp_path)
    texts = [c for row in corpus.texts() for c in row]
    store = open_tokens(corpus, train_tokenizer(texts, kind="word", vocab_size=300), FORMS[0])
    spans = np.array([[1, 4], [0, 0]])
    batch = pack_examples(store, np.array([3, 8]), targets=spans)
    assert batch.targets is not None and batch.targets.tolist() == [[1, 4], [0, 0]]


STORE = TokenStore(
    token_ids=np.array([10, 11, 12, 13, 20, 21, 30, 31, 32], np.uint16),
    offsets=np.array([0, 4, 6, 9]),
    token_types=np.array([0, 0, 1, 1, 0, 1, 1, 0, 1], np.uint8),
    num_truncated=0,
)


def test_the_next_token_is_the_target():
    starts, ends = np.array([4, 0, 7]), np.array([6, 4, 9])
    batch = pack_shifted(STORE, starts, ends, example_ids=np.array([7, 5, 9]), weight=2.5)
    assert batch.token_ids.tolist() == [20, 10, 11, 12, 31]
    assert batch.targets is not None and batch.targets.tolist() == [21, 11, 12, 13, 32]
    assert batch.layout.lengths == (1, 3, 1)
    assert batch.positions.tolist() == [0, 0, 1, 2, 0]
    assert (batch.example_ids.tolist(), batch.weight) == ([7, 5, 9], 2.5)
    assert batch.token_ids.dtype == batch.targets.dtype == torch.int64


def test_only_targets_of_the_type_asked_for_are_learned():
    """The type is that of the token to be said, not of the one before it."""
    starts, ends = np.array([0, 6]), np.array([4, 9])
    batch = pack_shifted(STORE, starts, ends, example_ids=starts, learned_type=1)
    assert batch.token_ids.tolist() == [10, 11, 12, 30, 31]
    assert batch.targets is not None
    assert batch.targets.tolist() == [IGNORED, 12, 13, IGNORED, 32]


def test_a_trimmed_store_stays_readable_while_it_is_open(own_cache: Path, tmp_path: Path):
    import shutil

    corpus = pair_corpus(tmp_path)
    rows = [c for row in corpus.texts() for c in row]
    store = open_tokens(corpus, train_tokenizer(rows, kind="word", vocab_size=300), FORMS[0])
    before = store.token_ids.tolist()
    for entry in own_cache.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
    assert not any(os.scandir(own_cache / "x")) if (own_cache / "x").exists() else True
    assert store.token_ids.tolist() == before
