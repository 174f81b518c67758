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
import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from tokenizers import Tokenizer

from hasten.core.errors import UsageError
from hasten.core.seeds import derive_seed
from hasten.data.corpus import Corpus
from hasten.data.tokenizer import unknown_id
from hasten.data.tokens import (
    EncodedText,
    EncodingFormat,
    SpecialIds,
    TokenStore,
    join_segments,
)

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
        corpus: the rows.
        rows: (E,) rows of the corpus that are drawn, in ascending order; others get no tokens.
        tokenizer: a plain BPE.
        form: how a row's cells become one sequence.
        rate: probability of skipping a merge.
        seed: of the run.
    """

    corpus: Corpus
    rows: np.ndarray
    tokenizer: Tokenizer
    form: EncodingFormat
    rate: float
    seed: int
    _words: Words = field(repr=False)
    _special: SpecialIds = field(repr=False)

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
        """Reads the tokenizer's merges.

        Raises:
            UsageError: the tokenizer is not a plain BPE.
        """
        words, special = Words(tokenizer), SpecialIds.of(tokenizer, form)
        return cls(corpus, rows, tokenizer, form, rate, seed, words, special)

    @cached_property
    def _numbered(self) -> list[list[array]]:
        """Every row cut into words once: the words' numbers, cell by cell."""
        numbered = self._words.numbers
        return [
            [array("l", numbered(text)) for text in self.form.take(row)]
            for row in self.corpus.texts(self.rows)
        ]

    def store(self, epoch: int) -> TokenStore:
        """Returns the tokens of an epoch: a pure function of (seed, epoch, row)."""
        ids, types = array("l"), array("b")
        lengths = np.zeros(len(self.corpus), dtype=np.int64)
        num_cut = 0
        for row, cells in zip(self.rows.tolist(), self._numbered, strict=True):
            text = self._draw(epoch, row, cells)
            ids.extend(text.token_ids)
            types.extend(text.token_types)
            lengths[row] = len(text.token_ids)
            num_cut += text.num_cut > 0
        wide = self.tokenizer.get_vocab_size() > 1 << 16
        return TokenStore(
            token_ids=np.asarray(ids, dtype=np.uint32 if wide else np.uint16),
            offsets=np.concatenate([[0], np.cumsum(lengths)]),
            token_types=np.asarray(types, np.uint8) if self.form.has_types else None,
            num_truncated=num_cut,
        )

    def encode(
        self, epoch: int, rows: Sequence[int], texts: Sequence[tuple[str, ...]]
    ) -> list[EncodedText]:
        """Returns the tokens of rows whose texts are others than the corpus's."""
        return [
            self._draw(epoch, row, [self._words.numbers(cell) for cell in self.form.take(cells)])
            for row, cells in zip(rows, texts, strict=True)
        ]

    def _draw(self, epoch: int, row: int, cells: Sequence[Sequence[int]]) -> EncodedText:
        draw = random.Random(derive_seed("subword", self.seed, epoch, row))
        known, merges = self._words.symbols, self._words.merges
        segments = [
            [piece for n in cell for piece in segment(known[n], merges, self.rate, draw)]
            for cell in cells
        ]
        return join_segments(segments, self.form, self._special)


class Words:
    """The words of a plain BPE tokenizer, each cut into its symbols once.

    Attributes:
        merges: pair of ids -> (rank, id of the merged symbol).
        symbols: ids of the symbols of each word met so far, by the word's number.

    Raises:
        UsageError: the tokenizer is not a plain BPE.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        if not supports_dropout(tokenizer):
            raise UsageError("bpe_dropout needs a bpe tokenizer (--tokenizer bpe).")
        self._tokenizer = tokenizer
        model = json.loads(tokenizer.to_str())["model"]
        self._vocab: dict[str, int] = model["vocab"]
        pairs = (m if isinstance(m, list) else m.split(" ") for m in model["merges"])
        self.merges: Merges = {
            (self._vocab[a], self._vocab[b]): (rank, self._vocab[a + b])
            for rank, (a, b) in enumerate(pairs)
        }
        self.symbols: list[tuple[int, ...]] = []
        self._numbers: dict[str, int] = {}
        self._unknown = unknown_id(tokenizer)
        reads_names = not tokenizer.encode_special_tokens
        special = {
            number: token
            for number, token in tokenizer.get_added_tokens_decoder().items()
            if token.special and reads_names
        }
        self._special = {token.content: number for number, token in special.items()}
        patterns = (r"\s*" * t.lstrip + re.escape(t.content) for t in special.values())
        self._split = re.compile("|".join(patterns) or "(?!)")

    def numbers(self, text: str) -> list[int]:
        """Returns the number of each word; special tokens are words where they are read as such."""
        found, at = list[int](), 0
        for match in self._split.finditer(text):
            found += [
                self._number(word) for word in _words_of(self._tokenizer, text[at : match.start()])
            ]
            name = match[0].lstrip()
            found.append(self._number(name, (self._special[name],)))
            at = match.end()
        return found + [self._number(word) for word in _words_of(self._tokenizer, text[at:])]

    def _number(self, word: str, symbols: tuple[int, ...] | None = None) -> int:
        number = self._numbers.setdefault(word, len(self.symbols))
        if number == len(self.symbols):
            self.symbols.append(symbols or tuple(self._vocab.get(c, self._unknown) for c in word))
        return number


def _words_of(tokenizer: Tokenizer, text: str) -> list[str]:
    """Returns the words that the tokenizer merges within, in its own alphabet."""
    if tokenizer.normalizer is not None:
        text = tokenizer.normalizer.normalize_str(text)
    if tokenizer.pre_tokenizer is None:
        return [text]
    return [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
