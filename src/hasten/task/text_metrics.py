"""How good translations are: strings in, numbers out.

references --count_scripts--> BLEU's tokenizer; words or characters as tokens
hypotheses, references --> BLEU, chrF (sacrebleu), exact match, token error rate
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from hasten.data.scripts import HAN, HANGUL, UNSPACED

_PATTERNS = {
    "han": re.compile(f"[{HAN}]"),
    "unspaced": re.compile(f"[{UNSPACED}]"),
    "hangul": re.compile(f"[{HANGUL}]"),
    "other": re.compile(rf"[^\W\d_{UNSPACED}{HANGUL}]"),
}
# Han characters are nearly all of a Chinese text and about half of a Japanese one.
_CHINESE_SHARE = 0.9


@dataclass(frozen=True, slots=True)
class ScriptCounts:
    """How many letters of some texts are of which script.

    Attributes:
        han: Chinese characters, which Japanese uses too.
        unspaced: letters of all scripts without spaces between words, ``han`` among them.
        hangul: Korean letters; Korean has spaces, but BLEU needs smaller tokens than its words.
        other: all other letters.
    """

    han: int
    unspaced: int
    hangul: int
    other: int

    @property
    def mostly_unspaced(self) -> bool:
        """Whether more than half of the letters are of scripts without spaces between words."""
        return self.unspaced > self.hangul + self.other


def count_scripts(texts: Iterable[str]) -> ScriptCounts:
    """Counts the letters of ``texts`` by script."""
    joined = "\n".join(texts)
    return ScriptCounts(**{name: len(p.findall(joined)) for name, p in _PATTERNS.items()})


def translation_metrics(hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    """Compares translations with one reference each.

    BLEU (Papineni et al. 2002) and chrF (Popović 2015) are sacrebleu's with its default settings,
    except that BLEU's tokenizer follows the references: ``zh`` if they are mostly Chinese,
    ``char`` if mostly Japanese, Korean, Thai, Lao, Burmese or Khmer. The signatures say it.

    Args:
        hypotheses: what the model wrote, at least one.
        references: what is right, one for each.

    Returns:
        ``bleu`` and ``chrf``, 0 to 100, with ``bleu_signature`` and ``chrf_signature``;
        ``exact_match``, the share of hypotheses equal to their reference up to white space;
        ``token_error_rate``, see there; ``num_examples``.
    """
    # Imported here because most runs have no use for it.
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    assert len(hypotheses) == len(references) > 0
    # Forcing only keeps a warning quiet: text with a space before its full stop is not an error.
    bleu = BLEU(tokenize=_bleu_tokenizer(count_scripts(references)), force=True)
    chrf = CHRF()
    pairs = list(zip(hypotheses, references, strict=True))
    return {
        "bleu": bleu.corpus_score(hypotheses, [references]).score,
        "chrf": chrf.corpus_score(hypotheses, [references]).score,
        "bleu_signature": str(bleu.get_signature()),
        "chrf_signature": str(chrf.get_signature()),
        "exact_match": sum(h.split() == r.split() for h, r in pairs) / len(pairs),
        "token_error_rate": token_error_rate(hypotheses, references),
        "num_examples": len(pairs),
    }


def token_error_rate(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """Returns the edits from hypotheses to references for each reference token.

    Tokens are words between white space; characters other than white space if the references
    are mostly of scripts without spaces between words.

    Returns:
        The sum of edit distances over the number of reference tokens: 0 where all is right; above
        1 where hypotheses are much too long. Without any reference token, the number of edits.
    """
    by_character = count_scripts(references).mostly_unspaced
    edits = num_tokens = 0
    for hypothesis, reference in zip(hypotheses, references, strict=True):
        expected = _tokens_of(reference, by_character)
        edits += edit_distance(_tokens_of(hypothesis, by_character), expected)
        num_tokens += len(expected)
    return edits / max(num_tokens, 1)


def edit_distance(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """Returns the least number of insertions, deletions and substitutions that turn a into b.

    Levenshtein's distance by the algorithm of Wagner and Fischer (1974), a row at a time.
    """
    if len(a) > len(b):
        a, b = b, a  # fewer and longer rows
    numbers: dict[Hashable, int] = {}
    a_ids, b_ids = ([numbers.setdefault(item, len(numbers)) for item in items] for items in (a, b))
    b_array = np.array(b_ids, dtype=np.int64)
    columns = np.arange(len(b) + 1)
    row = columns
    for item in a_ids:
        # The best without an insertion last: a deletion, or a substitution if the two differ.
        best = row + 1
        best[1:] = np.minimum(best[1:], row[:-1] + (b_array != item))
        # Insertions chain along the row: min over k <= j of best[k] + (j - k).
        row = np.minimum.accumulate(best - columns) + columns
    return int(row[-1])


def _bleu_tokenizer(counts: ScriptCounts) -> Literal["13a", "zh", "char"]:
    if counts.unspaced + counts.hangul <= counts.other:
        return "13a"
    chinese = counts.han > _CHINESE_SHARE * (counts.unspaced + counts.hangul)
    return "zh" if chinese else "char"


def _tokens_of(text: str, by_character: bool) -> Sequence[str]:
    words = text.split()
    return "".join(words) if by_character else words
