"""How an encoder-decoder's outputs begin and end: numbers of tokens that no tokenizer knows.

    generation_config.json, else config.json --generation_start--> GenerationStart

    learned     decoder sees  start  y1  y2 ..      and is to say  y1  y2 ..  end
    generated   prompt        start [forced]        up to an end

What stands between is the tokenizer's: M2M100, NLLB and mBART put a language's code around a text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class GenerationStart:
    """The tokens around an output.

    Attributes:
        start: what the decoder sees first; None where that is the code of the output's language,
            as in mBART of 25 languages.
        forced: what every output begins with, such as the code of its language; None for nothing,
            or where the wanted language decides it.
        end_ids: what ends an output.
    """

    start: int | None
    forced: int | None
    end_ids: frozenset[int]

    @property
    def prompt(self) -> list[int]:
        """What generation goes on from; without ``start`` a language's code is to be put first."""
        return [token for token in (self.start, self.forced) if token is not None]


def generation_start(
    content: Mapping[str, Any], generation: Mapping[str, Any] | None = None
) -> GenerationStart:
    """Returns the tokens around a pretrained model's outputs.

    Args:
        content: of its config.json.
        generation: of its generation_config.json, which wins; None without one.
    """

    def find(key: str) -> Any:
        value = (generation or {}).get(key)
        return content.get(key) if value is None else value

    ends = find("eos_token_id")
    return GenerationStart(
        start=find("decoder_start_token_id"),
        forced=find("forced_bos_token_id"),
        end_ids=frozenset(() if ends is None else ends if isinstance(ends, list) else [ends]),
    )
