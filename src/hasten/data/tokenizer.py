"""Trains or loads a tokenizer of the `tokenizers` library.

    texts -> train_tokenizer(kind, vocab_size) -> Tokenizer -> tokenizer.json
    tokenizer.json -> load_tokenizer -----------^

Special tokens have the same names and, where we train, the same ids in every kind.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from hasten.core.errors import DamagedError, DataError, UsageError

PAD, UNKNOWN, CLASS, SEPARATOR, MASK = SPECIAL_TOKENS = (
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
)
KINDS = ("bpe", "wordpiece", "unigram", "word", "char", "byte")
_MIN_FREQUENCY = 2  # a piece seen once teaches nothing and takes a row of the embedding


def choose_vocab_size(
    num_characters: int, kind: str, *, generates: bool = False
) -> tuple[int, str]:
    """Returns a vocabulary size for an amount of text, and the reason.

    A piece's embedding is learned from its occurrences, so the vocabulary grows with the text
    (about its square root, as the number of words does: Heaps' law), between 1,000 and 32,000.
    A model that generates must also learn when to say each piece, and gets fewer of them.
    """
    if kind == "byte":
        return 256 + len(SPECIAL_TOKENS), "one token a byte"
    size = 1000 * max(1, min(32, round((3 if generates else 10) * math.sqrt(num_characters / 1e6))))
    return size, f"{num_characters:,} characters of text"


def train_tokenizer(
    texts: Iterable[str],
    *,
    kind: str = "bpe",
    vocab_size: int,
    lowercase: bool = False,
    exact: bool = False,
    split_han: bool = False,
) -> Tokenizer:
    """Trains a tokenizer on ``texts``.

    Args:
        texts: read once, in order; the result depends on nothing else.
        kind: one of ``KINDS``. bpe is byte-level and so knows every text; wordpiece, unigram,
            word and char have an unknown token.
        vocab_size: upper bound on the number of tokens, special tokens included.
        lowercase: fold case first.
        exact: decoding gives back a text to the letter (kinds bpe, byte and char): nothing is
            normalised, and no space is put before the first word.
        split_han: no token of kinds that join characters holds a Han character and another, so
            that tokens can begin and end at each; decoding then puts spaces around them.

    Raises:
        UsageError: an unknown kind.
        DataError: no text to train on.
    """
    if kind not in KINDS:
        raise UsageError(f"unknown tokenizer kind '{kind}'; there are {', '.join(KINDS)}.")
    model, splitter, decoder, trainer = _parts(kind, vocab_size, exact)
    if split_han and kind not in ("char", "byte"):
        if kind == "unigram":  # else the mark of a space would be put before each of them
            splitter = pre_tokenizers.Metaspace(prepend_scheme="first")
        each = pre_tokenizers.Split(Regex(r"\p{Han}"), "isolated")
        splitter = pre_tokenizers.Sequence([each, splitter])
    tokenizer = Tokenizer(model)
    steps: list[normalizers.Normalizer] = [] if exact else [normalizers.NFC()]
    if lowercase:
        steps.append(normalizers.Lowercase())
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoder
    tokenizer.train_from_iterator(texts, trainer=trainer)
    tokenizer = _in_fixed_order(tokenizer)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    if tokenizer.get_vocab_size() <= len(SPECIAL_TOKENS):
        raise DataError("there is no text to train a tokenizer on.")
    return reading_names_as_text(tokenizer)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Loads a tokenizer.json, or the one in a folder.

    Raises:
        UsageError: there is no such file.
        DamagedError: it is not a tokenizer.
    """
    path = Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise UsageError(f"{file}: no such tokenizer file.")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises a bare Exception
        raise DamagedError(f"{file}: not a tokenizer.json: {error}.") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return reading_names_as_text(tokenizer)


def token_named(tokenizer: Tokenizer, *names: str) -> str:
    """Returns the first of the names that the tokenizer has as a token.

    Raises:
        UsageError: it has none of them.
    """
    for name in names:
        if tokenizer.token_to_id(name) is not None:
            return name
    raise UsageError(f"the tokenizer has no {names[0]} token, which is needed here.")


def special_token_ids(tokenizer: Tokenizer) -> list[int]:
    """Returns the ids of the tokens that no text is made of, in order."""
    tokens = tokenizer.get_added_tokens_decoder()
    return sorted(number for number, token in tokens.items() if token.special)


def unknown_id(tokenizer: Tokenizer) -> int:
    """Returns the id that stands for a text without any token: unknown, else padding, else 0."""
    for token in (UNKNOWN, "<unk>", PAD, "<pad>"):
        found = tokenizer.token_to_id(token)
        if found is not None:
            return found
    return 0


def reading_names_as_text(tokenizer: Tokenizer) -> Tokenizer:
    """Makes "[SEP]" in a person's text six characters, not the token that ends a text."""
    tokenizer.encode_special_tokens = True
    return tokenizer


def _in_fixed_order(tokenizer: Tokenizer) -> Tokenizer:
    """Renumbers the tokens of kinds whose trainer numbers them in the order of a hash table."""
    content = json.loads(tokenizer.to_str())
    vocab, special = content["model"]["vocab"], set(SPECIAL_TOKENS)
    if content["model"]["type"] == "Unigram":
        # The scores' last digits depend on how threads happened to share the work.
        rounded = [(token, round(score, 6)) for token, score in vocab if token not in special]
        rounded = _rank_required_characters(rounded)
        rounded.sort(key=lambda entry: (-entry[1], entry[0]))
        content["model"]["vocab"] = [(token, 0.0) for token in SPECIAL_TOKENS] + rounded
        content["model"]["unk_id"] = SPECIAL_TOKENS.index(UNKNOWN)
    elif content["model"]["type"] == "WordPiece":
        tokens = [*SPECIAL_TOKENS, *sorted(token for token in vocab if token not in special)]
        content["model"]["vocab"] = {token: i for i, token in enumerate(tokens)}
    return Tokenizer.from_str(json.dumps(content))


def _rank_required_characters(scored: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """Gives the scores of characters that no piece covered to these characters in fixed order.

    The trainer adds them in the order of a hash table, at the lowest score plus 0, 0.0001,
    0.0002 ... (`tokenizers` 0.23, UnigramTrainer.finalize).
    """
    lowest = min(score for _, score in scored)
    added = {
        token: score
        for token, score in scored
        if len(token) == 1 and abs((steps := (score - lowest) / 1e-4) - round(steps)) < 0.02
    }
    fixed = dict(zip(sorted(added), sorted(added.values()), strict=True))
    return [(token, fixed.get(token, score)) for token, score in scored]


def _parts(
    kind: str, vocab_size: int, exact: bool
) -> tuple[models.Model, pre_tokenizers.PreTokenizer, decoders.Decoder, trainers.Trainer]:
    special = list(SPECIAL_TOKENS)
    words = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if kind in ("bpe", "byte"):
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size if kind == "bpe" else len(alphabet) + len(special),
            min_frequency=_MIN_FREQUENCY,
            special_tokens=special,
            initial_alphabet=alphabet,
            show_progress=False,
        )
        splitter = pre_tokenizers.ByteLevel(add_prefix_space=not exact)
        return models.BPE(), splitter, decoders.ByteLevel(), trainer
    if kind == "wordpiece":
        trainer = trainers.WordPieceTrainer(
            vocab_size=vocab_size,
            min_frequency=_MIN_FREQUENCY,
            special_tokens=special,
            show_progress=False,
        )
        return models.WordPiece(unk_token=UNKNOWN), words, decoders.WordPiece(), trainer
    if kind == "unigram":
        trainer = trainers.UnigramTrainer(
            vocab_size=vocab_size, special_tokens=special, unk_token=UNKNOWN, show_progress=False
        )
        return models.Unigram(), pre_tokenizers.Metaspace(), decoders.Metaspace(), trainer
    trainer = trainers.WordLevelTrainer(
        vocab_size=vocab_size,
        min_frequency=_MIN_FREQUENCY if kind == "word" else 1,
        special_tokens=special,
        show_progress=False,
    )
    # Every character by itself: an empty pattern would match between them, "(?m)." matches each.
    splitter = words if kind == "word" else pre_tokenizers.Split(Regex("(?m)."), "isolated")
    decoder = decoders.Fuse() if kind == "char" else decoders.WordPiece(prefix="")
    return models.WordLevel(unk_token=UNKNOWN), splitter, decoder, trainer
