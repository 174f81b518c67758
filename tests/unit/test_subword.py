"""BPE-dropout: at rate 0 the tokenizer's own tokens, else other pieces of the same words."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenizer import CORPUS
from tokenizers import Tokenizer

from builders import corpus_of, labelled_rows, write_rows
from hasten.core.errors import UsageError
from hasten.data.corpus import Corpus
from hasten.data.rows import open_rows
from hasten.data.subword import SubwordDropout, segment, supports_dropout
from hasten.data.tokenizer import KINDS, train_tokenizer
from hasten.data.tokens import EncodingFormat, encode_texts, open_tokens

FORMS = [
    EncodingFormat(),
    EncodingFormat(max_length=9, class_token=True, separate_segments=True),
    EncodingFormat(max_length=7, class_token=True, end_token=True, cells=(1,)),
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(CORPUS, kind="bpe", vocab_size=500)


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    odd = [("Don't stop: it's 3.14!", "naïve café", "x"), ("中文 abc", "👍🏽 ok", "y")]
    rows = [*odd, *((text, text[::-1], label) for text, label in labelled_rows(60, seed=4))]
    path = write_rows(tmp_path / "pairs.csv", rows, ("one", "two", "label"))
    return corpus_of(open_rows(path, header=True), text=("one", "two"))


def build(corpus: Corpus, tokenizer: Tokenizer, form: EncodingFormat, rate: float, seed: int = 0):
    rows = np.arange(0, len(corpus), 2)
    return SubwordDropout.build(corpus, rows, tokenizer, form, rate=rate, seed=seed)


@pytest.mark.parametrize("form", FORMS)
def test_at_rate_0_the_tokens_are_the_tokenizers(corpus, tokenizer, form: EncodingFormat):
    expected = open_tokens(corpus, tokenizer, form)
    found = build(corpus, tokenizer, form, 0.0).store(3)
    for row in range(len(corpus)):
        start, end = found.offsets[row : row + 2]
        if row % 2:
            assert start == end  # not among the rows of the split
            continue
        a, b = expected.offsets[row : row + 2]
        assert found.token_ids[start:end].tolist() == expected.token_ids[a:b].tolist()
        if form.separate_segments:
            assert found.token_types is not None and expected.token_types is not None
            assert found.token_types[start:end].tolist() == expected.token_types[a:b].tolist()
    assert found.token_ids.dtype == expected.token_ids.dtype


@pytest.mark.parametrize("form", FORMS)
def test_other_texts_are_cut_as_the_rows_own_would_be(corpus, tokenizer, form: EncodingFormat):
    rows = [4, 0]
    texts = [("hammer [UNK]apple", "x"), ("naïve café[MASK]", " 中文")]
    found = build(corpus, tokenizer, form, 0.0).encode(3, rows, texts)
    assert found == encode_texts(tokenizer, texts, form)
    # At a rate, a row's own text is drawn as the store draws it.
    source, own = build(corpus, tokenizer, form, 0.3), list(corpus.texts(np.array(rows)))
    store = source.store(3)
    for row, text in zip(rows, source.encode(3, rows, own), strict=True):
        start, end = store.offsets[row : row + 2]
        assert store.token_ids[start:end].tolist() == text.token_ids


@settings(max_examples=150)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=25))
def test_every_text_is_cut_as_the_tokenizer_cuts_it(text: str):
    from hasten.data.subword import _words_of

    tokenizer = _trained()
    if any(token in text for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")):
        return
    import json

    model = json.loads(tokenizer.to_str())["model"]
    vocab = model["vocab"]
    merges = {
        (vocab[a], vocab[b]): (rank, vocab[a + b]) for rank, (a, b) in enumerate(model["merges"])
    }
    draw = random.Random(0)
    found = [
        piece
        for word in _words_of(tokenizer, text)
        for piece in segment([vocab[c] for c in word], merges, 0.0, draw)
    ]
    assert found == tokenizer.encode(text, add_special_tokens=False).ids


_TRAINED: list[Tokenizer] = []


def _trained() -> Tokenizer:
    if not _TRAINED:
        _TRAINED.append(train_tokenizer(CORPUS, kind="bpe", vocab_size=500))
    return _TRAINED[0]


def test_other_pieces_of_the_same_text_in_every_epoch_and_the_same_again(corpus, tokenizer):
    form = EncodingFormat()
    plain, source = (
        build(corpus, tokenizer, form, 0.0).store(0),
        build(corpus, tokenizer, form, 0.3),
    )
    stores = [source.store(epoch) for epoch in range(4)]
    texts = {tuple(store.token_ids.tolist()) for store in stores}
    assert len(texts) == 4 and tuple(plain.token_ids.tolist()) not in texts
    for store in stores:
        assert 1.02 * len(plain.token_ids) < len(store.token_ids)
        for row in range(0, len(corpus), 2):
            words = [
                tokenizer.decode(s.token_ids[s.offsets[row] : s.offsets[row + 1]].tolist())
                for s in (store, plain)
            ]
            assert words[0] == words[1]
    again = build(corpus, tokenizer, form, 0.3).store(2)
    assert again.token_ids.tolist() == stores[2].token_ids.tolist()
    assert again.offsets.tolist() == stores[2].offsets.tolist()
    other = build(corpus, tokenizer, form, 0.3, seed=1).store(2)
    assert other.token_ids.tolist() != stores[2].token_ids.tolist()


def test_at_rate_near_1_hardly_anything_is_merged(corpus, tokenizer):
    store = build(corpus, tokenizer, EncodingFormat(), 0.999).store(0)
    letters = sum(tokenizer.decode([i]) != "" and i < 5 + 256 for i in store.token_ids.tolist())
    assert letters > 0.95 * len(store.token_ids)


@pytest.mark.parametrize("kind", KINDS)
def test_only_plain_bpe_is_supported(kind: str, corpus, tmp_path: Path):
    tokenizer = train_tokenizer(CORPUS, kind=kind, vocab_size=400)
    assert supports_dropout(tokenizer) == (kind in ("bpe", "byte"))
    if kind not in ("bpe", "byte"):
        with pytest.raises(UsageError, match="bpe"):
            build(corpus, tokenizer, EncodingFormat(), 0.1)
