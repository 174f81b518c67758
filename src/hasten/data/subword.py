"""BPE-dropout: in training, words are cut into pieces differently in every epoch.

    row --words, once--> symbols of each word --merges, some skipped--> tokens of (seed, epoch, row)

Skipping each merge with a small probability (Provilkov et al. 2020, "BPE-Dropout") lets the model
see a rare word's parts, which is worth most where there is little text. The `tokenizers` library
has it too, but cannot be seeded, so that a resumed run would not be the same run.
"""

from __future__ import annotations

import itertools
import json
import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from tokenizers import Tokenizer

from hasten.core.errors import UsageError
from hasten.core.seeds import derive_seed
from hasten.data.corpus import Corpus
from hasten.data.tokens import EncodingFormat, TokenStore, join_segments, special_ids

Merges = dict[tuple[int, int], tuple[int, int]]


def supports_dropout(tokenizer: Tokenizer) -> bool:
    """Returns whether the tokenizer merges pairs of symbols that are all in its vocabulary."""
    model = json.loads(tokenizer.to_str())["model"]
    unusual = ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "fuse_unk")
    return model["type"] == "BPE" and not any(model.get(name) for name in unusual)


def segment(symbols: Sequence[int], merges: Merges, rate: float, draw: random.Random) -> list[int]:
    """Merges a word's symbols, lowest rank first, each candidate being skipped at ``rate``.

    Args:
        symbols: ids of the word's characters or bytes.
        merges: pair of ids -> (rank, id of the merged symbol).
        rate: probability of skipping a candidate each time it is looked at; at 0 the result is
            the tokenizer's own.
        draw: source of random numbers.
    """
    word = list(symbols)
    while len(word) > 1:
        best, at = None, -1
        for i, pair in enumerate(itertools.pairwise(word)):
            found = merges.get(pair)
            if found is None or (best is not None and found[0] >= best[0]):
                continue
            if rate and draw.random() < rate:
                continue
            best, at = found, i
        if best is None:
            return word
        word[at : at + 2] = [best[1]]
    return word


@dataclass(frozen=True)
class SubwordDropout:
    """Draws the tokens of each epoch anew.

    Attributes:
        rows: (E,) rows of the corpus that are drawn; others get no tokens.
        num_rows: rows R of the corpus.
        form: how a row's cells become one sequence.
        rate: probability of skipping a merge.
        seed: of the run.
        dtype: of the stored ids.
    """

    rows: np.ndarray
    num_rows: int
    form: EncodingFormat
    rate: float
    seed: int
    dtype: np.dtype
    _words: list[tuple[int, ...]] = field(repr=False)
    _cells: list[list[array]] = field(repr=False)
    _merges: Merges = field(repr=False)
    _special: tuple[list[int], list[int], int] = field(repr=False)

    @classmethod
    def build(
        cls,
        corpus: Corpus,
        rows: np.ndarray,
        tokenizer: Tokenizer,
        form: EncodingFormat,
        *,
        rate: float,
        seed: int,
    ) -> SubwordDropout:
        """Cuts every row into words once.

        Raises:
            UsageError: the tokenizer is not a plain BPE.
        """
        if not supports_dropout(tokenizer):
            raise UsageError("tokenizer.dropout needs a bpe tokenizer; set it to 0.")
        model = json.loads(tokenizer.to_str())["model"]
        vocab: dict[str, int] = model["vocab"]
        pairs = (m if isinstance(m, list) else m.split(" ") for m in model["merges"])
        merges = {(vocab[a], vocab[b]): (rank, vocab[a + b]) for rank, (a, b) in enumerate(pairs)}
        unknown = special_ids(tokenizer, form)[2]
        numbers: dict[str, int] = {}
        words: list[tuple[int, ...]] = []
        cells: list[list[array]] = []
        for row in corpus.texts(rows):
            numbered = [array("l") for _ in row]
            for text, into in zip(row, numbered, strict=True):
                for word in _words_of(tokenizer, text):
                    number = numbers.setdefault(word, len(words))
                    if number == len(words):
                        words.append(tuple(vocab.get(c, unknown) for c in word))
                    into.append(number)
            cells.append(numbered)
        dtype = np.dtype(np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.uint32)
        special = special_ids(tokenizer, form)
        return cls(rows, len(corpus), form, rate, seed, dtype, words, cells, merges, special)

    def store(self, epoch: int) -> TokenStore:
        """Returns the tokens of an epoch: a pure function of (seed, epoch, row)."""
        ids, types = array("l"), array("b")
        lengths = np.zeros(self.num_rows, dtype=np.int64)
        num_cut = 0
        for row, cells in zip(self.rows.tolist(), self._cells, strict=True):
            draw = random.Random(derive_seed("subword", self.seed, epoch, row))
            segments = [
                [
                    piece
                    for number in cell
                    for piece in segment(self._words[number], self._merges, self.rate, draw)
                ]
                for cell in cells
            ]
            text = join_segments(segments, self.form, self._special)
            ids.extend(text.token_ids)
            types.extend(text.token_types)
            lengths[row] = len(text.token_ids)
            num_cut += text.num_cut > 0
        return TokenStore(
            token_ids=np.asarray(ids, dtype=self.dtype),
            offsets=np.concatenate([[0], np.cumsum(lengths)]),
            token_types=np.asarray(types, np.uint8) if self.form.separate_segments else None,
            num_truncated=num_cut,
        )


def _words_of(tokenizer: Tokenizer, text: str) -> list[str]:
    """Returns the words that the tokenizer merges within, in its own alphabet."""
    if tokenizer.normalizer is not None:
        text = tokenizer.normalizer.normalize_str(text)
    if tokenizer.pre_tokenizer is None:
        return [text]
    return [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
