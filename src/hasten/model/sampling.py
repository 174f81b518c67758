"""How next tokens are chosen: the settings, and what they do to a model's scores.

    logits (B, V) --repetition penalty--> --temperature--> --top k--> --top p--> draw (B,)

The order is that of transformers' ``generate``. What is left out has the score -inf. Every row is
treated by itself, so that a choice does not depend on the rest of the batch.

Shapes: B sequences, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.core.errors import UsageError


@dataclass(frozen=True)
class DecodingSettings:
    """How continuations are found.

    Attributes:
        max_new_tokens: limit of each continuation, the end token included.
        min_new_tokens: before so many tokens no end token is chosen; a stop string still stops.
        temperature: 0 takes the best token each time (greedy); above 0 tokens are drawn from
            softmax(scores / temperature).
        top_k: draw among the k best tokens only; 0 is off.
        top_p: draw among the likeliest tokens whose probabilities reach this sum only.
        repetition_penalty: above 1 against tokens that the prompt or the continuation holds.
        num_beams: width of the beam search; 1 is greedy decoding, or sampling.
        length_penalty: beams are compared by log probability / length ** length_penalty: 0
            prefers short ones, 1 the mean of their tokens, more prefers long ones.
        num_return: hypotheses returned for each input.
        seed: of sampling.

    Raises:
        UsageError: a value is out of its range, or two contradict each other.
    """

    max_new_tokens: int = 256
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    num_beams: int = 1
    length_penalty: float = 1.0
    num_return: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_ranges()
        if self.min_new_tokens > self.max_new_tokens:
            raise UsageError(
                f"--min-new-tokens {self.min_new_tokens} is more than "
                f"--max-new-tokens {self.max_new_tokens}."
            )
        if self.num_beams > 1:
            if self.temperature > 0:
                raise UsageError(
                    "--num-beams looks for the likeliest output and --temperature draws one at "
                    "random: give only one of them."
                )
            if self.num_return > self.num_beams:
                raise UsageError(
                    f"--n-best {self.num_return} needs --num-beams {self.num_return} or more, "
                    f"got {self.num_beams}."
                )
        elif self.length_penalty != 1:
            raise UsageError("--length-penalty compares beams: add --num-beams 4, or leave it out.")
        if self.temperature == 0:
            for flag, is_given in (("--top-k", self.top_k > 0), ("--top-p", self.top_p < 1)):
                if is_given:
                    raise UsageError(
                        f"{flag} limits what is drawn at random, and nothing is at temperature 0: "
                        "add --temperature 1, or leave it out."
                    )
            if self.num_beams == 1 and self.num_return > 1:
                raise UsageError(
                    f"--n-best {self.num_return} needs --num-beams {self.num_return} or more, or "
                    "--temperature 1: greedy decoding finds one output only."
                )

    def _check_ranges(self) -> None:
        least: dict[str, tuple[float, float]] = {
            "--max-new-tokens": (self.max_new_tokens, 1),
            "--min-new-tokens": (self.min_new_tokens, 0),
            "--temperature": (self.temperature, 0),
            "--top-k": (self.top_k, 0),
            "--num-beams": (self.num_beams, 1),
            "--length-penalty": (self.length_penalty, 0),
            "--n-best": (self.num_return, 1),
        }
        for flag, (value, smallest) in least.items():
            if not smallest <= value < math.inf:  # nan is neither
                raise UsageError(f"{flag} must be {smallest} or more, got {value}.")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"--top-p must be above 0 and at most 1, got {self.top_p}.")
        if not 0 < self.repetition_penalty < math.inf:
            raise UsageError(
                f"--repetition-penalty must be above 0, got {self.repetition_penalty}; "
                "1 turns it off."
            )


def penalise_repetition(logits_BV: Tensor, seen_BV: Tensor, penalty: float) -> Tensor:
    """Lowers the scores of tokens that occurred: positive ones are divided, others multiplied.

    Args:
        logits_BV: (B, V) scores.
        seen_BV: (B, V) bool, which tokens each sequence holds, its prompt included.
        penalty: above 1 against repetition, 1 for no change, below 1 in favour of it.

    Returns:
        (B, V) scores; Keskar et al. 2019, "CTRL: A Conditional Transformer Language Model for
        Controllable Generation", section 4.1, with the sign heeded as in transformers.
    """
    penalised_BV = torch.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
    return torch.where(seen_BV, penalised_BV, logits_BV)


def filter_logits(logits_BV: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Returns the scores (B, V) of the distribution to draw from, not normalised.

    Args:
        logits_BV: (B, V) scores, or log probabilities; at least one of a row is finite.
        temperature: above 0; what scores are divided by.
        top_k: tokens kept of each row, more where several tie for the last place; 0 keeps all.
        top_p: see ``keep_top_p``; 1 keeps all.
    """
    # Softmax ignores what is subtracted. The best score is then 0, which any temperature that is
    # not rounded to 0 leaves as it is.
    temperature = max(temperature, torch.finfo(logits_BV.dtype).tiny)
    logits_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)) / temperature
    if top_k:
        last_B1 = logits_BV.topk(min(top_k, logits_BV.shape[1])).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < last_B1, -torch.inf)
    return keep_top_p(logits_BV, top_p) if top_p < 1 else logits_BV


def keep_top_p(logits_BV: Tensor, top_p: float) -> Tensor:
    """Keeps the fewest tokens whose probabilities sum to ``top_p`` or more, the likeliest first.

    This is nucleus sampling: Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration".
    Of tokens that are equally likely, the lowest ids are kept.

    Args:
        logits_BV: (B, V) scores.
        top_p: in (0, 1].
    """
    sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
    probabilities_BV = sorted_BV.softmax(-1)
    before_BV = probabilities_BV.cumsum(-1) - probabilities_BV
    dropped_BV = torch.zeros_like(before_BV, dtype=torch.bool)
    dropped_BV.scatter_(1, order_BV, before_BV >= top_p)
    return logits_BV.masked_fill(dropped_BV, -torch.inf)


def draw_tokens(logits_BV: Tensor, uniforms: Sequence[float]) -> Tensor:
    """Draws one token of each row by the inverse of its cumulative distribution, in float64.

    Args:
        logits_BV: (B, V) scores; at least one of a row is finite.
        uniforms: B numbers in [0, 1).

    Returns:
        (B,) token ids on the CPU; none whose score is -inf.
    """
    cumulative_BV = logits_BV.to("cpu").double().softmax(-1).cumsum(-1)
    # The last sum is 1 but for rounding. No float64 below 1 times it rounds up to it again.
    target_B = torch.tensor(uniforms, dtype=torch.float64) * cumulative_BV[:, -1]
    return torch.searchsorted(cumulative_BV, target_B[:, None], right=True)[:, 0]


def best_tokens(logits_BV: Tensor, count: int) -> Tensor:
    """Returns (B, min(count, V)) token ids, best first; of equal scores, lowest ids first.

    ``torch.topk`` leaves it open which of equal scores it returns, and so could not be repeated
    on another device or in another batch.

    Args:
        logits_BV: (B, V) scores.
        count: how many, at least 1.
    """
    count = min(count, logits_BV.shape[1])
    last_B1 = logits_BV.topk(count).values[:, -1:]
    above_BV, equal_BV = logits_BV > last_B1, logits_BV == last_B1
    wanted_B1 = count - above_BV.sum(-1, keepdim=True)
    taken_BV = above_BV | (equal_BV & (equal_BV.cumsum(-1) <= wanted_B1))
    tokens_BK = taken_BV.nonzero()[:, 1].view(-1, count)  # ids ascend in each row
    order_BK = logits_BV.gather(1, tokens_BK).argsort(dim=-1, descending=True, stable=True)
    return tokens_BK.gather(1, order_BK)
