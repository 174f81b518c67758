"""The tokenizer of a pretrained folder, and what it calls its special tokens.

tokenizer.json, or the files of a family --read_tokenizers--> PretrainedTokenizers
                                         names: tokenizer_config.json, special_tokens_map.json,
                                         else the class of the tokenizer, else config.json
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from hasten.core.errors import DamagedError, UsageError
from hasten.core.files import read_object
from hasten.data.tokenizer import load_tokenizer, reading_names_as_text
from hasten.data.tokenizer_families import Described, read_files, tokenizer_class

_LANGUAGE = re.compile(r"__[a-z]{2,3}__|[a-z]{2}_[A-Z]{2}|[a-z]{3}_[A-Z][a-z]{3}")
_NAMES = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "pad", "cls", "sep", "mask"))
_TOKENIZER, _CONFIG = "tokenizer.json", "tokenizer_config.json"


@dataclass(frozen=True)
class PretrainedTokenizers:
    """Tokenizers and the names of their special tokens.

    Attributes:
        tokenizers: one, or one for the source and one for the target.
        names: special tokens by the names of transformers, such as ``eos_token``.
        languages: tokens that are codes of languages.
    """

    tokenizers: tuple[Tokenizer, ...]
    names: Mapping[str, str] = field(default_factory=dict)
    languages: tuple[str, ...] = ()

    def token_id(self, name: str) -> int | None:
        """Returns the number of a special token; None where there is none."""
        token = self.names.get(name)
        return None if token is None else self.tokenizers[0].token_to_id(token)


def read_tokenizers(folder: Path) -> PretrainedTokenizers:
    """Reads the tokenizers of a folder.

    Raises:
        UsageError: there is none, or one of a class that is not covered.
        DamagedError: a file is damaged, or contradicts another.
    """
    config, model = _object(folder / _CONFIG), _object(folder / "config.json")
    said = _said_names(folder, config)
    name, family = tokenizer_class(folder, config, model.get("model_type"))
    usual = {} if family is None else family.names
    if (folder / _TOKENIZER).is_file():
        tokenizers = (load_tokenizer(folder),)
        if not config.get("tokenizer_class"):
            usual = {}
    elif family is None:
        raise UsageError(
            f"{folder}: there is no {_TOKENIZER}, and {name} is not read from other files. Write "
            f"it once: transformers.AutoTokenizer.from_pretrained(F).save_pretrained(F)"
        )
    else:
        tokens = {**usual, **{key: token for key, token in said.items() if token is not None}}
        tokenizers = read_files(name, family, Described(folder, config, tokens))
        for tokenizer in tokenizers:
            _add_tokens(tokenizer, folder, config)
            kept = [t for t in tokens.values() if tokenizer.token_to_id(t) is not None]
            tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in kept])
            reading_names_as_text(tokenizer)
    first = tokenizers[0]
    added = [token.content for _, token in sorted(first.get_added_tokens_decoder().items())]
    names = dict[str, str]()
    for key in _NAMES:
        token = said.get(key)
        if key not in said:
            token = usual[key] if usual.get(key) in added else _of_number(first, model, key)
        if token is not None and first.token_to_id(token) is not None:
            names[key] = token
    return PretrainedTokenizers(tokenizers, names, tuple(filter(_LANGUAGE.fullmatch, added)))


def _said_names(folder: Path, config: Mapping[str, Any]) -> dict[str, str | None]:
    """Returns what the files call special tokens; None of those that they say there are not."""
    found = dict[str, str | None]()
    for content in (_object(folder / "special_tokens_map.json"), config):
        for name in _NAMES:
            if name in content:
                value = content[name]
                token = value.get("content") if isinstance(value, dict) else value
                found[name] = token if isinstance(token, str) else None
    return found


def _of_number(tokenizer: Tokenizer, model: Mapping[str, Any], name: str) -> str | None:
    value = model.get(f"{name}_id")
    value = value[0] if isinstance(value, list) and value else value
    if not isinstance(value, int) or not 0 <= value < 1 << 32:
        return None
    return tokenizer.id_to_token(value)


def _add_tokens(tokenizer: Tokenizer, folder: Path, config: Mapping[str, Any]) -> None:
    """Adds the tokens that were added to a vocabulary later, with the numbers that they have."""
    legacy = _object(folder / "added_tokens.json")
    wanted = {number: AddedToken(text, normalized=False) for text, number in legacy.items()}
    try:
        for number, value in (config.get("added_tokens_decoder") or {}).items():
            options = {key: bool(value[key]) for key in ("special", "lstrip", "rstrip")}
            wanted[int(number)] = AddedToken(value["content"], normalized=False, **options)
        ordered = sorted(wanted.items())
    except (AttributeError, KeyError, TypeError, ValueError):
        raise DamagedError(f"{folder / _CONFIG}: added_tokens_decoder is damaged.") from None
    for number, token in ordered:
        tokenizer.add_tokens([token])
        if tokenizer.token_to_id(token.content) != number:
            raise DamagedError(
                f"{folder}: {token.content} should be token {number}, but the vocabulary makes it "
                f"{tokenizer.token_to_id(token.content)}."
            )


def _object(file: Path) -> dict[str, Any]:
    return read_object(file) if file.is_file() else {}
