"""What the tasks that generate have in common: the loss of tokens, its meter, and decoding.

    TokenOutputs, batch --token_loss_sum--> scalar          only tokens with a target are scored
    prompts (and sources) --decode_sequences--> hypotheses   batched by length, cached

Shapes: N tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hasten.core.batch import PackedBatch
from hasten.data.packing import IGNORED, pack_texts
from hasten.data.tokens import EncodedText
from hasten.model.decoding import CachedDecoder
from hasten.model.heads import TokenOutputs
from hasten.model.search import Decoded, DecodingSettings, Request, generate
from hasten.model.token_loss import linear_cross_entropy_sum
from hasten.model.transformer import Transformer
from hasten.task.contract import Machine, Meter

_MAX_ROWS = 256
"""Sequences that are continued at a time, beams counted; more gain no speed on two cores."""


def token_loss_sum(
    outputs: TokenOutputs, batch: PackedBatch, label_smoothing: float = 0.0
) -> Tensor:
    """Returns the summed cross-entropy of the tokens that have a target."""
    assert batch.targets is not None
    hidden_ND, targets_N = outputs.hidden_ND, batch.targets
    learned = targets_N != IGNORED
    if not bool(learned.all()):
        hidden_ND, targets_N = hidden_ND[learned], targets_N[learned]
    weight_VD, bias_V = outputs.weight_VD, outputs.bias_V
    if torch.is_autocast_enabled(hidden_ND.device.type):
        narrow = torch.get_autocast_dtype(hidden_ND.device.type)
        hidden_ND, weight_VD = hidden_ND.to(narrow), weight_VD.to(narrow)
        bias_V = None if bias_V is None else bias_V.to(narrow)
    return linear_cross_entropy_sum(
        hidden_ND,
        weight_VD,
        targets_N,
        bias_V=bias_V,
        label_smoothing=label_smoothing,
        softcap=outputs.softcap,
    )


class TokenMeter(Meter):
    """Loss per token of one pass.

    Args:
        num_examples: to be reported; None in training, where nothing is counted because the
            step's own loss says as much.
        num_bytes: bytes of the texts that the tokens stand for; None where that is not measured.
    """

    def __init__(self, num_examples: int | None = None, num_bytes: int | None = None) -> None:
        self._num_examples, self._num_bytes = num_examples, num_bytes
        self._nats = 0.0
        self._tokens = 0

    def update(self, outputs: Any, batch: PackedBatch) -> None:
        """Counts one batch."""
        if self._num_examples is None:
            return
        assert batch.targets is not None
        self._nats += token_loss_sum(outputs, batch).item()
        self._tokens += int((batch.targets != IGNORED).sum())

    def compute(self) -> dict[str, float]:
        """Returns loss (nats a token), perplexity, bits_per_byte and num_examples."""
        if self._num_examples is None:
            return {}
        loss = self._nats / self._tokens if self._tokens else math.nan
        metrics = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
        if self._num_bytes:
            metrics["bits_per_byte"] = self._nats / math.log(2) / self._num_bytes
        return {**metrics, "num_examples": self._num_examples}

    def state(self) -> dict[str, Tensor]:
        """Returns the counts as tensors."""
        return {"sums": torch.tensor([self._nats, self._tokens], dtype=torch.float64)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from ``state``."""
        nats, tokens = state["sums"].tolist()
        self._nats, self._tokens = nats, int(tokens)


@dataclass(frozen=True)
class OutputRules:
    """What may be generated, and where it ends.

    Attributes:
        end_ids: tokens that end a sequence.
        banned_ids: tokens never to be chosen.
        stop: called with the number of the prompt and its new tokens; true ends it there.
        on_token: called with the number of the prompt and each new token.
        first_example: number of the first prompt, on which what is drawn at random depends.
    """

    end_ids: frozenset[int] = frozenset()
    banned_ids: Sequence[int] = ()
    stop: Callable[[int, tuple[int, ...]], bool] | None = None
    on_token: Callable[[int, int], None] | None = None
    first_example: int = 0


def decode_sequences(
    model: Transformer,
    machine: Machine,
    settings: DecodingSettings,
    prompts: Sequence[Sequence[int]],
    *,
    sources: Sequence[EncodedText] | None = None,
    limits: Sequence[int] | None = None,
    rules: OutputRules = OutputRules(),
) -> list[list[Decoded]]:
    """Continues prompts, like lengths together.

    Args:
        model: in evaluation mode.
        machine: where to compute.
        settings: how to search.
        prompts: token ids that each sequence begins with, at least one.
        sources: what each sequence is generated from, for an encoder-decoder.
        limits: most new tokens of each sequence; those of the settings where None.
        rules: what may be generated, and where it ends.

    Returns:
        For each prompt its hypotheses, best first.
    """
    lengths = [len(prompt) for prompt in prompts]
    sizes = lengths if sources is None else [len(source.token_ids) for source in sources]
    # The longest first: what does not fit into memory is known at once.
    order = sorted(range(len(prompts)), key=lambda i: (-sizes[i], -lengths[i], i))
    found: dict[int, list[Decoded]] = {}
    per_input = max(settings.num_beams, settings.num_return)
    at_once = max(1, min(_MAX_ROWS // per_input, -(-len(order) // machine.ranks.size)))
    chunks = [order[start : start + at_once] for start in range(0, len(order), at_once)]
    for chunk in machine.ranks.share(chunks):
        batch = pack_texts([_as_text(prompts[i]) for i in chunk])
        if sources is not None:
            batch = replace(batch, source=pack_texts([sources[i] for i in chunk]))
        results = generate(
            CachedDecoder(model, batch.to(machine.device)),
            settings,
            [
                Request(rules.first_example + i, prompts[i], None if limits is None else limits[i])
                for i in chunk
            ],
            end_ids=rules.end_ids,
            banned_ids=rules.banned_ids,
            stop=_for_chunk(rules.stop, chunk),
            on_token=_for_chunk(rules.on_token, chunk),
        )
        found |= dict(zip(chunk, results, strict=True))
    for others in machine.ranks.gather(found):
        found |= others
    return [found[i] for i in range(len(prompts))]


def _for_chunk(rule: Callable[..., Any] | None, chunk: list[int]) -> Callable[..., Any] | None:
    """Returns a rule that is told numbers within a chunk in place of the prompts' own."""
    return None if rule is None else lambda number, found: rule(chunk[number], found)


def spread(num_examples: int, limit: int | None) -> np.ndarray:
    """Returns at most ``limit`` example numbers, evenly spread over all."""
    if limit is None or limit >= num_examples:
        return np.arange(num_examples)
    return np.unique(np.linspace(0, num_examples - 1, limit).round().astype(np.int64))


def _as_text(token_ids: Sequence[int]) -> EncodedText:
    return EncodedText(list(token_ids), [0] * len(token_ids), 0)
