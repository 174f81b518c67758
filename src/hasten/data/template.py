"""What a pretrained model's tokenizer puts around and between texts.

tokenizer.json's post-processor --read_template--> Template
BERT       [CLS] a [SEP] b [SEP]        types 0 0 0 1 1
RoBERTa    <s> a </s></s> b </s>        types 0
GPT-2      a b                          nothing
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer, processors

from hasten.core.errors import DamagedError


@dataclass(frozen=True)
class Template:
    """Token ids around and between the segments of a sequence.

    Attributes:
        first: before the first segment.
        between: after each segment but the last.
        last: after the last.
        numbers_segments: whether a token's type is its segment; else all are 0.
    """

    first: tuple[int, ...] = ()
    between: tuple[int, ...] = ()
    last: tuple[int, ...] = ()
    numbers_segments: bool = False

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Template:
        """Rebuilds what ``dataclasses.asdict`` made."""
        ids = {name: tuple(values[name]) for name in ("first", "between", "last")}
        return cls(**ids, numbers_segments=bool(values["numbers_segments"]))

    @property
    def num_tokens(self) -> int:
        """How many it adds to two segments."""
        return len(self.first) + len(self.between) + len(self.last)


@dataclass(frozen=True)
class Framing:
    """What a pretrained model wants around texts.

    Attributes:
        read: around and between the texts that it reads.
        written: around a text that it writes; what comes first is what it goes on from, and what
            comes last ends it. Between a prompt and the text that answers it stands ``between``.
    """

    read: Template
    written: Template

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Framing:
        """Rebuilds what ``dataclasses.asdict`` made."""
        return cls(Template.from_json(values["read"]), Template.from_json(values["written"]))


def template_from_json(values: Mapping[str, Any] | None) -> Template | None:
    """Rebuilds what ``dataclasses.asdict`` made, where there is anything."""
    return None if values is None else Template.from_json(values)


def framing_from_json(values: Mapping[str, Any] | None) -> Framing | None:
    """Rebuilds what ``dataclasses.asdict`` made, where there is anything."""
    return None if values is None else Framing.from_json(values)


def read_template(tokenizer: Tokenizer) -> Template:
    """Returns the template of a tokenizer's post-processor; an empty one where it has none.

    Raises:
        DamagedError: a post-processor of another kind, one that contradicts itself, or one whose
            tokens the vocabulary has not.
    """
    template = _read(json.loads(tokenizer.to_str()).get("post_processor"))
    for number in (*template.first, *template.between, *template.last):
        _token(tokenizer, number)
    return template


def with_template(tokenizer: Tokenizer, template: Template) -> Tokenizer:
    """Returns a copy that puts special tokens around texts by itself, for other programs.

    Raises:
        DamagedError: the vocabulary has not all of them.
    """
    copy = Tokenizer.from_str(tokenizer.to_str())
    names: dict[str, int] = {}

    def pieces(ids: tuple[int, ...], segment: int) -> list[str]:
        found = []
        for number in ids:
            token = _token(tokenizer, number)
            names[token] = number
            found.append(f"{token}:{segment}")
        return found

    second = int(template.numbers_segments)
    first, last = pieces(template.first, 0), pieces(template.last, 0)
    parts = [*first, "$A:0", *pieces(template.between, 0), f"$B:{second}"]
    copy.post_processor = processors.TemplateProcessing(
        single=[*first, "$A:0", *last],
        pair=[*parts, *pieces(template.last, second)],
        special_tokens=list(names.items()),
    )
    return copy


def _token(tokenizer: Tokenizer, number: int) -> str:
    token = tokenizer.id_to_token(number)
    if token is None:
        raise DamagedError(
            f"the tokenizer's post-processor puts token {number} around texts, but its vocabulary "
            f"of {tokenizer.get_vocab_size():,} tokens has none of that number."
        )
    return token


def _read(processor: Mapping[str, Any] | None) -> Template:
    kind = None if processor is None else processor["type"]
    if processor is None or kind == "ByteLevel":  # that moves offsets alone
        return Template()
    if kind == "Sequence":
        found = [one for one in map(_read, processor["processors"]) if one != Template()]
        if len(found) > 1:
            raise DamagedError("the tokenizer has several post-processors that add tokens.")
        return found[0] if found else Template()
    if kind in ("BertProcessing", "RobertaProcessing"):
        begin, end = int(processor["cls"][1]), int(processor["sep"][1])
        is_bert = kind == "BertProcessing"
        return Template((begin,), (end,) if is_bert else (end, end), (end,), is_bert)
    if kind == "TemplateProcessing":
        return _of_pieces(processor)
    raise DamagedError(f"the tokenizer's post-processor is {kind}, which is not honoured here.")


def _of_pieces(processor: Mapping[str, Any]) -> Template:
    special = {name: tuple(one["ids"]) for name, one in processor["special_tokens"].items()}
    runs: list[tuple[int, ...]] = [()]
    types: list[int] = []
    for piece in processor["pair"]:
        if "Sequence" in piece:
            types.append(int(piece["Sequence"]["type_id"]))
            runs.append(())
        else:
            runs[-1] += special[piece["SpecialToken"]["id"]]
    alone: list[tuple[int, ...]] = [()]
    for piece in processor["single"]:
        if "Sequence" in piece:
            alone.append(())
        else:
            alone[-1] += special[piece["SpecialToken"]["id"]]
    if len(runs) != 3 or len(alone) != 2 or (runs[0], runs[2]) != (alone[0], alone[1]):
        raise DamagedError(
            "the tokenizer's template treats one text and two in different ways, which is not "
            "honoured here."
        )
    return Template(runs[0], runs[1], runs[2], types[1] > types[0])
