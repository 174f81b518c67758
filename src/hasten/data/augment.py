"""Augmentation: training texts that read a little differently in every epoch.

    text --cut--> words --swap--> --delete--> --unknown--> --mask--> --noise--> text
                    white space between them is kept

Off by default. What is drawn depends on nothing but the generator that the caller passes, and the
caller seeds one for each example from (seed, epoch, row). So the order in which examples are
read is of no account, and a resumed run draws what the uninterrupted one would have drawn.

BPE-dropout cuts words into other tokens and leaves the text as it is: here it is only a rate
beside the others, ``hasten.data.subword`` does the cutting.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
import re
import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from hasten.core.errors import UsageError, nearest
from hasten.data.scripts import UNSPACED

# What a person gets who names a kind without a rate.
DEFAULT_RATES: dict[str, float] = {
    "word_dropout": 0.1,  # as for deletion: both take the word's meaning away
    "word_swap": 0.1,  # alpha of EDA (Wei and Zou 2019)
    "word_deletion": 0.1,  # the same
    "word_mask": 0.15,  # BERT (Devlin et al. 2019)
    "char_noise": 0.02,  # at five letters a word, one word in ten has an error
    "bpe_dropout": 0.1,  # Provilkov et al. 2020
}
KINDS = tuple(DEFAULT_RATES)

# What belongs to the character before it: voicing marks, joiners, variation selectors, and the
# vowel signs and tone marks of the scripts above.
_MARKS = "\u3099\u309a\uff9e\uff9f\u200b-\u200d\ufe00-\ufe0f\U000e0100-\U000e01ef" + "".join(
    chr(code)
    for code in (*range(0x0E00, 0x0F00), *range(0x1000, 0x10A0), *range(0x1780, 0x1800))
    if unicodedata.category(chr(code)).startswith("M")
)
_WORD = re.compile(rf"[{UNSPACED}][{_MARKS}]*|[^\s{UNSPACED}]+")
_UNSPACED_WORD = re.compile(rf"[{UNSPACED}]")


@dataclass(frozen=True)
class Augmentation:
    """A rate for each kind of augmentation, at least 0 and below 1; 0 turns it off.

    Attributes:
        word_dropout: each word becomes the unknown token at this rate, so that the model does
            not rely on single words (Bowman et al. 2016).
        word_swap: for each word, at this rate, two places drawn from the whole text exchange
            their words. EDA rounds rate times words; a drawn number lets short texts change at
            the same expected rate as long ones.
        word_deletion: each word is removed at this rate. One that is drawn at random stays where
            all would go.
        word_mask: each word becomes the mask token at this rate. Unlike dropout, it tells the
            model from a word that is truly unknown.
        char_noise: each character of a word is edited at this rate, each edit being equally
            likely (after Karpukhin et al. 2019): deleted, exchanged with the next of the word,
            replaced by another character of the text, or doubled. White space is left alone.
        bpe_dropout: rate of skipping a merge of a byte-pair encoding; see
            ``hasten.data.subword``. It does not change the text.

    Raises:
        UsageError: a rate is out of its range.
    """

    word_dropout: float = 0.0
    word_swap: float = 0.0
    word_deletion: float = 0.0
    word_mask: float = 0.0
    char_noise: float = 0.0
    bpe_dropout: float = 0.0

    def __post_init__(self) -> None:
        for kind, rate in dataclasses.asdict(self).items():
            if not 0 <= rate < 1:
                raise UsageError(f"{kind} is {rate}; a rate is at least 0 and below 1.")

    @property
    def changes_text(self) -> bool:
        """Whether ``augment_text`` may return another text than it is given."""
        return any(
            (
                self.word_dropout,
                self.word_swap,
                self.word_deletion,
                self.word_mask,
                self.char_noise,
            )
        )

    @property
    def is_off(self) -> bool:
        """Whether every rate is 0."""
        return not (self.changes_text or self.bpe_dropout)


def parse_augmentation(parts: Sequence[str]) -> Augmentation:
    """Reads kinds as a person writes them: ``word_swap`` or, with a rate, ``char_noise=0.02``.

    Args:
        parts: one kind each, at ``DEFAULT_RATES`` where no rate is given; kinds not named are
            off. Nothing, or ``none`` alone, turns all off.

    Raises:
        UsageError: an unknown kind, one named twice, a rate that is no number or out of range,
            or ``none`` beside a kind.
    """
    named = [part.strip() for part in parts if part.strip()]
    if named == ["none"]:
        return Augmentation()
    rates: dict[str, float] = {}
    for part in named:
        kind, equals, value = (piece.strip() for piece in part.partition("="))
        if kind == "none":
            raise UsageError("augmentation 'none' stands alone, without a rate or another kind.")
        if kind not in KINDS:
            raise UsageError(
                f"unknown augmentation '{kind}'; there are {', '.join(KINDS)}."
                f"{nearest(kind, KINDS)}"
            )
        if kind in rates:
            raise UsageError(f"augmentation '{kind}' is named twice; name it once.")
        rates[kind] = _parse_rate(kind, value) if equals else DEFAULT_RATES[kind]
    return Augmentation(**rates)


def split_words(text: str) -> list[str]:
    """Returns the units that augmentation moves, removes and replaces, in the order of the text.

    A word is a run of characters between white space, with its punctuation. In scripts that put
    no space between words (Chinese, Japanese, Thai ...) each character is one, with the vowel
    signs and other marks that follow it; also beside words of other scripts.
    """
    return _WORD.findall(text)


def augment_text(
    text: str, augmentation: Augmentation, draw: random.Random, *, unknown: str, mask: str
) -> str:
    """Returns the text with words swapped, deleted, made unknown, masked; then characters edited.

    White space before a word goes with it when it is removed; all other white space stays, and
    a single space is added where words of a spaced script would otherwise touch. A text for
    which nothing is drawn comes back as it is, and a text with words keeps at least one.

    The result holds special tokens as text: the caller encodes them as special, as a tokenizer
    does in which they were added as special tokens. White space before them is text to it,
    unless they were added with ``lstrip``: a byte-level one makes a token of it.

    Args:
        text: one cell of one example. Its characters are Unicode code points; the result has
            no others, but for such spaces and the special tokens.
        augmentation: the rates.
        draw: source of random numbers, best ``Random(derive_seed("augment", seed, epoch, row))``;
            only its ``random()``, whose sequence is the same in every version of Python.
        unknown: the unknown token's text, not empty where ``word_dropout`` is on.
        mask: the mask token's text, not empty where ``word_mask`` is on. Where a word is hit by
            both, the mask stays. Character noise spares words that are one of these tokens.
    """
    assert (unknown or not augmentation.word_dropout) and (mask or not augmentation.word_mask)
    words = split_words(text)
    if not words or not augmentation.changes_text:
        return text
    *gaps, tail = _WORD.split(text)
    swapped = _swap(words, augmentation.word_swap, draw)
    removed = _hits(len(words), augmentation.word_deletion, draw)
    if len(removed) == len(words):
        removed.pop(_below(len(words), draw))
    words, gaps = _without(removed, words, gaps)
    if swapped or removed:
        _part_words(words, gaps)
    for i in _hits(len(words), augmentation.word_dropout, draw):
        words[i] = unknown
    for i in _hits(len(words), augmentation.word_mask, draw):
        words[i] = mask
    words = _add_noise(words, augmentation.char_noise, draw, spared=(unknown, mask))
    words, gaps = _without([i for i, word in enumerate(words) if not word], words, gaps)
    return "".join(itertools.chain.from_iterable(zip(gaps, words, strict=True))) + tail


def _parse_rate(kind: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise UsageError(
            f"{kind} is '{value}'; a rate is a number, as in {kind}={DEFAULT_RATES[kind]}."
        ) from None


def _below(count: int, draw: random.Random) -> int:
    """Returns a number in [0, count); Python's own ways may change with its version."""
    return int(draw.random() * count)


def _hits(count: int, rate: float, draw: random.Random) -> list[int]:
    """Returns which of ``count`` things are hit, each at ``rate``."""
    return [i for i in range(count) if draw.random() < rate] if rate else []


def _swap(words: list[str], rate: float, draw: random.Random) -> bool:
    """Exchanges words in place; returns whether it did."""
    num_swaps = len(_hits(len(words), rate, draw)) if len(words) > 1 else 0
    for _ in range(num_swaps):
        i, j = _below(len(words), draw), _below(len(words) - 1, draw)
        j += j >= i
        words[i], words[j] = words[j], words[i]
    return num_swaps > 0


def _without(
    removed: Collection[int], words: list[str], gaps: list[str]
) -> tuple[list[str], list[str]]:
    """Returns the other words and the gap before each; the text begins as it did."""
    if not removed:
        return words, gaps
    gone = set(removed)
    kept = [i for i in range(len(words)) if i not in gone]
    return [words[i] for i in kept], [gaps[0], *(gaps[i] for i in kept[1:])]


def _part_words(words: Sequence[str], gaps: list[str]) -> None:
    """Puts a space where neighbours have none and would read as one word."""
    for i in range(1, len(words)):
        if not gaps[i] and not any(map(_UNSPACED_WORD.match, words[i - 1 : i + 1])):
            gaps[i] = " "


def _add_noise(
    words: list[str], rate: float, draw: random.Random, *, spared: Collection[str]
) -> list[str]:
    """Returns the words with characters edited; some may be empty, but not all."""
    if not rate:
        return words
    places = [
        (w, i) for w, word in enumerate(words) if word not in spared for i in range(len(word))
    ]
    hits = _hits(len(places), rate, draw)
    if not hits:
        return words
    alphabet = sorted({words[w][i] for w, i in places})
    # Each place holds what is written there: nothing, a character, or two.
    written = [list(word) for word in words]
    num_left = len(places)
    for w, i in (places[hit] for hit in hits):
        word = written[w]
        edits = ["double"]
        edits += ["delete"] if num_left > 1 else []
        edits += ["replace"] if len(alphabet) > 1 else []
        edits += ["exchange"] if i + 1 < len(word) else []
        edit = edits[_below(len(edits), draw)]
        if edit == "double":
            word[i] *= 2
        elif edit == "delete":
            word[i] = ""
            num_left -= 1
        elif edit == "replace":
            other = _below(len(alphabet) - 1, draw)
            word[i] = alphabet[other + (alphabet[other] >= word[i])]
        else:
            word[i], word[i + 1] = word[i + 1], word[i]
    return ["".join(characters) for characters in written]
