"""The tokenizer of a pretrained folder, and what it calls its special tokens.

folder --read_tokenizers--> PretrainedTokenizers
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import Tokenizer

from hasten.data.tokenizer import load_tokenizer

_LANGUAGE = re.compile(r"__[a-z]{2,3}__|[a-z]{2}_[A-Z]{2}|[a-z]{3}_[A-Z][a-z]{3}")


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
    """Reads the tokenizers of a folder."""
    tokenizer = load_tokenizer(folder)
    names: dict[str, str] = {}
    file = folder / "tokenizer_config.json"
    if file.is_file():
        for name, value in json.loads(file.read_text(encoding="utf-8")).items():
            token = value.get("content") if isinstance(value, dict) else value
            if name.endswith("_token") and isinstance(token, str):
                names[name] = token
    added = (token.content for token in tokenizer.get_added_tokens_decoder().values())
    languages = tuple(token for token in added if _LANGUAGE.fullmatch(token))
    return PretrainedTokenizers((tokenizer,), names, languages)
