"""Resolves every ``auto`` of a configuration from the facts of the data.

    RunConfig with auto + DataFacts --choose--> [Choice(key, value, reason)] --> RunConfig without

The rules are pure functions, so the same data gives the same run on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hasten.config.load import replace_values
from hasten.config.schema import RunConfig, settled
from hasten.optim.optimizers import default_learning_rate, default_settings

MICRO_BATCH_TOKENS = 8192
_LITTLE_TEXT = 3_000_000
_FEW_BITS = 20_000
_MIN_STEP_TOKENS, _STEP_TOKENS, _MIN_STEPS_PER_EPOCH = 256, 2048, 40
_EPOCHS = (
    (20_000, 40.0),
    (300_000, 15.0),
    (1_000_000, 10.0),
    (3_000_000, 6.0),
    (float("inf"), 3.0),
)


@dataclass(frozen=True)
class DataFacts:
    """What the rules look at.

    Attributes:
        num_examples: training examples.
        num_classes: labels, among which each example chooses.
        num_tokens: tokens of one epoch.
        num_threads: CPU threads that compute.
        threads_reason: why so many.
        has_validation: whether there are rows to choose the best model by.
        has_merges: whether the tokenizer is a plain BPE, so that merges can be skipped.
    """

    num_examples: int
    num_classes: int
    num_tokens: int
    num_threads: int
    threads_reason: str
    has_validation: bool
    has_merges: bool


@dataclass(frozen=True)
class Choice:
    """One automatic choice."""

    key: str
    value: Any
    reason: str


def choose(config: RunConfig, facts: DataFacts) -> tuple[RunConfig, list[Choice]]:
    """Returns the configuration without any ``auto``, and what was chosen and why."""
    choices: list[Choice] = []
    for rules in (_model_choices, _training_choices, _averaging_choices):
        # Each set of rules sees what the ones before it chose.
        chosen = [
            choice
            for choice in rules(config, facts)
            if getattr(getattr(config, choice.key.split(".")[0]), choice.key.split(".")[1])
            == "auto"
        ]
        config = replace_values(config, {choice.key: choice.value for choice in chosen})
        choices += chosen
    return config, choices


def _model_choices(config: RunConfig, facts: DataFacts) -> Iterator[Choice]:
    """Size and dropout: the less there is to learn from, the smaller the model.

    What a classifier can learn is bounded by its labels: an example of K classes carries at most
    ``log2 K`` bits. A model that can hold more than all of them learns them by heart.
    """
    tokens = f"{facts.num_tokens:,} training tokens"
    bits = facts.num_examples * math.log2(max(2, facts.num_classes))
    is_small = facts.num_tokens < _LITTLE_TEXT
    layers, width = (4, 256) if not is_small else (2, 128) if bits > _FEW_BITS else (1, 64)
    reason = f"{facts.num_examples:,} labels of {facts.num_classes} classes, {tokens}"
    yield Choice("model.num_layers", layers, reason)
    yield Choice("model.hidden_size", width, reason)
    if config.model.hidden_size != "auto":
        width = config.model.hidden_size
    wanted = max(1, round(width / (64 if width > 64 else 32)))
    heads = next(h for h in range(wanted, 0, -1) if width % h == 0)
    yield Choice("model.num_heads", heads, f"{width // heads} dimensions a head")
    dropout = 0.3 if is_small else 0.1
    yield Choice("model.dropout", dropout, tokens)
    head = dropout if config.model.dropout == "auto" else config.model.dropout
    yield Choice("model.head_dropout", head, "as model.dropout")
    yield Choice("model.token_dropout", 0.2 if is_small else 0.0, tokens)
    if facts.has_merges:
        yield Choice("tokenizer.dropout", 0.05 if is_small else 0.0, tokens)
    else:
        yield Choice("tokenizer.dropout", 0.0, "only bpe has merges to skip")


def _training_choices(config: RunConfig, facts: DataFacts) -> Iterator[Choice]:
    """Length and rates: little text is passed over more often, until progress ends."""
    tokens = f"{facts.num_tokens:,} training tokens"
    name, width = config.optim.optimizer, settled(config.model.hidden_size)
    epochs = next(epochs for limit, epochs in _EPOCHS if facts.num_tokens < limit)
    yield Choice("train.epochs", epochs, f"at most, for {tokens}")
    per_step = min(_STEP_TOKENS, facts.num_tokens // _MIN_STEPS_PER_EPOCH)
    per_step = 4 * _STEP_TOKENS if facts.num_tokens >= _LITTLE_TEXT else per_step
    yield Choice("train.tokens_per_step", max(_MIN_STEP_TOKENS, per_step), tokens)
    yield Choice("train.micro_batch_tokens", MICRO_BATCH_TOKENS, "fixed; memory and speed only")
    uses_betas = "betas" in default_settings(name)
    rate = default_learning_rate(name, width)
    rate = min(1e-3, rate) if uses_betas else rate
    yield Choice("train.learning_rate", round(rate, 6), f"{name} at width {width}")
    betas = (0.9, 0.9 if facts.num_tokens < _LITTLE_TEXT else 0.95) if uses_betas else None
    yield Choice("optim.betas", betas, f"{name}; a short memory suits rare tokens")
    yield Choice("optim.weight_decay", 0.05 if uses_betas else 0.0, f"{name} from scratch")
    yield Choice("train.num_threads", facts.num_threads, facts.threads_reason)


def _averaging_choices(config: RunConfig, facts: DataFacts) -> Iterator[Choice]:
    """A rate that stays up needs averaged weights, and can stop whenever progress ends."""
    schedule = config.optim.schedule
    if not facts.has_validation:
        yield Choice("eval.patience", 0, "there are no validation rows")
    if schedule not in ("constant", "plateau"):
        reason = f"the {schedule} schedule ends at a low rate"
        yield Choice("train.ema_decay", 0.0, reason)
        if facts.has_validation:
            yield Choice("eval.patience", 0, reason)
        return
    per_epoch = facts.num_tokens / settled(config.train.tokens_per_step)
    horizon = round(min(1000, max(100, per_epoch)))
    reason = f"averages about {horizon} steps of a {schedule} learning rate"
    yield Choice("train.ema_decay", round(1 - 1 / horizon, 6), reason)
    if facts.has_validation:
        yield Choice("eval.patience", 4, "evaluations without progress")
