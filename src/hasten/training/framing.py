"""The special tokens that a pretrained model wants around texts, in all families.

tokenizer, config.json, generation_config.json, languages --read_framing--> Framing

reads                     writes: what it goes on from, the text, what ends it
BERT           [CLS] a [SEP] b [SEP]
GPT-2          a                         <|endoftext|> y <|endoftext|>
Llama          <s> a                     <s> y </s>
T5, Marian     a </s>                    <pad> y </s>
BART           <s> a </s>                </s> <s> y </s>
M2M100, NLLB   [from] a </s>             </s> [to] y </s>
mBART-50       [from] a </s>             </s> [to] y </s>
mBART          a </s> [from]             [to] y </s> [to]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from hasten.core.errors import DamagedError, UsageError, nearest
from hasten.data.pretrained_tokenizer import PretrainedTokenizers
from hasten.data.template import Framing, Template, read_template
from hasten.model.config import Architecture
from hasten.model.pretrained.generation import generation_start

_SHOWN = 6
# The classes of mBART of 25 languages, which puts a text's language after it.
_LANGUAGE_LAST = ("MBartTokenizer", "MBartTokenizerFast")


@dataclass(frozen=True)
class Described:
    """What a pretrained folder says in words.

    Attributes:
        name: as a person called it.
        config: config.json.
        generation: generation_config.json; None without one.
        tokenizer: tokenizer_config.json; empty without one.
        architecture: of the model.
        vocab_size: rows of its embedding of tokens; of the target, where the source has its own.
        has_types: whether it tells segments apart by token types.
    """

    name: str
    config: Mapping[str, Any]
    generation: Mapping[str, Any] | None
    tokenizer: Mapping[str, Any]
    architecture: Architecture
    vocab_size: int
    has_types: bool


def read_framing(
    described: Described,
    vocabulary: PretrainedTokenizers,
    languages: tuple[str | None, str | None] = (None, None),
) -> Framing:
    """Returns what a pretrained model wants around texts.

    Args:
        described: its folder.
        vocabulary: its tokenizers, and their special tokens.
        languages: codes of the languages that are read and written, for a model of many.

    Raises:
        UsageError: a language is not named, is not known, or is named to a model of one.
        DamagedError: the folder does not say what begins or ends a text, or names a token that
            the vocabulary has not.
    """
    if vocabulary.languages and described.architecture == "encoder_decoder":
        return _with_languages(described, vocabulary, languages)
    if any(languages):
        raise UsageError(
            f"tokenizer.source_language, tokenizer.target_language: {described.name} has no codes "
            "of languages; leave them out."
        )
    read = _template(described, vocabulary.tokenizers[0])
    if not described.has_types:
        read = Template(read.first, read.between, read.last)
    if described.architecture == "encoder":
        return Framing(read, read)
    end = (_end(described, vocabulary),)
    if described.architecture == "decoder":
        begin = vocabulary.token_id("bos_token")
        first = read.first or end if begin is None else (begin,)
        return Framing(read, Template(first, _line_end(vocabulary.tokenizers[0]), end))
    start = _start(described)
    if start is None:
        start = _number(described, "pad_token_id")
    if start is None:
        raise DamagedError(f"{described.name}: config.json has no decoder_start_token_id.")
    own = _template(described, vocabulary.tokenizers[-1])
    return Framing(read, Template((start, *own.first), (), own.last or end))


def _template(described: Described, tokenizer: Tokenizer) -> Template:
    try:
        return read_template(tokenizer)
    except DamagedError as error:
        raise DamagedError(f"{described.name}: {error}") from None


def _line_end(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Returns the tokens of a line's end after a word; alone it may get a space of its own."""
    word, line = (tokenizer.encode(t, add_special_tokens=False).ids for t in ("a", "a\n"))
    return tuple(line[len(word) :])


def _with_languages(
    described: Described,
    vocabulary: PretrainedTokenizers,
    languages: tuple[str | None, str | None],
) -> Framing:
    codes = list[int]()
    for side, wanted in zip(("source", "target"), languages, strict=True):
        known = vocabulary.languages
        # "en" is enough for __en__ and en_XX.
        fitting = [code for code in known if wanted in (code, code.strip("_"), code[:-3])]
        if wanted is None or len(fitting) != 1:
            said = "name it" if wanted is None else f"there is no '{wanted}'"
            some = ", ".join(known[:_SHOWN]) + " ..." * (len(known) > _SHOWN)
            raise UsageError(
                f"tokenizer.{side}_language: {described.name} reads and writes many languages; "
                f"{said} ({some}).{nearest(wanted or '', list(known))}"
            )
        number = vocabulary.tokenizers[0].token_to_id(fitting[0])
        assert number is not None
        codes.append(number)
    source, target = codes
    end = _end(described, vocabulary)
    if vocabulary.tokenizers[0].id_to_token(end) is None:
        raise DamagedError(f"{described.name}: eos_token_id is {end}, which is no token.")
    if described.tokenizer.get("tokenizer_class") in _LANGUAGE_LAST:
        return Framing(Template((), (), (end, source)), Template((target,), (), (end, target)))
    start = _start(described)
    return Framing(
        Template((source,), (), (end,)),
        Template((end if start is None else start, target), (), (end,)),
    )


def _end(described: Described, vocabulary: PretrainedTokenizers) -> int:
    found = vocabulary.token_id("eos_token")
    if found is None:
        found = vocabulary.token_id("sep_token")
    if found is not None:
        return _checked(described, "the eos token", found)
    found = _number(described, "eos_token_id")
    if found is None:
        raise DamagedError(f"{described.name}: neither tokenizer nor config.json has an eos token.")
    return found


def _number(described: Described, key: str) -> int | None:
    for content in (described.generation or {}, described.config):
        value = content.get(key)
        if isinstance(value, list):
            value = value[0] if value else None
        if value is not None:
            return _checked(described, key, value)
    return None


def _start(described: Described) -> int | None:
    found = generation_start(described.config, described.generation).start
    return None if found is None else _checked(described, "decoder_start_token_id", found)


def _checked(described: Described, key: str, value: Any) -> int:
    """Returns the number of a token, which may be another file's word for it."""
    if type(value) is not int or not 0 <= value < described.vocab_size:
        raise DamagedError(
            f"{described.name}: {key} is {value!r}, which is none of the {described.vocab_size:,} "
            "rows of the embedding."
        )
    return value
