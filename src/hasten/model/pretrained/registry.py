"""All families of pretrained models: one line each.

config.json --model_type--> Family
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hasten.core.errors import UsageError, nearest
from hasten.model.pretrained.bart import BART, MBART
from hasten.model.pretrained.bert import BERT
from hasten.model.pretrained.distilbert import DISTILBERT
from hasten.model.pretrained.electra import ELECTRA
from hasten.model.pretrained.family import Family
from hasten.model.pretrained.gemma2 import GEMMA2
from hasten.model.pretrained.gemma3 import GEMMA3
from hasten.model.pretrained.gpt2 import GPT2
from hasten.model.pretrained.llama import LLAMA
from hasten.model.pretrained.m2m100 import M2M100
from hasten.model.pretrained.marian import MARIAN
from hasten.model.pretrained.mistral import MISTRAL
from hasten.model.pretrained.modernbert import MODERNBERT
from hasten.model.pretrained.qwen2 import QWEN2
from hasten.model.pretrained.qwen3 import QWEN3
from hasten.model.pretrained.roberta import ROBERTA
from hasten.model.pretrained.t5 import MT5, T5

FAMILIES: tuple[Family, ...] = (
    MODERNBERT,
    BERT,
    ROBERTA,
    DISTILBERT,
    ELECTRA,
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    GPT2,
    GEMMA2,
    GEMMA3,
    T5,
    MT5,
    BART,
    MBART,
    MARIAN,
    M2M100,
)
"""In the order in which they are tried where a model of ours is written."""


def family_of(content: Mapping[str, Any], origin: str) -> Family:
    """Returns the family of a config.json.

    Raises:
        UsageError: none has its ``model_type``.
    """
    known = {name: family for family in FAMILIES for name in family.model_types}
    name = content.get("model_type")
    if not isinstance(name, str) or name not in known:
        raise UsageError(
            f"{origin}: model_type is {name!r}; there are {', '.join(known)}."
            f"{nearest(str(name), list(known))}"
        )
    return known[name]
