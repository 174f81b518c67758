"""Resolves every ``auto`` of a configuration from the facts of the data.

    RunConfig with auto + DataFacts --choose--> [Choice(key, value, reason)] --> RunConfig without

The rules are pure functions, so the same data gives the same run on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from hasten.config.load import replace_values
from hasten.config.schema import RunConfig, settled
from hasten.core.errors import UsageError
from hasten.optim.optimizers import default_learning_rate, default_settings
from hasten.parallel.layout import choose_layout

_MICRO_BATCHES_PER_STAGE = 3
MICRO_BATCH_TOKENS = 8192
_LITTLE_TEXT = 3_000_000
_FEW_BITS = 20_000
_GENERATOR_SIZES = (
    (100_000, (2, 128)),
    (5_000_000, (4, 128)),
    (50_000_000, (6, 256)),
    (float("inf"), (8, 512)),
)
_GENERATOR_EPOCHS = (
    (100_000, 40.0),
    (3_000_000, 10.0),
    (30_000_000, 5.0),
    (float("inf"), 2.0),
)
_MUON_WIDTH = 128  # the width at which Muon's rate was chosen
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
        architecture: encoder, decoder or encoder_decoder.
        head: classification, language_modelling or span.
        num_examples: training examples.
        num_classes: labels, among which each example chooses.
        num_tokens: tokens of one epoch.
        num_threads: CPU threads that compute.
        threads_reason: why so many.
        has_validation: whether there are rows to choose the best model by.
        has_merges: whether the tokenizer is a plain BPE, so that merges can be skipped.
    """

    architecture: Literal["encoder", "decoder", "encoder_decoder"]
    head: Literal["classification", "language_modelling", "span"]
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
    size = _SIZES[facts.head]
    for rules in (size, _heads, _training_choices, _averaging_choices):
        # Each set of rules sees what the ones before it chose.
        config, chosen = apply_choices(config, rules(config, facts))
        choices += chosen
    return config, choices


def choose_for_task(
    config: RunConfig, task: str, architecture: str, metric: str
) -> tuple[RunConfig, list[Choice]]:
    """Returns the configuration with what the task alone decides, before any data is read."""
    smoothing, beams = (0.1, 4) if architecture == "encoder_decoder" else (0.0, 1)
    length = 256 if architecture == "decoder" else 512
    optimizer = "adamw" if architecture == "encoder" else "muon"
    reason = f"usual for {task}"
    return apply_choices(
        config,
        (
            Choice("optim.optimizer", optimizer, reason),
            Choice("train.label_smoothing", smoothing, reason),
            Choice("tokenizer.max_length", length, reason),
            Choice("eval.metric", metric, reason),
            Choice("eval.num_beams", beams, reason),
        ),
    )


def choose_processes(config: RunConfig) -> tuple[RunConfig, list[Choice]]:
    """Returns the configuration with the number of processes and what each is for.

    For several processes the layout is left open where it was: see ``spread``.

    Raises:
        UsageError: they do not fit each other, or the optimizer cannot work in shards.
    """
    wanted = config.parallel.processes
    layout = choose_layout(config.parallel.layout, None if wanted == "auto" else wanted)
    optimizer = settled(config.optim.optimizer)
    if not layout.has_whole_weights and optimizer == "adafactor":
        raise UsageError(
            f"optim.optimizer {optimizer} needs whole rows and columns of a weight, which "
            f"{layout} takes apart: choose another, or replicate."
        )
    reason = f"as --parallel {layout} says"
    if config.parallel.layout == "auto":
        reason = "one process; --processes starts more"
    wanted = [Choice("parallel.processes", layout.size, reason)]
    if config.parallel.layout != "auto" or layout.size == 1:
        wanted.append(Choice("parallel.layout", str(layout), reason))
    return apply_choices(config, wanted)


def apply_choices(config: RunConfig, wanted: Iterable[Choice]) -> tuple[RunConfig, list[Choice]]:
    """Sets what was left to us, and only that: what is ``auto``, or what nobody has set."""
    chosen = []
    for choice in wanted:
        section, _, name = choice.key.partition(".")
        values = getattr(config, section)
        is_given = section in config.model_fields_set and name in values.model_fields_set
        if not is_given or getattr(values, name) in ("auto", ("auto",)):
            chosen.append(choice)
    return replace_values(config, {choice.key: choice.value for choice in chosen}), chosen


def _classifier_size(config: RunConfig, facts: DataFacts) -> Iterator[Choice]:
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
    dropout = 0.3 if is_small else 0.1
    yield Choice("model.dropout", dropout, tokens)
    head = dropout if config.model.dropout == "auto" else config.model.dropout
    yield Choice("model.head_dropout", head, "as model.dropout")
    yield Choice("model.token_dropout", 0.2 if is_small else 0.0, tokens)
    if is_small and facts.has_merges:
        reason = f"{tokens}; none turns it off"
        yield Choice("data.augment", ("bpe_dropout=0.05",), reason)
    else:
        yield Choice("data.augment", ("none",), tokens)


def _generator_size(config: RunConfig, facts: DataFacts) -> Iterator[Choice]:
    """Size and dropout of what generates: each token is something to learn from."""
    tokens = f"{facts.num_tokens:,} training tokens"
    layers, width = next(size for limit, size in _GENERATOR_SIZES if facts.num_tokens < limit)
    yield Choice("model.num_layers", layers, tokens)
    yield Choice("model.hidden_size", width, tokens)
    dropout = 0.3 if facts.num_tokens < _LITTLE_TEXT else 0.1
    yield Choice("model.dropout", dropout, tokens)
    yield Choice("model.head_dropout", 0.0, "scores of tokens have none")
    yield Choice("model.token_dropout", 0.0, facts.architecture)
    yield Choice("data.augment", ("none",), "off unless asked for")


def _span_size(config: RunConfig, facts: DataFacts) -> Iterator[Choice]:
    """Size and dropout of what finds answers: from scratch, dropout keeps it from beginning."""
    tokens = f"{facts.num_tokens:,} training tokens"
    layers, width = (2, 128) if facts.num_tokens < _LITTLE_TEXT else (4, 256)
    yield Choice("model.num_layers", layers, tokens)
    yield Choice("model.hidden_size", width, tokens)
    yield Choice("model.dropout", 0.1, "spans of a context")
    yield Choice("model.head_dropout", 0.0, "scores of tokens have none")
    yield Choice("model.token_dropout", 0.0, "an answer's tokens are needed")
    yield Choice("data.augment", ("none",), "answers would lose their places")


def _heads(config: RunConfig, facts: DataFacts) -> Iterator[Choice]:
    width = settled(config.model.hidden_size)
    wanted = max(1, round(width / (64 if width > 128 else 32)))
    heads = next(h for h in range(wanted, 0, -1) if width % h == 0)
    yield Choice("model.num_heads", heads, f"{width // heads} dimensions a head")


def _micro_batch_tokens(config: RunConfig, chosen_per_step: int) -> Choice:
    wanted = config.train.tokens_per_step
    per_step = chosen_per_step if wanted == "auto" else wanted
    layout = choose_layout(config.parallel.layout, None)
    if layout.pipeline == 1:
        reason = "fixed; memory and speed only"
        return Choice("train.micro_batch_tokens", MICRO_BATCH_TOKENS, reason)
    # With M micro-batches, P - 1 of M + P - 1 turns of P stages are idle (Huang et al. 2019).
    num_pieces = _MICRO_BATCHES_PER_STAGE * layout.pipeline * layout.num_batch_shares
    tokens = min(MICRO_BATCH_TOKENS, -(-per_step // num_pieces))
    reason = f"{_MICRO_BATCHES_PER_STAGE} for each stage of the pipeline"
    return Choice("train.micro_batch_tokens", tokens, reason)


def _training_choices(config: RunConfig, facts: DataFacts) -> Iterator[Choice]:
    """Length and rates: little text is passed over more often, until progress ends."""
    tokens = f"{facts.num_tokens:,} training tokens"
    name, width = settled(config.optim.optimizer), settled(config.model.hidden_size)
    generates = facts.architecture != "encoder"
    table = _GENERATOR_EPOCHS if generates else _EPOCHS
    epochs = next(epochs for limit, epochs in table if facts.num_tokens < limit)
    yield Choice("train.epochs", epochs, f"at most, for {tokens}")
    largest = (2 if generates else 1) * _STEP_TOKENS
    per_step = min(largest, facts.num_tokens // _MIN_STEPS_PER_EPOCH)
    per_step = 4 * _STEP_TOKENS if facts.num_tokens >= _LITTLE_TEXT else per_step
    per_step = max(_MIN_STEP_TOKENS, per_step)
    yield Choice("train.tokens_per_step", per_step, tokens)
    yield _micro_batch_tokens(config, per_step)
    uses_betas = "betas" in default_settings(name)
    rate = default_learning_rate(name, width)
    if name == "muon":
        rate *= min(1.0, (_MUON_WIDTH / width) ** 0.5)
    elif uses_betas:
        rate = min(1e-3, rate)
    yield Choice("train.learning_rate", round(rate, 6), f"{name} at width {width}")
    if not uses_betas:
        yield Choice("optim.betas", None, f"{name} has none")
    elif generates:
        yield Choice("optim.betas", (0.9, 0.98), f"{name}, for {facts.architecture}")
    else:
        second = 0.9 if facts.num_tokens < _LITTLE_TEXT else 0.95
        yield Choice("optim.betas", (0.9, second), f"{name}; a short memory suits rare tokens")
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


_SIZES = {
    "classification": _classifier_size,
    "language_modelling": _generator_size,
    "span": _span_size,
}
