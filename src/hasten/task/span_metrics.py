"""How good extracted answers are, scored as SQuAD's and CMRC 2018's own scripts do.

prediction, gold answers --plain form--> exact match
                         --tokens------> F1; the best over the gold answers
score differences, F1 of the best spans --> threshold above which there is no answer
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Literal, NamedTuple

import numpy as np

from hasten.data.scripts import UNSPACED
from hasten.task.text_metrics import count_scripts

_ARTICLE = re.compile(r"\b(a|an|the)\b")
_NO_ASCII_PUNCTUATION = str.maketrans("", "", string.punctuation)
# What CMRC 2018's script drops, no more: its list also names the two-character ellipsis, but it
# compares single characters, so that an ellipsis stays.
_NO_CMRC_PUNCTUATION = str.maketrans("", "", "-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』")
_UNSPACED_CHARACTER = re.compile(f"([{UNSPACED}])")
# What the Penn Treebank's rules set apart: marks, a comma unless a digit follows, the last full
# stop; then quotation marks and the endings of English contractions.
_MARK = re.compile(
    r"\.{2,}|[;@#$%&?!()\[\]{}<>\"“”‘’„«»‒–—―]|,(?!\d)|(?<=[^.])\.(?=[\])}>\"'”’»\s]*$)"
)
_QUOTE_OR_ENDING = re.compile(
    r"(?<!\w)'(?!(?:s|m|d|t|n|ll|re|ve)\b)(?=\w)|(?<=[^'\s])(?:'(?:s|m|d|ll|re|ve)?|n't)(?!\S)"
)

Language = Literal["words", "characters"]


@dataclass(frozen=True, slots=True)
class AnswerScore:
    """How well one prediction agrees with the best of its gold answers, 0 to 1."""

    exact_match: float
    f1: float


class _Scoring(NamedTuple):
    """How a text becomes its plain form, that its tokens, and how many of them two texts share."""

    plain: Callable[[str], str]
    tokens_of: Callable[[str], list[str]]
    num_shared: Callable[[list[str], list[str]], int]


def choose_language(texts: Iterable[str]) -> Language:
    """Returns how answers in texts like these are scored.

    ``characters`` if most letters are of scripts without spaces between words (Chinese, Japanese,
    Thai and others). Korean has spaces and is scored by words.
    """
    return "characters" if count_scripts(texts).mostly_unspaced else "words"


def answer_scores(prediction: str, answers: Sequence[str], *, language: Language) -> AnswerScore:
    """Scores one predicted answer, "" for none.

    ``words`` is the official SQuAD v2.0 script (Rajpurkar et al. 2018): lower case, without ASCII
    punctuation and the articles a, an, the; F1 counts the words that both have. It differs from
    v1.1 (Rajpurkar et al. 2016) only where a side is empty in this form: a prediction then scores
    1 if the other is empty too, else 0, and gold answers that are empty do not count.

    ``characters`` is the official CMRC 2018 script (Cui et al. 2019): lower case, without the
    marks on its list; each Chinese character is a token, other words are tokens as a whole; F1
    counts the longest run of tokens that both have without a gap. What is ours: kana and the
    letters of other scripts without spaces between words are tokens of their own as well, empty
    sides are scored as above, and words are split by the main rules of the Penn Treebank, where
    the script calls a library that knows a few more.

    Args:
        prediction: the answer to score.
        answers: the gold answers; none, or only empty ones, if the question has no answer.
        language: which of the two.
    """
    plain, tokens_of, num_shared = _SCORING[language]
    golds = [gold for answer in answers if tokens_of(gold := plain(answer))] or [""]
    predicted = plain(prediction)
    tokens = tokens_of(predicted)
    return AnswerScore(
        exact_match=float(predicted in golds),
        f1=max(_f1(tokens, tokens_of(gold), num_shared) for gold in golds),
    )


def best_threshold(
    score_differences: Sequence[float] | np.ndarray,
    answer_f1s: Sequence[float] | np.ndarray,
    no_answer: Sequence[bool] | np.ndarray,
) -> float:
    """Chooses from which score difference on a question counts as having no answer.

    The rule is: no answer if the difference is greater than the threshold. Like SQuAD v2.0's
    script, this takes the lowest cut of highest total F1. Unlike it, differences may be negative,
    equal ones are never parted, and the threshold lies halfway between the differences on either
    side of the cut (1 beyond the outermost), so that rounding does not flip a question.

    Args:
        score_differences: (E,) score of "no answer" minus that of the best span; at least one.
        answer_f1s: (E,) F1 of that span; for a question without answer 0, unless the span is
            empty in its plain form.
        no_answer: (E,) whether the question has no answer.
    """
    differences = np.asarray(score_differences, dtype=np.float64)
    assert len(differences) == len(answer_f1s) == len(no_answer) > 0
    assert np.isfinite(differences).all()
    # Giving the span instead of no answer wins its F1 and loses the 1 of a question without.
    gains = np.asarray(answer_f1s, dtype=np.float64) - np.asarray(no_answer, dtype=bool)
    order = np.argsort(differences, kind="stable")
    differences, gains = differences[order], gains[order]
    totals = np.concatenate([[0.0], np.cumsum(gains)])  # of answering only the first k questions
    totals[1:-1][differences[1:] == differences[:-1]] = -np.inf
    cut = int(np.argmax(totals))
    if cut == 0:
        return float(differences[0] - 1)
    if cut == len(differences):
        return float(differences[-1] + 1)
    below, above = differences[cut - 1 : cut + 1]
    middle = below / 2 + above / 2
    return float(middle if below <= middle < above else below)


def _plain_words(text: str) -> str:
    # Punctuation goes first and leaves no space: "well-known" is one word and "a.m." is "am".
    bare = text.lower().translate(_NO_ASCII_PUNCTUATION)
    return " ".join(_ARTICLE.sub(" ", bare).split())


def _plain_characters(text: str) -> str:
    return text.lower().strip().translate(_NO_CMRC_PUNCTUATION)


def _segments(text: str) -> list[str]:
    """Splits into single characters of unspaced scripts and the words between them."""
    tokens: list[str] = []
    for piece in _UNSPACED_CHARACTER.split(text):
        spaced = _MARK.sub(r" \g<0> ", piece)
        tokens += _QUOTE_OR_ENDING.sub(r" \g<0> ", spaced).split()
    return tokens


def _num_in_both(a: list[str], b: list[str]) -> int:
    return (Counter(a) & Counter(b)).total()


def _longest_run(a: list[str], b: list[str]) -> int:
    return SequenceMatcher(None, a, b, autojunk=False).find_longest_match().size


def _f1(
    predicted: list[str], gold: list[str], num_shared: Callable[[list[str], list[str]], int]
) -> float:
    if not predicted or not gold:
        return float(predicted == gold)
    # The harmonic mean of shared / predicted and shared / gold.
    return 2 * num_shared(predicted, gold) / (len(predicted) + len(gold))


_SCORING: dict[Language, _Scoring] = {
    "words": _Scoring(_plain_words, str.split, _num_in_both),
    "characters": _Scoring(_plain_characters, _segments, _longest_run),
}
