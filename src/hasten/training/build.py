"""Puts a run together: the one file that knows every part.

    RunConfig --prepare--> data --choose--> RunConfig without auto --build--> Loop

It holds no branch on a task's or an optimizer's name: those are looked up in registries.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from hasten.config.load import replace_values
from hasten.config.schema import RunConfig, settled
from hasten.core.errors import UsageError
from hasten.core.seeds import derive_seed
from hasten.data.order import steps_per_epoch
from hasten.data.subword import supports_dropout
from hasten.data.tokenizer import choose_vocab_size
from hasten.model.config import TransformerConfig
from hasten.model.transformer import Transformer
from hasten.optim.averaging import WeightAverage
from hasten.optim.optimizers import build_optimizer, parameter_groups, split_parameters
from hasten.optim.schedules import PlateauSettings, Schedule, build_schedule
from hasten.plan.choices import Choice, DataFacts, choose
from hasten.training.loop import Loop, LoopSettings
from hasten.training.machine import choose_device
from hasten.training.observe import Observer
from hasten.training.prepare import PreparedData, prepare_data, with_subword_dropout
from hasten.training.step import Parts, StepSettings

_MAX_EVALUATIONS = 100


@dataclass(frozen=True)
class Plan:
    """A run before its first step.

    Attributes:
        config: without any ``auto``.
        choices: what was chosen automatically, and why.
        data: prepared splits.
        device: where to compute.
    """

    config: RunConfig
    choices: list[Choice]
    data: PreparedData
    device: torch.device

    @property
    def steps_per_epoch(self) -> int:
        """Global batches of one pass over the training rows."""
        tokens_per_step = settled(self.config.train.tokens_per_step)
        return steps_per_epoch(self.data.splits["train"].lengths, tokens_per_step)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        return max(1, round(settled(self.config.train.epochs) * self.steps_per_epoch))


def plan_run(config: RunConfig, observer: Observer) -> Plan:
    """Prepares the data and makes every automatic choice.

    Raises:
        HastenError: whatever would keep the run from starting.
    """
    device, reason = choose_device(config.train.device)
    data = prepare_data(config, observer)
    train = data.splits["train"]
    facts = DataFacts(
        num_examples=len(train.rows),
        num_classes=len(data.task.labels),
        num_tokens=int(train.lengths.sum()),
        num_threads=available_cores(),
        threads_reason="OMP_NUM_THREADS"
        if os.environ.get("OMP_NUM_THREADS")
        else "this machine's cores",
        has_validation=len(data.splits["validation"].rows) > 0,
        has_merges=supports_dropout(data.tokenizer),
    )
    config, choices = choose(config, facts)
    choices = [Choice("train.device", device.type, reason), *choices]
    for choice in choices:
        observer.note(f"{choice.key}: {choice.value} ({choice.reason})")
    choices += _choices_of_data(config, data)  # noted while the data was prepared
    values = {choice.key: choice.value for choice in choices}
    config = replace_values(config, values)
    return Plan(config, choices, with_subword_dropout(data, config), device)


def _choices_of_data(config: RunConfig, data: PreparedData) -> list[Choice]:
    """Returns what preparing the data decided of the settings left to it."""
    choices = []
    if config.task == "auto":
        choices.append(Choice("task", data.task.name, "the only task there is"))
    if config.data.segments == "auto":
        value = "separate" if data.form.separate_segments else "join"
        reason = f"text columns: {len(data.sources.columns.text)}"
        choices.append(Choice("data.segments", value, reason))
    if config.tokenizer.vocab_size == "auto":
        num_characters = data.sources.corpora["train"].num_characters
        size, reason = choose_vocab_size(num_characters, config.tokenizer.kind)
        choices.append(Choice("tokenizer.vocab_size", size, reason))
    return choices


def available_cores() -> int:
    """Returns the threads to compute with: OMP_NUM_THREADS, else the cores this process may use."""
    if wanted := os.environ.get("OMP_NUM_THREADS", "").strip():
        return max(1, int(wanted)) if wanted.isdigit() else torch.get_num_threads()
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return len(affinity(0)) if affinity is not None else torch.get_num_threads()


def build_loop(plan: Plan, folder: Path, observer: Observer) -> Loop:
    """Builds model, optimizer, schedule and loop for a planned run."""
    config, data = plan.config, plan.data
    if config.train.deterministic and plan.device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.manual_seed(derive_seed("weights", config.train.seed))
    model = build_model(config, data).to(plan.device)
    named = list(model.named_parameters())
    decayed, _ = split_parameters(named)
    optimizer = build_optimizer(
        config.optim.optimizer,
        parameter_groups(named, weight_decay=settled(config.optim.weight_decay)),
        learning_rate=settled(config.train.learning_rate),
        betas=settled(config.optim.betas),
        momentum=config.optim.momentum,
        epsilon=config.optim.epsilon,
    )
    ema_decay = settled(config.train.ema_decay)
    parts = Parts(
        model=model,
        task=data.task,
        optimizer=optimizer,
        schedule=_build_schedule(plan),
        penalised=tuple(parameter for _, parameter in decayed),
        average=WeightAverage(named, decay=ema_decay) if ema_decay else None,
        device=plan.device,
        settings=StepSettings(
            seed=config.train.seed,
            learning_rate=settled(config.train.learning_rate),
            micro_batch_tokens=settled(config.train.micro_batch_tokens),
            gradient_clip=config.train.gradient_clip,
            l1=config.train.l1,
            l2=config.train.l2,
        ),
    )
    validation = data.splits["validation"]
    return Loop(
        parts=parts,
        train=data.splits["train"],
        validation=validation if len(validation.rows) else None,
        settings=_loop_settings(plan),
        folder=folder,
        observer=observer,
    )


def build_model(config: RunConfig, data: PreparedData) -> Transformer:
    """Builds the model with freshly drawn weights."""
    fields = {field.name for field in dataclasses.fields(TransformerConfig)}
    options = {n: v for n, v in config.model.model_dump().items() if n in fields}
    num_segments = len(data.sources.columns.text) if data.form.separate_segments else 0
    return Transformer.from_config(
        TransformerConfig(
            vocab_size=data.tokenizer.get_vocab_size(),
            max_positions=data.form.max_length,
            num_token_types=num_segments,
            num_labels=len(data.task.labels),
            **options,
        )
    )


def _build_schedule(plan: Plan) -> Schedule:
    optim = plan.config.optim
    plateau = final_factor = None
    if optim.schedule == "plateau":
        metric = plan.config.eval.metric
        plateau = PlateauSettings(
            factor=optim.plateau_factor,
            patience=optim.plateau_patience,
            greater_is_better=plan.data.task.higher_is_better[metric],
        )
    elif optim.min_factor:
        final_factor = optim.min_factor
    return build_schedule(
        optim.schedule,
        total_steps=plan.total_steps,
        warmup_steps=round(optim.warmup_fraction * plan.total_steps),
        final_factor=final_factor,
        plateau=plateau,
    )


def _loop_settings(plan: Plan) -> LoopSettings:
    config = plan.config
    metric = config.eval.metric
    if config.eval.patience and not len(plan.data.splits["validation"].rows):
        raise UsageError("eval.patience needs validation rows, and there are none.")
    return LoopSettings(
        total_steps=plan.total_steps,
        tokens_per_step=settled(config.train.tokens_per_step),
        evaluate_every=max(
            1,
            round(plan.steps_per_epoch / config.eval.per_epoch),
            -(-plan.total_steps // _MAX_EVALUATIONS),
        ),
        log_every=config.train.log_every,
        metric=metric,
        higher_is_better=plan.data.task.higher_is_better[metric],
        patience=settled(config.eval.patience),
        max_skipped_steps=config.train.max_skipped_steps,
        checkpoint_seconds=60 * config.train.checkpoint_minutes,
    )
