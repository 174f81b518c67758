"""What a pretrained model decides of a run, and what is chosen differently where there is one.

    RunConfig, TransformerConfig of the pretrained model --settle_pretrained--> RunConfig
    RunConfig, DataFacts --choose_for_fine_tuning--> RunConfig, Choices

A model that has read much has to be moved little: low rates that end at zero, few passes, no
averaged weights, dropout as it was pretrained with, texts as they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from hasten.config.schema import ModelConfig, RunConfig, settled
from hasten.core.errors import UsageError
from hasten.model.config import TransformerConfig
from hasten.plan.choices import Choice, DataFacts, apply_choices

_FREE_KEYS = frozenset(
    {
        "dropout",
        "attention_dropout",
        "token_dropout",
        "head_dropout",
        "stochastic_depth",
        "initializer_std",
        "pooling",
    }
)
_DROPOUTS = ("dropout", "attention_dropout", "head_dropout")
_LONGEST = 512  # tokens that sequences are cut to where the model takes more
_EPOCHS = ((2_000, 10.0), (10_000, 5.0), (100_000, 3.0), (float("inf"), 2.0))
_STEP_EXAMPLES, _MIN_STEPS_PER_EPOCH = 10, 100
# At fewer than the second a CPU multiplies well below its rate; the first is for little data.
_LEAST_TOKENS, _STEP_TOKENS, _MOST_TOKENS = 256, 512, 8192
_SELDOM = 20  # times that a row of an embedding is seen in a run, on average
_RATE, _WIDTH = 1e-4, 384  # the width at which the rate was chosen
_ADAPTER_RATE = 10.0


def settle_pretrained(
    config: RunConfig, architecture: TransformerConfig, name: str
) -> tuple[RunConfig, list[Choice]]:
    """Returns the configuration with the keys that a pretrained model decides, and what they are.

    Args:
        config: as a person has set it.
        architecture: of the pretrained model.
        name: of it, in messages.

    Raises:
        UsageError: a key is set to something else than the model has.
    """
    if config.model.portable:
        raise UsageError(f"model.portable: {name} decides the architecture: leave it out.")
    choices: list[Choice] = []
    given = config.model.model_fields_set
    of_model = {field.name for field in dataclasses.fields(TransformerConfig)}
    if architecture.head != "classification":
        of_model.remove("pooling")
    for key in (key for key in ModelConfig.model_fields if key in of_model):
        value, wanted = getattr(architecture, key), getattr(config.model, key)
        if key in _DROPOUTS and (key not in given or wanted == "auto"):
            continue  # chosen when the data is known
        if key not in given or wanted in ("auto", value):
            choices.append(Choice(f"model.{key}", value, f"as {name} says"))
        elif key not in _FREE_KEYS:
            raise UsageError(
                f"model.{key} is {value} in {name}, which decides it: leave out {wanted}."
            )
    for key, accepted in _of_tokenizer(architecture).items():
        wanted = getattr(config.tokenizer, key)
        if key in config.tokenizer.model_fields_set and wanted not in accepted:
            raise UsageError(
                f"tokenizer.{key}: {name} has a tokenizer, which decides it: leave out {wanted}."
            )
    choices.append(Choice("tokenizer.kind", "pretrained", f"that of {name}"))
    choices.append(Choice("tokenizer.vocab_size", architecture.vocab_size, f"as {name} says"))
    choices.append(_max_length(config, architecture, name))
    return apply_choices(config, choices)


def free_options(config: RunConfig, architecture: TransformerConfig) -> dict[str, Any]:
    """Returns what may be set beside a pretrained model, since it changes no weight of it."""
    pools = architecture.head == "classification"
    return {key: getattr(config.model, key) for key in _FREE_KEYS if pools or key != "pooling"}


def _of_tokenizer(architecture: TransformerConfig) -> dict[str, tuple[Any, ...]]:
    """Returns the keys that a pretrained tokenizer decides, and what changes nothing in each."""
    return {
        "kind": ("pretrained",),
        "vocab_size": ("auto", architecture.vocab_size),
        "path": (None,),
        "shared": (True,),
        "lowercase": (False,),
    }


def _max_length(config: RunConfig, architecture: TransformerConfig, name: str) -> Choice:
    wanted, most = config.tokenizer.max_length, architecture.max_positions
    if wanted != "auto" and wanted > most:
        raise UsageError(f"tokenizer.max_length {wanted}: {name} takes {most} tokens at most.")
    reason = f"{name} takes {most:,}"
    return Choice("tokenizer.max_length", min(_LONGEST, most), reason)


def choose_before_data(
    config: RunConfig, architecture: TransformerConfig
) -> tuple[RunConfig, list[Choice]]:
    """Returns the configuration with what fine-tuning alone decides, before any data is read."""
    smoothing = 0.1 if architecture.architecture == "encoder_decoder" else 0.0
    return apply_choices(
        config,
        [
            Choice("optim.optimizer", "adamw", "as in pretraining"),
            Choice("train.label_smoothing", smoothing, f"usual for an {architecture.architecture}"),
        ],
    )


def choose_for_fine_tuning(
    config: RunConfig, facts: DataFacts, architecture: TransformerConfig
) -> tuple[RunConfig, list[Choice]]:
    """Returns the configuration with what is chosen otherwise than from scratch, and why.

    Args:
        config: whose optimizer is chosen.
        facts: of the data.
        architecture: of the model.
    """
    return apply_choices(config, _choices(config, facts, architecture))


def _choices(
    config: RunConfig, facts: DataFacts, architecture: TransformerConfig
) -> Iterator[Choice]:
    examples = f"{facts.num_examples:,} training examples"
    epochs = next(epochs for limit, epochs in _EPOCHS if facts.num_examples < limit)
    yield Choice("train.epochs", epochs, f"fine-tuning on {examples}")
    if config.train.epochs != "auto":
        epochs = config.train.epochs
    yield from _dropouts(architecture, epochs)
    wanted = max(_STEP_TOKENS, _STEP_EXAMPLES * facts.num_tokens // facts.num_examples)
    per_step = min(_MOST_TOKENS, wanted, facts.num_tokens // _MIN_STEPS_PER_EPOCH)
    per_step = max(_LEAST_TOKENS, per_step)
    num_examples = max(1, round(per_step * facts.num_examples / facts.num_tokens))
    yield Choice("train.tokens_per_step", per_step, f"about {num_examples} examples")
    yield from _frozen(config, architecture, epochs * facts.num_tokens)
    adapter, reason = config.finetune.adapter, "moves pretrained weights little"
    rate = _RATE * min(1.0, (_WIDTH / architecture.hidden_size) ** 0.5)
    if adapter != "none":
        rate, reason = rate * _ADAPTER_RATE, f"{adapter} begins at zero and has far to go"
    yield Choice("train.learning_rate", float(f"{rate:.2g}"), reason)
    settles = "a low rate at the end settles what was moved"
    yield Choice("optim.schedule", "linear", settles)
    yield Choice("optim.warmup_fraction", 0.1, "the new head's first gradients are large")
    if settled(config.optim.optimizer) == "adamw":
        yield Choice("optim.betas", (0.9, 0.999), "adamw as in pretraining")
    yield Choice("optim.weight_decay", 0.01, "usual for fine-tuning")
    yield Choice("data.augment", ("none",), "the model knows texts as they are")


def _dropouts(architecture: TransformerConfig, epochs: float) -> Iterator[Choice]:
    head = architecture.head_dropout
    head = architecture.dropout if head is None else head
    rates, reason = (architecture.dropout, head), "as in pretraining"
    if epochs <= 1:
        rates, reason = (0.0, 0.0), "nothing is learned by heart that is seen once"
    yield Choice("model.dropout", rates[0], reason)
    yield Choice("model.head_dropout", rates[1], reason)
    yield Choice("model.attention_dropout", 0.0, "attention is faster without it")


def _frozen(
    config: RunConfig, architecture: TransformerConfig, num_tokens: float
) -> Iterator[Choice]:
    """Leaves an embedding alone that has more rows than the texts can teach anything.

    Half of a small encoder's weights are in it, and so is half of what the optimizer does in a
    step, of which few rows get a gradient. Rows that are seen move away from those of like meaning
    that are not. Segments, which are embedded beside them, stay as they are too.
    """
    seen = num_tokens / (architecture.source_vocab_size or architecture.vocab_size)
    layout = config.parallel.layout
    if (
        architecture.head == "language_modelling"  # it may be what scores tokens too
        or config.finetune.adapter != "none"
        or config.tokenizer.add_tokens
        or seen >= _SELDOM
        or "tensor" in layout
        or "pipeline" in layout
    ):
        return
    reason = f"each of its rows is seen {seen:.0f} times, too seldom to learn"
    yield Choice("finetune.freeze", ("embedding",), reason)
