"""Answers scored as by the official scripts: cases by hand, and slower ways to the same numbers."""

from __future__ import annotations

import string

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.task.span_metrics import (
    AnswerScore,
    Language,
    answer_scores,
    best_threshold,
    choose_language,
)


@pytest.mark.parametrize(
    ("prediction", "answers", "exact_match", "f1"),
    [
        ("The cat", ["cat"], 1, 1),
        ("  CAT. ", ["the cat!"], 1, 1),
        ("Paris, France", ["Paris"], 0, 2 / 3),
        ("dog", ["cat"], 0, 0),
        # The best over the gold answers, for each measure: 2 of 3 and 2 of 2 words.
        ("in the year 1990", ["1990", "the year 1990"], 0, 4 / 5),
        ("1990", ["the year 1990", "1990"], 1, 1),
        # A word counts as often as both have it: one new and one york, of three each.
        ("new new york", ["new york york"], 0, 2 / 3),
        # Order does not count for F1.
        ("york new", ["new york"], 0, 1),
        # Punctuation leaves no space behind, and goes before the articles.
        ("well-known", ["well known"], 0, 0),
        ("U.S.", ["us"], 1, 1),
        ("A-list", ["list"], 0, 0),
        ("(the) end", ["end"], 1, 1),
        ("$5", ["5"], 1, 1),
        # Articles are whole words.
        ("another theatre", ["other atre"], 0, 0),
        ("à la carte", ["la carte"], 0, 4 / 5),
        # Only ASCII's punctuation is dropped.
        ("“Paris”", ["Paris"], 0, 0),
        ("1914–1918", ["1914-1918"], 0, 0),
        # Case is folded beyond ASCII, composition is not; any white space parts words.
        ("CAFÉ", ["café"], 1, 1),
        ("cafe\u0301", ["caf\u00e9"], 0, 0),
        ("New\u00a0York", ["New  York"], 1, 1),
        # Questions without answer.
        ("", [], 1, 1),
        ("Paris", [], 0, 0),
        ("", ["Paris"], 0, 0),
        ("the", [], 1, 1),
        ("the", ["A!"], 1, 1),
        ("", ["the", "cat"], 0, 0),
        ("", [""], 1, 1),
        ("cat", ["", "cat"], 1, 1),
    ],
)
def test_squad_scores_by_hand(prediction: str, answers: list[str], exact_match: float, f1: float):
    found = answer_scores(prediction, answers, language="words")
    assert (found.exact_match, found.f1) == (exact_match, pytest.approx(f1))


@pytest.mark.parametrize(
    ("prediction", "answers", "exact_match", "f1"),
    [
        ("北京", ["北京"], 1, 1),
        ("北京市", ["北京"], 0, 4 / 5),
        ("上海", ["北京"], 0, 0),
        ("北京市", ["上海", "北京", "北京城市"], 0, 4 / 5),
        # The longest run without a gap (two), not the longest subsequence (three).
        ("中华人民", ["中国人民"], 0, 4 / 8),
        ("民人", ["人民"], 0, 2 / 4),
        # Marks on the script's list are dropped, within a word too.
        ("《红楼梦》", ["红楼梦。"], 1, 1),
        ("T-Shirt", ["tshirt"], 1, 1),
        # Marks not on its list stay, and so does the ellipsis that it cannot match.
        ("‘北京", ["北京"], 0, 4 / 5),
        ("北京,", ["北京"], 0, 4 / 5),
        ("北京…", ["北京"], 0, 4 / 5),
        ("(2008年)", ["2008年"], 0, 4 / 6),
        # Words and numbers are one token each.
        ("Apple公司", ["apple公司"], 1, 1),
        ("Apple", ["Apples"], 0, 0),
        ("iPhone手机", ["手机"], 0, 4 / 5),
        ("1990年", ["1990年5月"], 0, 4 / 6),
        ("1,000元", ["1000元"], 0, 2 / 4),
        ("3.5万", ["3.5亿"], 0, 2 / 4),
        ("50%的", ["50的"], 0, 2 / 5),
        ("hello world.", ["hello world"], 0, 4 / 5),
        ("e.g. x", ["e.g. y"], 0, 2 / 4),
        ("don't", ["do"], 0, 2 / 3),
        ("it's, x", ["it"], 0, 2 / 5),
        # Articles count here.
        ("the end", ["end"], 0, 2 / 3),
        # White space within counts for the exact match only.
        ("北 京", ["北京"], 0, 1),
        # Beyond the script: kana one by one, and questions without answer.
        ("東京タワー", ["東京"], 0, 4 / 7),
        ("", [], 1, 1),
        ("。", [], 1, 1),
        ("", ["北京"], 0, 0),
        ("北京", ["。", ""], 0, 0),
        ("北京", ["。", "北京"], 1, 1),
        ("", ["。", "北京"], 0, 0),
    ],
)
def test_cmrc_scores_by_hand(prediction: str, answers: list[str], exact_match: float, f1: float):
    found = answer_scores(prediction, answers, language="characters")
    assert (found.exact_match, found.f1) == (exact_match, pytest.approx(f1))


def harmonic_mean(num_shared: int, num_predicted: int, num_gold: int) -> float:
    if not num_shared:
        return 0.0
    precision, recall = num_shared / num_predicted, num_shared / num_gold
    return 2 * precision * recall / (precision + recall)


PLAIN_WORDS = st.lists(
    st.sampled_from(["new", "york", "city", "of", "big"]), min_size=1, max_size=7
)


@settings(max_examples=300)
@given(predicted=PLAIN_WORDS, gold=PLAIN_WORDS)
def test_words_are_shared_as_often_as_both_have_them(predicted: list[str], gold: list[str]):
    left = list(gold)
    shared = [word for word in predicted if word in left and (left.remove(word) or True)]
    found = answer_scores(" ".join(predicted), [" ".join(gold)], language="words")
    assert found.f1 == pytest.approx(harmonic_mean(len(shared), len(predicted), len(gold)))
    assert found.exact_match == (predicted == gold)


HAN = st.text("北京上海中国", min_size=1, max_size=9)


@settings(max_examples=300)
@given(predicted=HAN, gold=HAN)
def test_the_longest_run_is_found(predicted: str, gold: str):
    runs = {predicted[i:j] for i in range(len(predicted)) for j in range(i, len(predicted) + 1)}
    longest = max(len(run) for run in runs if run in gold)
    found = answer_scores(predicted, [gold], language="characters")
    assert found.f1 == pytest.approx(harmonic_mean(longest, len(predicted), len(gold)))


MIXED = st.text("ab the北京タ .,'…“" + string.punctuation, max_size=12)
LANGUAGES = st.sampled_from(["words", "characters"])


@settings(max_examples=300)
@given(prediction=MIXED, answers=st.lists(MIXED, max_size=3), more=MIXED, language=LANGUAGES)
def test_scores_are_fractions_and_no_gold_answer_more_lowers_them(
    prediction: str, answers: list[str], more: str, language: Language
):
    found = answer_scores(prediction, answers, language=language)
    assert 0 <= found.exact_match <= found.f1 <= 1
    has_answer = answer_scores("", answers, language=language) == AnswerScore(0, 0)
    if has_answer:
        with_more = answer_scores(prediction, [*answers, more], language=language)
        assert with_more.f1 >= found.f1 and with_more.exact_match >= found.exact_match


@given(answer=MIXED, others=st.lists(MIXED, max_size=3), language=LANGUAGES)
def test_a_gold_answer_is_right_unless_it_is_empty(
    answer: str, others: list[str], language: Language
):
    if answer_scores(answer, [], language=language).f1 == 0:
        assert answer_scores(answer, [*others, answer], language=language) == AnswerScore(1, 1)
    else:
        assert answer_scores(answer, [answer], language=language) == AnswerScore(1, 1)
        assert answer_scores(answer, [answer, "x"], language=language) == AnswerScore(0, 0)


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["北京是中国的首都", "in 2008"], "characters"),
        (["東京タワーはどこですか"], "characters"),
        (["What does 北京 mean?"], "words"),
        (["서울은 한국의 수도이다"], "words"),
        (["12 + 30", ""], "words"),
        ([], "words"),
    ],
)
def test_the_language_is_that_of_most_letters(texts: list[str], expected: Language):
    assert choose_language(texts) == expected


def total_f1(
    differences: np.ndarray, f1s: np.ndarray, no_answer: np.ndarray, threshold: float
) -> float:
    return float(np.where(differences > threshold, no_answer, f1s).sum())


# Quarters add up without rounding, so that equally good thresholds are exactly so.
QUESTIONS = st.lists(
    st.tuples(
        st.one_of(st.integers(-4, 4).map(float), st.floats(-1e6, 1e6)),
        st.sampled_from([0.0, 0.25, 0.5, 1.0]),
        st.booleans(),
    ),
    min_size=1,
    max_size=14,
)


@settings(max_examples=500)
@given(questions=QUESTIONS)
def test_no_threshold_is_better_and_no_equally_good_one_answers_less(
    questions: list[tuple[float, float, bool]],
):
    differences, f1s, no_answer = (np.array(column) for column in zip(*questions, strict=True))
    threshold = best_threshold(differences, f1s, no_answer)
    candidates = [differences.min() - 1, *np.unique(differences)]
    totals = [total_f1(differences, f1s, no_answer, t) for t in candidates]
    assert total_f1(differences, f1s, no_answer, threshold) == max(totals)
    first = candidates[totals.index(max(totals))]
    assert ((differences <= threshold) == (differences <= first)).all()


ULP = float(np.finfo(np.float64).eps)


@pytest.mark.parametrize(
    ("differences", "f1s", "no_answer", "expected"),
    [
        ([-3.0, -1.0, 2.0], [1.0, 1.0, 0.0], [False, False, True], 0.5),
        ([5.0, -4.0, -2.0], [0.0, 1.0, 0.0], [True, False, True], -3.0),
        # All are better left without answer, or all answered.
        ([2.0, 3.0], [0.0, 0.0], [True, True], 1.0),
        ([2.0, 3.0], [0.5, 0.5], [False, False], 4.0),
        # Of equal differences all or none: one F1 of 0.9 is not worth two wrong answers.
        ([1.0, 1.0, 1.0], [0.9, 0.0, 0.0], [False, True, True], 0.0),
        # A span that is empty in its plain form is right where there is no answer.
        ([1.0, 2.0], [1.0, 1.0], [True, False], 3.0),
        # Neighbouring floats have nothing between them.
        ([1.0, 1.0 + ULP], [1.0, 0.0], [False, True], 1.0),
        ([1.0 + ULP, 1.0 + 2 * ULP], [1.0, 0.0], [False, True], 1.0 + ULP),
    ],
)
def test_thresholds_by_hand(
    differences: list[float], f1s: list[float], no_answer: list[bool], expected: float
):
    assert best_threshold(differences, f1s, no_answer) == expected
