"""Automatic choices: nothing is left open, nothing that a person said is changed."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.config.load import differences, replace_values
from hasten.config.schema import RunConfig
from hasten.plan.choices import DataFacts, choose, choose_for_task, choose_processes
from hasten.task.registry import TASKS

FACTS = st.builds(
    DataFacts,
    architecture=st.sampled_from(["encoder", "decoder", "encoder_decoder"]),
    head=st.sampled_from(["classification", "language_modelling", "span"]),
    num_examples=st.integers(1, 10**7),
    num_classes=st.integers(1, 50_000),
    num_tokens=st.integers(1, 10**9),
    num_threads=st.integers(1, 64),
    threads_reason=st.just("this machine's cores"),
    has_validation=st.booleans(),
    has_merges=st.booleans(),
)
GIVEN: dict[str, Any] = {
    "model.num_layers": 3,
    "model.hidden_size": 96,
    "model.dropout": 0.25,
    "data.augment": ("word_swap",),
    "tokenizer.vocab_size": 999,
    "tokenizer.max_length": 33,
    "train.epochs": 7.0,
    "train.learning_rate": 0.123,
    "train.tokens_per_step": 555,
    "train.label_smoothing": 0.3,
    "train.ema_decay": 0.5,
    "optim.optimizer": "sgd",
    "optim.schedule": "linear",
    "optim.betas": (0.8, 0.9),
    "optim.weight_decay": 0.4,
    "eval.patience": 9,
    "eval.metric": "loss",
    "eval.num_beams": 3,
}


def chosen(config: RunConfig, facts: DataFacts) -> tuple[RunConfig, dict[str, Any]]:
    """What a run chooses, in its order; the rest comes from elsewhere."""
    before = config
    task = next(t for t in TASKS.values() if t.architecture == facts.architecture)
    config, first = choose_for_task(config, task.name, task.architecture, task.default_metric)
    config, second = choose_processes(config)
    config, third = choose(config, facts)
    choices = [*first, *second, *third]
    assert all(choice.reason for choice in choices)
    values = {choice.key: choice.value for choice in choices}
    assert len(values) == len(choices)
    assert replace_values(before, values) == config
    return config, values


@settings(max_examples=150)
@given(facts=FACTS, keys=st.sets(st.sampled_from(sorted(GIVEN))))
def test_what_is_given_stays_and_nothing_else_is_left_open(facts: DataFacts, keys: set[str]):
    given_values = {key: GIVEN[key] for key in keys}
    if "optim.optimizer" in keys:
        given_values.pop("optim.betas", None)  # which sgd has not
    start = replace_values(
        RunConfig(),
        {
            "task": "x",
            "train.device": "cpu",
            "train.precision": "bf16",
            "train.matrix_library": "default",
            "tokenizer.vocab_size": 1,
            **given_values,
        },
    )
    config, values = chosen(start, facts)
    assert '"auto"' not in json.dumps(config.model_dump())
    assert not values.keys() & given_values.keys()
    assert not differences(replace_values(config, given_values), config)
    assert chosen(start, facts) == (config, values)


@settings(max_examples=60)
@given(facts=FACTS)
def test_what_is_chosen_can_be_built(facts: DataFacts):
    config, values = chosen(RunConfig(), facts)
    model = config.model
    assert model.hidden_size % model.num_heads == 0
    assert values["optim.betas"] is not None
    assert config.train.tokens_per_step >= 1 and config.train.epochs > 0
    assert facts.has_validation or config.eval.patience == 0
    assert facts.has_merges or not any("bpe" in part for part in config.data.augment)


@settings(max_examples=60)
@given(facts=FACTS, more=st.integers(2, 1000))
def test_more_text_never_makes_a_smaller_model_or_more_epochs(facts: DataFacts, more: int):
    larger = dataclasses.replace(
        facts, num_tokens=facts.num_tokens * more, num_examples=facts.num_examples * more
    )
    (small, _), (large, _) = (chosen(RunConfig(), f) for f in (facts, larger))
    assert large.model.num_layers >= small.model.num_layers
    assert large.model.hidden_size >= small.model.hidden_size
    assert large.train.epochs <= small.train.epochs
    assert large.train.tokens_per_step >= small.train.tokens_per_step
    assert large.model.dropout <= small.model.dropout
