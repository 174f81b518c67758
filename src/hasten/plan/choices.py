"""Resolves every ``auto`` of a configuration from the facts of the data.

    RunConfig with auto + DataFacts --choose--> [Choice(key, value, reason)] --> RunConfig without

The rules are pure functions, so the same data gives the same run on every machine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hasten.config.load import replace_values
from hasten.config.schema import RunConfig, settled
from hasten.optim.optimizers import default_learning_rate

Put = Callable[[str, Any, str], None]


@dataclass(frozen=True)
class DataFacts:
    """What the rules look at.

    Attributes:
        num_examples: training examples.
        num_tokens: tokens of one epoch.
        num_threads: CPU threads that compute.
    """

    num_examples: int
    num_tokens: int
    num_threads: int


@dataclass(frozen=True)
class Choice:
    """One automatic choice."""

    key: str
    value: Any
    reason: str


def choose(config: RunConfig, facts: DataFacts) -> tuple[RunConfig, list[Choice]]:
    """Returns the configuration without any ``auto``, and what was chosen and why."""
    choices: list[Choice] = []

    def put(key: str, value: Any, reason: str) -> None:
        section, _, name = key.partition(".")
        if getattr(getattr(config, section), name) == "auto":
            choices.append(Choice(key, value, reason))

    _choose_model(config, facts, put)
    sized = replace_values(config, {c.key: c.value for c in choices})
    _choose_training(config, facts, settled(sized.model.hidden_size), put)
    return replace_values(config, {c.key: c.value for c in choices}), choices


def _choose_model(config: RunConfig, facts: DataFacts, put: Put) -> None:
    """Size and dropout: little data overfits a large model."""
    tokens = f"{facts.num_tokens:,} training tokens"
    layers, width = (2, 128) if facts.num_tokens < 3_000_000 else (4, 256)
    put("model.num_layers", layers, tokens)
    put("model.hidden_size", width, tokens)
    chosen = config.model.hidden_size
    put(
        "model.num_heads",
        max(1, (width if chosen == "auto" else chosen) // 64),
        "64 dimensions a head",
    )
    put("model.dropout", 0.3 if facts.num_tokens < 3_000_000 else 0.1, tokens)
    put("model.token_dropout", 0.2, tokens)
    put("model.head_dropout", 0.3, tokens)


def _choose_training(config: RunConfig, facts: DataFacts, width: int, put: Put) -> None:
    put("train.tokens_per_step", 2048, "")
    put("train.micro_batch_tokens", 8192, "the documented rule: at most 8,192 tokens at once")
    put("train.epochs", 8.0, "")
    put("train.learning_rate", default_learning_rate(config.optim.optimizer, width), "")
    put("train.num_threads", facts.num_threads, "the cores this process may use")
    put("optim.weight_decay", 0.01, "")
    put("eval.patience", 0, "the schedule ends at zero")
