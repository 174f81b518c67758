"""Translation metrics: sacrebleu's numbers, and edit distances checked by another algorithm."""

from __future__ import annotations

import functools
import logging
import math
import subprocess
import sys

import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.task.text_metrics import (
    ScriptCounts,
    count_scripts,
    edit_distance,
    token_error_rate,
    translation_metrics,
)

SEQUENCES = st.lists(st.sampled_from("abcd"), max_size=9)


def recursive_distance(a: list[str], b: list[str]) -> int:
    """Levenshtein's definition, as it stands."""

    @functools.cache
    def distance(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        kept = distance(i - 1, j - 1) + (a[i - 1] != b[j - 1])
        return min(kept, distance(i - 1, j) + 1, distance(i, j - 1) + 1)

    return distance(len(a), len(b))


@settings(max_examples=500)
@given(a=SEQUENCES, b=SEQUENCES)
def test_the_edit_distance_is_levenshteins(a: list[str], b: list[str]):
    assert edit_distance(a, b) == recursive_distance(a, b) == edit_distance(b, a)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ("kitten", "sitting", 3),
        ("", "abc", 3),
        ("abc", "", 3),
        ("", "", 0),
        ("x", "yz", 2),
        ("ab", "ba", 2),  # a swap is no single edit
        (("the", "cat"), ["the", "cat"], 0),
        ([1, None, "a"], [1, "a"], 1),
        ("a" * 300, "b" + "a" * 299, 1),
    ],
)
def test_edit_distances_by_hand(a: str, b: str, expected: int):
    assert edit_distance(a, b) == expected


@pytest.mark.parametrize(
    ("hypotheses", "references", "expected"),
    [
        (["the cat sat"], ["the cat sat"], 0.0),
        (["the cat"], ["the cat sat"], 1 / 3),
        (["the cat  sat\n"], [" the cat sat"], 0.0),
        # Edits are summed before they are divided: 1 of 1 and 0 of 3 make 1 of 4, not 1/2.
        (["no", "a b c"], ["yes", "a b c"], 1 / 4),
        (["a b c d e"], ["a"], 4.0),
        ([""], ["a b"], 1.0),
        (["a b"], [""], 2.0),
        ([""], [""], 0.0),
        # By characters where no spaces stand between words, whatever spaces there are.
        (["我爱北京"], ["我爱 南京"], 1 / 4),
        (["東京タワー"], ["東京タワー。"], 1 / 6),
        # Korean has spaces between words.
        (["나는 학교에 간다"], ["나는 학교에 갔다"], 1 / 3),
        # The corpus decides, not the single text.
        (["IBM", "我们去北京"], ["IBN", "我们去北京"], 1 / 8),
    ],
)
def test_token_error_rates_by_hand(hypotheses: list[str], references: list[str], expected: float):
    assert token_error_rate(hypotheses, references) == pytest.approx(expected)


WORDS = st.lists(st.sampled_from(["a", "cat", "dog.", "sat", ",", "Übung"]), max_size=9)
SENTENCES = st.lists(st.tuples(WORDS.map(" ".join), WORDS.map(" ".join)), min_size=1, max_size=6)


@given(pairs=SENTENCES)
def test_bleu_and_chrf_are_sacrebleus(pairs: list[tuple[str, str]]):
    hypotheses, references = (list(side) for side in zip(*pairs, strict=True))
    found = translation_metrics(hypotheses, references)
    assert found["bleu"] == sacrebleu.corpus_bleu(hypotheses, [references]).score
    assert found["chrf"] == sacrebleu.corpus_chrf(hypotheses, [references]).score
    assert found["num_examples"] == len(pairs)
    assert 0 <= found["exact_match"] <= 1 and found["token_error_rate"] >= 0


@pytest.mark.parametrize(
    ("hypothesis", "reference", "tokenizer"),
    [
        ("the cat sat on a mat", "the cat sat on the mat", "13a"),
        ("кошка сидела на ковре", "кошка сидит на ковре", "13a"),
        ("我今天去北京看朋友", "我今天要去北京看朋友", "zh"),
        ("我昨天用Python写程序", "我们昨天用Python写程序", "zh"),
        ("今日は東京に行きます", "今日は東京へ行きます", "char"),
        ("나는 오늘 학교에 간다", "나는 오늘 학교에 갔다", "char"),
        ("ผมไปโรงเรียน", "ฉันไปโรงเรียน", "char"),
    ],
)
def test_bleus_tokenizer_follows_the_references(hypothesis: str, reference: str, tokenizer: str):
    found = translation_metrics([hypothesis], [reference])
    expected = sacrebleu.corpus_bleu([hypothesis], [[reference]], tokenize=tokenizer).score
    assert found["bleu"] == expected > 0
    assert f"|tok:{tokenizer}|" in found["bleu_signature"]
    assert found["bleu_signature"].endswith(f"version:{sacrebleu.__version__}")
    assert found["chrf_signature"].endswith(f"version:{sacrebleu.__version__}")


def test_bleu_by_hand():
    # Every n-gram is right; one token of six is missing: the brevity penalty alone.
    found = translation_metrics(["a b c d e"], ["a b c d e f"])
    assert found["bleu"] == pytest.approx(100 * math.exp(1 - 6 / 5))
    assert found["exact_match"] == 0 and found["token_error_rate"] == pytest.approx(1 / 6)


def test_what_is_right_scores_full_marks():
    texts = ["The cat sat on the mat.", "It was late, and it rained."]
    found = translation_metrics([texts[0], f"{texts[1]}\n"], texts)
    assert found["bleu"] == pytest.approx(100) and found["chrf"] == pytest.approx(100)
    assert (found["exact_match"], found["token_error_rate"]) == (1, 0)
    assert translation_metrics([texts[0], "no"], texts)["exact_match"] == 0.5


def test_text_without_a_word_is_scored():
    found = translation_metrics(["", "12"], ["", ""])
    assert (found["bleu"], found["exact_match"], found["token_error_rate"]) == (0, 0.5, 1)


def test_spaced_full_stops_cause_no_warning(caplog: pytest.LogCaptureFixture):
    texts = [f"sentence {i} ." for i in range(150)]
    with caplog.at_level(logging.WARNING):
        translation_metrics(texts, texts)
    assert not caplog.records


def test_scripts_by_hand():
    assert count_scripts(["北京 is 2008 年!", "カナ_한국"]) == ScriptCounts(3, 5, 2, 2)
    assert count_scripts([]) == ScriptCounts(0, 0, 0, 0)
    assert not count_scripts(["北京ab"]).mostly_unspaced  # half is not most


@given(text=st.text(st.characters(categories=["L"])))
def test_every_letter_is_counted_once(text: str):
    counts = count_scripts([text, "1 2, 3"])
    assert counts.unspaced + counts.hangul + counts.other == len(text)
    assert counts.han <= counts.unspaced


def test_sacrebleu_is_imported_only_when_needed():
    code = "import sys, hasten.task.text_metrics; sys.exit('sacrebleu' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
