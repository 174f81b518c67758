"""Augmentation: as often as asked for, the same again, never nothing left, in every script."""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenizer import CORPUS

from hasten.core.errors import UsageError
from hasten.core.seeds import derive_seed
from hasten.data import tokenizer as tokenizers
from hasten.data.augment import (
    DEFAULT_RATES,
    KINDS,
    Augmentation,
    augment_text,
    parse_augmentation,
    split_words,
)
from hasten.data.tokenizer import MASK, UNKNOWN, train_tokenizer

TEXT_KINDS = [kind for kind in KINDS if kind != "bpe_dropout"]
WORDS = [f"{a}{b}" for a in "bcdfghjk" for b in ("ame", "ilo", "oru", "est", "ity")]  # 40, distinct
RATE = st.one_of(st.just(0.0), st.floats(0, 1, exclude_max=True))
SEED = st.integers(0, 2**63 - 1)
AUGMENTATION = st.builds(Augmentation, **dict.fromkeys(KINDS, RATE))
# Words that stay words wherever they are put: no marks that would join what stands before them.
PARTS = st.lists(
    st.sampled_from(
        ["abc", "d,", "3", "(e", "é", "слово", "말", "月", "年", "の", "ก", " ", "\n "]
    ),
    max_size=14,
)


def augment(text: str, seed: int = 0, **rates: float) -> str:
    draw = random.Random(seed)
    return augment_text(text, Augmentation(**rates), draw, unknown=UNKNOWN, mask=MASK)


def assert_binomial(count: int, trials: int, probability: float):
    """Checks a count against six standard deviations: chance alone exceeds them never."""
    deviation = math.sqrt(trials * probability * (1 - probability))
    assert abs(count - trials * probability) <= 6 * deviation
    assert 6 * deviation < 0.3 * trials * probability  # else the bound would say little


def is_subsequence(part: Sequence[str], whole: Sequence[str]) -> bool:
    rest = iter(whole)
    return all(item in rest for item in part)


# --- what is a word ----------------------------------------------------------------------------


@given(st.text())
def test_every_character_but_white_space_is_in_one_word(text: str):
    words = split_words(text)
    assert "".join(words) == "".join(text.split())
    assert all(words)


@given(st.text(st.characters(max_codepoint=0x5FF)), st.sampled_from(["", " 한국어는 띄어쓴다"]))
def test_where_there_are_spaces_words_are_what_lies_between_them(text: str, more: str):
    assert split_words(text + more) == (text + more).split()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("我喜欢它。", ["我", "喜", "欢", "它", "。"]),
        ("用 Python写", ["用", "Python", "写"]),
        ("3月4日", ["3", "月", "4", "日"]),
        ("ガギ", ["ガ", "ギ"]),
        ("ガキ", ["ガ", "キ"]),  # voiced by a mark of its own
        ("ที่นี่", ["ที่", "นี่"]),
        ("don't  stop\u00a0now", ["don't", "stop", "now"]),
        ("葛󠄀城", ["葛󠄀", "城"]),  # with a variation selector
        ("𠮷野", ["𠮷", "野"]),
    ],
)
def test_words_of_scripts_without_spaces_are_characters(text: str, words: list[str]):
    assert split_words(text) == words


# --- what always holds -------------------------------------------------------------------------


@given(text=st.text(), seed=SEED, bpe_dropout=RATE)
def test_at_rate_0_the_text_is_the_same_and_nothing_is_drawn(
    text: str, seed: int, bpe_dropout: float
):
    draw = random.Random(seed)
    before = draw.getstate()
    augmentation = Augmentation(bpe_dropout=bpe_dropout)
    assert augment_text(text, augmentation, draw, unknown="", mask="") == text
    assert draw.getstate() == before


@settings(max_examples=400)
@given(text=st.text(), augmentation=AUGMENTATION, seed=SEED)
def test_any_text_keeps_a_word_and_gets_no_strange_characters(
    text: str, augmentation: Augmentation, seed: int
):
    found = augment_text(text, augmentation, random.Random(seed), unknown=UNKNOWN, mask=MASK)
    again = augment_text(text, augmentation, random.Random(seed), unknown=UNKNOWN, mask=MASK)
    assert found == again
    assert bool(split_words(found)) == bool(split_words(text))
    assert set(found) <= set(text) | set(UNKNOWN) | set(MASK) | {" "}
    found.encode()  # no lone surrogates
    if not split_words(text):
        assert found == text


@pytest.mark.parametrize("kind", TEXT_KINDS)
def test_a_text_for_which_nothing_is_drawn_is_the_same(kind: str):
    text = "  Odd\t white \n\n space, 也 在 这里。ที่นี่ \u2003"
    assert {augment(text, seed, **{kind: 1e-9}) for seed in range(20)} == {text}


@pytest.mark.parametrize("kind", TEXT_KINDS)
def test_each_example_is_drawn_for_itself(kind: str):
    """By (seed, epoch, row) alone: whichever rows were drawn before."""
    texts = [" ".join(WORDS[i:] + WORDS[:i]) for i in range(6)]
    augmentation = Augmentation(**{kind: 0.2})

    def draw_row(seed: int, epoch: int, row: int) -> str:
        draw = random.Random(derive_seed("augment", seed, epoch, row))
        return augment_text(texts[row], augmentation, draw, unknown=UNKNOWN, mask=MASK)

    places = [(seed, epoch, row) for seed in (0, 1) for epoch in (0, 1) for row in range(6)]
    forwards = {place: draw_row(*place) for place in places}
    backwards = {place: draw_row(*place) for place in reversed(places)}
    assert forwards == backwards
    assert len(set(forwards.values())) == len(places)


class OnlyRandom(random.Random):
    """Refuses the methods whose results may change with the version of Python."""

    def getrandbits(self, k: int, /) -> int:
        raise AssertionError("drawn by another method than random()")


@given(text=PARTS.map("".join), augmentation=AUGMENTATION, seed=SEED)
def test_draws_are_the_same_in_every_version_of_python(
    text: str, augmentation: Augmentation, seed: int
):
    augment_text(text, augmentation, OnlyRandom(seed), unknown=UNKNOWN, mask=MASK)


def test_draws_are_those_of_earlier_runs():
    """Another result here means that a run begun before would be resumed as another run."""
    text = "The quick brown fox, jumps over\nthe lazy dog; 天气很好。"
    rates = dict.fromkeys(TEXT_KINDS, 0.15)
    assert [augment(text, seed, **rates) for seed in (1, 4)] == [
        "dog; quick br气n 。 over\n气 [UNK] 好 [MASK]the很The",
        "The [MASK] [MASK] 。 jums\nthe lazy odg; 天很好好fox,",
    ]


# --- swap --------------------------------------------------------------------------------------


@given(parts=PARTS, rate=RATE, seed=SEED)
def test_swapping_keeps_the_words(parts: list[str], rate: float, seed: int):
    text = "".join(parts)
    found = augment(text, seed, word_swap=rate)
    assert Counter(split_words(found)) == Counter(split_words(text))


@given(text=st.text(), rate=RATE, seed=SEED)
def test_swapping_keeps_every_character_and_the_white_space(text: str, rate: float, seed: int):
    found = augment(text, seed, word_swap=rate)
    assert Counter("".join(found.split())) == Counter("".join(text.split()))
    if split_words(text) == text.split():
        assert re.sub(r"\S+", "x", found) == re.sub(r"\S+", "x", text)


@pytest.mark.parametrize(("num_words", "rate"), [(2, 0.1), (2, 0.7), (3, 0.1), (10, 0.1)])
def test_words_are_moved_as_often_as_random_transpositions_move_them(num_words: int, rate: float):
    """A word's place is a Markov chain with the eigenvalue 1 - 2 / (n - 1); swaps are binomial."""
    words, trials = WORDS[:num_words], 20_000
    moved = sum(
        augment(" ".join(words), seed, word_swap=rate).split()[0] != words[0]
        for seed in range(trials)
    )
    mixed = 1 - (1 - 2 * rate / (num_words - 1)) ** num_words
    assert_binomial(moved, trials, (1 - 1 / num_words) * mixed)


def test_every_place_is_as_likely():
    words, trials = WORDS[:5], 20_000
    found = [augment(" ".join(words), seed, word_swap=0.9).split() for seed in range(trials)]
    for place in range(5):
        stays = sum(text[place] == words[place] for text in found)
        mixed = 1 - (1 - 2 * 0.9 / 4) ** 5
        assert_binomial(stays, trials, 1 - 0.8 * mixed)


# --- deletion ----------------------------------------------------------------------------------


@given(parts=PARTS, rate=RATE, seed=SEED)
def test_what_deletion_leaves_is_a_subsequence(parts: list[str], rate: float, seed: int):
    text = "".join(parts)
    found = augment(text, seed, word_deletion=rate)
    assert is_subsequence(split_words(found), split_words(text))
    assert sum(map(str.isspace, found)) <= sum(map(str.isspace, text)) + len(split_words(found))


def test_words_are_deleted_at_the_rate():
    trials = 500
    text = " ".join(WORDS)
    left = Counter(
        word for seed in range(trials) for word in augment(text, seed, word_deletion=0.1).split()
    )
    assert_binomial(trials * len(WORDS) - left.total(), trials * len(WORDS), 0.1)
    for word in (WORDS[0], WORDS[17], WORDS[-1]):
        assert_binomial(left[word], trials, 0.9)


def test_one_word_at_random_stays_where_all_would_go():
    assert {augment(" alone ", seed, word_deletion=0.9) for seed in range(50)} == {" alone "}
    left = Counter(augment("a b", seed, word_deletion=0.5) for seed in range(4000))
    assert set(left) == {"a b", "a", "b"}
    assert_binomial(left["a b"], 4000, 0.25)
    assert_binomial(left["a"], 4000, 0.375)


def test_white_space_before_a_word_goes_with_it():
    found = {augment("  a b\n\nc\td \n", seed, word_deletion=0.5) for seed in range(500)}
    spaced = [("a", "  "), ("b", " "), ("c", "\n\n"), ("d", "\t")]
    expected = set()
    for chosen in range(1, 16):
        kept = [pair for i, pair in enumerate(spaced) if chosen >> i & 1]
        body = "".join(space + word for word, space in kept).lstrip()
        expected.add("  " + body + " \n")
    assert found == expected


def test_words_that_touched_no_others_do_not_become_one():
    assert {augment("ab月cd", seed, word_deletion=0.4) for seed in range(300)} == {
        *("ab月cd", "ab月", "月cd", "ab cd", "ab", "月", "cd")
    }


# --- dropout and mask --------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "token"), [("word_dropout", UNKNOWN), ("word_mask", MASK)])
def test_words_become_the_token_at_the_rate_and_others_stay(kind: str, token: str):
    trials, count = 500, 0
    for seed in range(trials):
        found = augment("\n".join(WORDS), seed, **{kind: 0.15}).split("\n")
        assert all(a in (token, b) for a, b in zip(found, WORDS, strict=True))
        count += found.count(token)
    assert_binomial(count, trials * len(WORDS), 0.15)


def test_characters_of_scripts_without_spaces_become_tokens_one_by_one():
    found = Counter(augment("天气很好", seed, word_mask=0.3) for seed in range(5000))
    assert len(found) == 16
    assert_binomial(found[f"天气{MASK}好"], 5000, 0.3 * 0.7**3)


def test_where_dropout_and_mask_meet_the_mask_stays():
    trials = 500
    found = Counter(
        word
        for seed in range(trials)
        for word in augment(" ".join(WORDS), seed, word_dropout=0.4, word_mask=0.3).split()
    )
    assert_binomial(found[MASK], trials * len(WORDS), 0.3)
    assert_binomial(found[UNKNOWN], trials * len(WORDS), 0.4 * 0.7)


@pytest.mark.parametrize("kind", tokenizers.KINDS)
def test_a_tokenizer_reads_every_inserted_token_as_special(kind: str):
    tokenizer = train_tokenizer(CORPUS, kind=kind, vocab_size=400)
    tokenizer.encode_special_tokens = False  # as where texts are augmented, and only there
    mask = tokenizer.token_to_id(MASK)
    assert mask is not None
    for seed, text in enumerate(CORPUS):
        found = augment(text, seed, word_mask=0.3, char_noise=0.05)
        ids = tokenizer.encode(found, add_special_tokens=False).ids
        assert ids.count(mask) == found.count(MASK)


# --- character noise ---------------------------------------------------------------------------


def test_characters_are_edited_at_the_rate():
    """With distinct characters every edit shows, so a text is the same only without edits."""
    text, trials, rate = "abcdefghijklmnop qrst", 10_000, 0.02
    same = sum(augment(text, seed, char_noise=rate) == text for seed in range(trials))
    assert_binomial(same, trials, (1 - rate) ** 20)


def test_edits_are_equally_likely():
    rate, trials = 0.05, 100_000
    found = Counter(augment("abc", seed, char_noise=rate) for seed in range(trials))
    # Hits on two characters may lead to some of these texts too, much less often.
    once = rate * (1 - rate) ** 2
    for text in ("bc", "ac", "aabc", "abbc", "bac", "acb"):  # deleted, doubled, exchanged
        assert_binomial(found[text], trials, once / 4)
    for text in ("bbc", "cbc", "aac", "acc"):  # replaced by one of two others
        assert_binomial(found[text], trials, once / 4 / 2)
    # The last character has none to be exchanged with, so its other edits are likelier.
    for text, share in (("ab", 1), ("abcc", 1), ("aba", 1 / 2), ("abb", 1 / 2)):
        assert_binomial(found[text], trials, once / 3 * share)


@settings(max_examples=300)
@given(text=st.text(max_size=30), rate=RATE, seed=SEED)
def test_noise_stays_within_words_and_their_characters(text: str, rate: float, seed: int):
    found = augment(text, seed, char_noise=rate)
    assert set(found) <= set(text)
    assert len(found) <= 2 * len(text)
    spaces = [c for c in text if c.isspace()]
    assert is_subsequence([c for c in found if c.isspace()], spaces)
    assert bool(found.split()) == bool(text.split())


@pytest.mark.parametrize("text", ["x", "xx", "é", "👍🏽", "月", "a b", "\ud83d"])
def test_noise_leaves_something_of_the_shortest_texts(text: str):
    found = {augment(text, seed, char_noise=0.99) for seed in range(300)}
    assert all(found) and len(found) > 1
    assert all(set(changed) <= set(text) for changed in found)


def test_a_word_without_characters_leaves_no_gap():
    found = {augment("ab c de", seed, char_noise=0.2) for seed in range(300)}
    assert "ab de" in found
    assert not any("  " in text for text in found)


@given(seed=SEED, rate=st.floats(0.3, 1, exclude_max=True))
def test_noise_spares_special_tokens(seed: int, rate: float):
    text = " ".join(WORDS)
    words = {"word_dropout": 0.3, "word_mask": 0.3}
    before = augment(text, seed, **words)
    after = augment(text, seed, **words, char_noise=rate)
    assert after.count(MASK) == before.count(MASK)
    assert after.count(UNKNOWN) == before.count(UNKNOWN)
    assert not {"[", "]"} & set(after.replace(MASK, "").replace(UNKNOWN, ""))
    assert after != before


# --- what a person writes ----------------------------------------------------------------------


@given(rates=st.dictionaries(st.sampled_from(KINDS), RATE), shuffled=st.randoms())
def test_written_rates_are_read_back(rates: dict[str, float], shuffled: random.Random):
    parts = [f"{kind}={rate!r}" for kind, rate in rates.items()]
    shuffled.shuffle(parts)
    found = parse_augmentation(parts)
    assert asdict(found) == {kind: rates.get(kind, 0.0) for kind in KINDS}
    assert found.changes_text == any(rates.get(kind, 0.0) for kind in TEXT_KINDS)
    assert found.is_off == (not any(rates.values()))


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_without_a_rate_has_the_usual_one(kind: str):
    found = parse_augmentation([kind])
    assert asdict(found) == {**dict.fromkeys(KINDS, 0.0), kind: DEFAULT_RATES[kind]}
    assert 0 < DEFAULT_RATES[kind] <= 0.2
    assert not found.is_off and found.changes_text == (kind != "bpe_dropout")


@pytest.mark.parametrize("parts", [[], ["none"], [""], [" ", " none "]])
def test_nothing_and_none_turn_all_off(parts: list[str]):
    assert parse_augmentation(parts) == Augmentation()
    assert Augmentation().is_off


def test_space_around_kinds_and_rates_is_of_no_account():
    found = parse_augmentation([" word_swap ", "char_noise = 0.3"])
    assert found == Augmentation(word_swap=DEFAULT_RATES["word_swap"], char_noise=0.3)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (["word_swp"], "unknown augmentation 'word_swp'.*Did you mean 'word_swap'"),
        (["charnoise=0.1"], "Did you mean 'char_noise'"),
        (["backtranslation"], "there are word_dropout, word_swap"),
        (["word_mask", "word_mask=0.2"], "'word_mask' is named twice"),
        (["word_mask=1"], r"word_mask is 1.0; a rate is at least 0 and below 1"),
        (["word_mask=-0.1"], "at least 0 and below 1"),
        (["bpe_dropout=inf"], "bpe_dropout is inf"),
        (["char_noise=nan"], "char_noise is nan"),
        (["char_noise=much"], "char_noise is 'much'; a rate is a number"),
        (["char_noise="], "char_noise is ''; a rate is a number"),
        (["none", "word_swap"], "'none' stands alone"),
        (["none=0.1"], "'none' stands alone"),
    ],
)
def test_mistakes_are_named(parts: list[str], message: str):
    with pytest.raises(UsageError, match=message) as caught:
        parse_augmentation(parts)
    assert "\n" not in str(caught.value)


def test_rates_are_checked_however_they_are_given():
    with pytest.raises(UsageError, match="word_swap is 2"):
        Augmentation(word_swap=2)
