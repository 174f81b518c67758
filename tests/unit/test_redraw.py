"""Tokens drawn anew: the same in every process, other ones in every epoch, never of another row."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from builders import corpus_of, labelled_rows, write_rows
from hasten.core.errors import UsageError
from hasten.core.seeds import derive_seed
from hasten.data import redraw as redraw_module
from hasten.data.augment import Augmentation, augment_text
from hasten.data.corpus import Corpus
from hasten.data.redraw import Redraw, redrawn_tokens
from hasten.data.rows import open_rows
from hasten.data.tokenizer import train_tokenizer
from hasten.data.tokens import EncodingFormat, TokenStore, encode_texts, open_tokens

FORMS = [
    EncodingFormat(),
    EncodingFormat(max_length=9, class_token=True, separate_segments=True),
    EncodingFormat(max_length=7, class_token=True, end_token=True, cells=(1,)),
]
KINDS = {
    "words": Augmentation(word_swap=0.3, word_deletion=0.2),
    "characters": Augmentation(char_noise=0.2),
    "pieces": Augmentation(bpe_dropout=0.3),
    "both": Augmentation(word_swap=0.3, bpe_dropout=0.3),
}
ROWS = np.arange(0, 60, 2)


def write_pairs(folder: Path) -> Path:
    rows = [(text, text[::-1], label) for text, label in labelled_rows(60, seed=4)]
    return write_rows(folder / "pairs.csv", rows, ("one", "two", "label"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    path = write_pairs(tmp_path_factory.mktemp("pairs"))
    return corpus_of(open_rows(path), text=("one", "two"))


@pytest.fixture(scope="module")
def tokenizer(corpus: Corpus) -> Tokenizer:
    texts = (cell for row in corpus.texts() for cell in row)
    return train_tokenizer(texts, vocab_size=500)


def redraw_of(
    corpus: Corpus,
    tokenizer: Tokenizer,
    augmentation: Augmentation,
    form: EncodingFormat = FORMS[0],
    *,
    rows: np.ndarray = ROWS,
    seed: int = 0,
) -> Redraw:
    found = redrawn_tokens(corpus, rows, tokenizer, form, augmentation=augmentation, seed=seed)
    assert found is not None
    return found


def tokens_of(store: TokenStore, row: int) -> list[int]:
    return store.token_ids[store.offsets[row] : store.offsets[row + 1]].tolist()


def types_of(store: TokenStore, row: int) -> list[int] | None:
    types = store.token_types
    return None if types is None else types[store.offsets[row] : store.offsets[row + 1]].tolist()


def same(first: TokenStore, second: TokenStore) -> bool:
    return bool(
        np.array_equal(first.token_ids, second.token_ids)
        and np.array_equal(first.offsets, second.offsets)
    )


def test_without_augmentation_nothing_is_drawn(corpus: Corpus, tokenizer: Tokenizer):
    off = Augmentation()
    assert redrawn_tokens(corpus, ROWS, tokenizer, FORMS[0], augmentation=off, seed=0) is None


@pytest.mark.parametrize(
    "augmentation",
    [
        Augmentation(char_noise=1e-12),
        Augmentation(bpe_dropout=1e-12),
        Augmentation(word_swap=1e-12, bpe_dropout=1e-12),
    ],
)
@pytest.mark.parametrize("form", FORMS)
def test_where_nothing_is_hit_the_tokens_are_the_tokenizers(
    corpus: Corpus, tokenizer: Tokenizer, form: EncodingFormat, augmentation: Augmentation
):
    expected = open_tokens(corpus, tokenizer, form)
    found = redraw_of(corpus, tokenizer, augmentation, form)(3)
    assert len(found.offsets) == len(corpus) + 1
    for row in range(len(corpus)):
        if row % 2:
            assert tokens_of(found, row) == []  # not among the rows that are drawn
            continue
        assert tokens_of(found, row) == tokens_of(expected, row)
        assert types_of(found, row) == types_of(expected, row)
    assert found.token_ids.dtype == expected.token_ids.dtype
    if form.max_length < 10:
        assert found.num_truncated > 0


@pytest.mark.parametrize("augmentation", KINDS.values(), ids=KINDS)
def test_other_tokens_in_every_epoch_and_the_same_again(
    corpus: Corpus, tokenizer: Tokenizer, augmentation: Augmentation
):
    redraw = redraw_of(corpus, tokenizer, augmentation)
    stores = [redraw(epoch) for epoch in range(4)]
    assert len({tuple(store.token_ids.tolist()) for store in stores}) == 4
    # In whatever order epochs are asked for, and of whatever else there was before.
    assert same(redraw(2), stores[2])
    assert same(redraw_of(corpus, tokenizer, augmentation)(2), stores[2])
    assert not same(redraw_of(corpus, tokenizer, augmentation, seed=1)(2), stores[2])


@pytest.mark.parametrize("augmentation", KINDS.values(), ids=KINDS)
def test_a_row_is_drawn_whatever_the_other_rows_are(
    corpus: Corpus,
    tokenizer: Tokenizer,
    augmentation: Augmentation,
    monkeypatch: pytest.MonkeyPatch,
):
    whole = redraw_of(corpus, tokenizer, augmentation)(1)
    monkeypatch.setattr(redraw_module, "_CHUNK", 3)  # several chunks, the last one short
    few = np.array([4, 6, 20, 58])
    part = redraw_of(corpus, tokenizer, augmentation, rows=few)(1)
    for row in few.tolist():
        assert tokens_of(part, row) == tokens_of(whole, row) != []
    assert len(part.token_ids) == sum(len(tokens_of(whole, row)) for row in few.tolist())


@pytest.mark.parametrize("form", FORMS)
def test_the_text_is_augmented_before_it_is_cut(
    corpus: Corpus, tokenizer: Tokenizer, form: EncodingFormat
):
    augmentation = Augmentation(word_swap=0.3, word_deletion=0.2, char_noise=0.05)
    store = redraw_of(corpus, tokenizer, augmentation, form, seed=7)(5)
    for row, cells in zip(ROWS.tolist(), corpus.texts(ROWS), strict=True):
        draw = random.Random(derive_seed("augment", 7, 5, row))
        changed = tuple(augment_text(c, augmentation, draw, unknown="", mask="") for c in cells)
        (expected,) = encode_texts(tokenizer, [changed], form)
        assert tokens_of(store, row) == expected.token_ids
        if form.separate_segments:
            assert types_of(store, row) == expected.token_types


@pytest.mark.parametrize("bpe_dropout", [0.0, 0.2])
@pytest.mark.parametrize(("kind", "token"), [("word_dropout", "[UNK]"), ("word_mask", "[MASK]")])
def test_words_become_special_tokens_not_their_names(
    corpus: Corpus, tokenizer: Tokenizer, kind: str, token: str, bpe_dropout: float
):
    rates = {kind: 0.5, "bpe_dropout": bpe_dropout}
    store = redraw_of(corpus, tokenizer, Augmentation(**rates))(0)
    hits = num_words = 0
    for row, cells in zip(ROWS.tolist(), corpus.texts(ROWS), strict=True):
        ids, wanted = tokens_of(store, row), [word for cell in cells for word in cell.split()]
        hits += ids.count(tokenizer.token_to_id(token))
        num_words += len(wanted)
        kept = tokenizer.decode(ids, skip_special_tokens=True).split()
        remaining = iter(wanted)
        assert all(word in remaining for word in kept)  # in their order, nothing new
        assert len(kept) + ids.count(tokenizer.token_to_id(token)) == len(wanted)
    assert 0.4 < hits / num_words < 0.6


def test_what_a_tokenizer_lacks_is_named(corpus: Corpus):
    from tokenizers import models, pre_tokenizers

    bare = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    bare.pre_tokenizer = pre_tokenizers.Whitespace()
    for augmentation, message in (
        (Augmentation(word_dropout=0.1), r"\[UNK\]"),
        (Augmentation(word_mask=0.1), r"\[MASK\]"),
        (Augmentation(bpe_dropout=0.1), "bpe"),
        (Augmentation(word_swap=0.1, bpe_dropout=0.1), "bpe"),
    ):
        with pytest.raises(UsageError, match=message):
            redraw_of(corpus, bare, augmentation)
    redraw_of(corpus, bare, Augmentation(word_swap=0.1))  # needs nothing


CHILD = """
import json, sys
from pathlib import Path
import numpy as np
from tokenizers import Tokenizer
sys.path.insert(0, sys.argv[1])
from builders import corpus_of
from hasten.data.augment import Augmentation
from hasten.data.redraw import redrawn_tokens
from hasten.data.rows import open_rows
from hasten.data.tokens import EncodingFormat
corpus = corpus_of(open_rows(sys.argv[2]), text=("one", "two"))
tokenizer = Tokenizer.from_file(sys.argv[3])
augmentation = Augmentation(word_swap=0.3, bpe_dropout=0.3)
rows, form = np.arange(0, 60, 2), EncodingFormat()
redraw = redrawn_tokens(corpus, rows, tokenizer, form, augmentation=augmentation, seed=0)
print(json.dumps(redraw(2).token_ids.tolist()))
"""


def test_another_process_draws_the_same(corpus: Corpus, tokenizer: Tokenizer, tmp_path: Path):
    """What a resumed run rests on."""
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    arguments = [Path(__file__).parents[1], write_pairs(tmp_path), tmp_path / "tokenizer.json"]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
    )
    expected = redraw_of(corpus, tokenizer, KINDS["both"])(2)
    assert json.loads(done.stdout) == expected.token_ids.tolist()
