"""Puts a run together: the one file that knows every part.

    RunConfig --prepare--> data --choose--> RunConfig without auto --build--> Loop

It holds no branch on a task's or an optimizer's name: those are looked up in registries.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from pathlib import Path

import numpy as np
import torch

from hasten.config.load import replace_values
from hasten.config.schema import RunConfig, settled
from hasten.core.errors import UsageError, nearest
from hasten.core.products import use_library
from hasten.core.ranks import ALONE, Ranks
from hasten.core.seeds import derive_seed
from hasten.data.subword import supports_dropout
from hasten.model.config import TransformerConfig
from hasten.model.stages import StageCosts, stage_costs
from hasten.model.transformer import Transformer
from hasten.optim.averaging import WeightAverage
from hasten.optim.layer_decay import layer_rates
from hasten.optim.optimizers import build_optimizer, parameter_groups, split_parameters
from hasten.optim.schedules import PlateauSettings, Schedule, build_schedule
from hasten.parallel.apply import ParallelSettings, apply_parallel, check_layout
from hasten.parallel.layout import choose_layout
from hasten.parallel.resources import Resources, assumed_resources
from hasten.parallel.traffic import describe_traffic, largest_traffic
from hasten.plan.choices import (
    Choice,
    DataFacts,
    choose,
    choose_for_task,
    choose_processes,
)
from hasten.plan.fine_tuning import (
    choose_before_data,
    choose_for_fine_tuning,
    free_options,
    settle_pretrained,
)
from hasten.plan.memory import Load
from hasten.plan.portable import check_portable, choose_portable, portable_options
from hasten.plan.probe import choose_library, choose_precision
from hasten.plan.spread import Spread, choose_spread
from hasten.task.contract import Task
from hasten.training.fine_tuning import (
    check_fine_tuning,
    prepare_fine_tuning,
    trained_part,
    warn_without_class,
)
from hasten.training.loop import Loop, LoopSettings
from hasten.training.machine import choose_device
from hasten.training.observe import Observer
from hasten.training.planned import Plan
from hasten.training.precision import computing_in, convert_matrices
from hasten.training.prepare import PreparedData, prepare_data, with_drawing
from hasten.training.pretrained import (
    Pretrained,
    begin_with,
    open_pretrained,
    refuse_fine_tuning,
)
from hasten.training.sources import open_sources, warn_about_rows
from hasten.training.stage_times import measure_stage_costs
from hasten.training.start import read_start
from hasten.training.step import Parts, StepSettings

_MAX_EVALUATIONS = 100
_MAX_LENGTHS = 1024


def plan_run(config: RunConfig, observer: Observer, resources: Resources | None = None) -> Plan:
    """Prepares the data and makes every automatic choice.

    Args:
        config: of the run, as it was asked for.
        observer: told of each choice.
        resources: of the processes, where there are several and their layout is open; None for
            what they would have on this host.

    Raises:
        HastenError: whatever would keep the run from starting.
    """
    device, device_reason = choose_device(config.train.device)
    sources = open_sources(config, observer)
    task = sources.task
    choices: list[Choice] = []
    if config.task == "auto":
        choices.append(Choice("task", task.name, sources.task_reason))
    pretrained, of_model, before = None, list[Choice](), list[Choice]()
    if config.model.pretrained is None:
        refuse_fine_tuning(config)
        config, of_model = choose_portable(config, task.architecture, task.uses)
    else:
        pretrained = open_pretrained(config, task, observer)
        config, of_model = settle_pretrained(config, pretrained.architecture, pretrained.name)
        config, before = choose_before_data(config, pretrained.architecture)
    config, of_task = choose_for_task(config, task.name, task.architecture, task.default_metric)
    _check_evaluation(config, task)
    config, of_processes = choose_processes(config)
    warn_about_rows(sources, observer)
    tokenizers, framing = None, None
    if pretrained is not None:
        tokenizers, framing = pretrained.tokenizers, pretrained.framing
    data = prepare_data(config, sources, observer, tokenizers, framing)
    choices += [*of_model, *data.choices]
    config = replace_values(config, {choice.key: choice.value for choice in choices})
    config, of_data = _choose_from_data(config, data, pretrained)
    config, of_products = _choose_products(config, device, observer)
    of_data += of_products
    architecture = _architecture(config, data.task, pretrained)
    plan = Plan(config, choices, data, device, architecture, pretrained)
    if config.parallel.layout == "auto":
        found = choose_layout_of(plan, resources)
        if found.warning:
            observer.warn(found.warning)
        of_data.append(Choice("parallel.layout", str(found.layout), found.reason))
        config = replace_values(config, {"parallel.layout": str(found.layout)})
    first = Choice("train.device", device.type, device_reason)
    chosen = [first, *of_processes, *before, *of_task, *of_data]
    for reason, some in itertools.groupby(chosen, lambda choice: choice.reason):
        settings = ", ".join(f"{choice.key} {_shown(choice.value)}" for choice in some)
        observer.note(f"{settings} ({reason})")
    choices += chosen
    _check_layout(config, plan)
    config, of_cut = _choose_stage_costs(config, plan, observer)
    choices += of_cut
    _tell_traffic(dataclasses.replace(plan, config=config), observer)
    warn_without_class(config.finetune, architecture, observer)
    return dataclasses.replace(plan, config=config, data=with_drawing(data, config))


def _choose_from_data(
    config: RunConfig, data: PreparedData, pretrained: Pretrained | None
) -> tuple[RunConfig, list[Choice]]:
    """Makes the choices that depend on the data; those of fine-tuning come first."""
    facts, first = _facts(data), list[Choice]()
    if pretrained is not None:
        config, first = choose_for_fine_tuning(config, facts, pretrained.architecture)
    config, rest = choose(config, facts)
    return config, [*first, *rest]


def _check_layout(config: RunConfig, plan: Plan) -> None:
    """Refuses a layout that does not go with the model."""
    layout = choose_layout(config.parallel.layout, None)
    check_layout(plan.architecture, layout, config.parallel.schedule, compiles=config.train.compile)
    check_fine_tuning(
        config.finetune,
        layout,
        settled(config.train.precision),
        adds_tokens=bool(config.tokenizer.add_tokens),
    )


def _choose_stage_costs(
    config: RunConfig, plan: Plan, observer: Observer
) -> tuple[RunConfig, list[Choice]]:
    """Measures by what a pipeline is cut; it is saved, so that all processes cut alike."""
    layout = choose_layout(config.parallel.layout, None)
    if layout.pipeline == 1 or config.parallel.stage_costs is not None:
        return config, []
    found = dataclasses.astuple(measure_stage_costs(plan.architecture, _load(plan), plan.device))
    reason = "embedding, a block and head, measured here"
    observer.note(f"parallel.stage_costs {_shown(found)} ({reason})")
    choice = Choice("parallel.stage_costs", found, reason)
    return replace_values(config, {choice.key: choice.value}), [choice]


def _tell_traffic(plan: Plan, observer: Observer) -> None:
    """Tells what the processes of a run send."""
    layout = choose_layout(plan.config.parallel.layout, None)
    if layout.size > 1:
        shape = _load(plan).step_shape(plan.architecture, layout)
        who = "each process" if layout.pipeline == 1 else "the stage that sends most"
        observer.note(describe_traffic(largest_traffic(plan.architecture, layout, shape), who))


def _choose_products(
    config: RunConfig, device: torch.device, observer: Observer
) -> tuple[RunConfig, list[Choice]]:
    """Returns the configuration with how matrices are multiplied, as is fastest here."""
    train, hidden_size = config.train, settled(config.model.hidden_size)
    library, library_reason = choose_library(train.matrix_library, device, hidden_size)
    precision, precision_reason, slow = choose_precision(train.precision, device, hidden_size)
    if slow:
        observer.warn(slow)
    found = [
        Choice("train.matrix_library", library, library_reason),
        Choice("train.precision", precision, precision_reason),
    ]
    values = {"train.device": device.type, **{choice.key: choice.value for choice in found}}
    auto = [c for c in found if getattr(train, c.key.removeprefix("train.")) == "auto"]
    return replace_values(config, values), auto


def choose_layout_of(plan: Plan, resources: Resources | None = None) -> Spread:
    """Returns the layout for the processes of a run, whose other choices are made."""
    size = settled(plan.config.parallel.processes)
    resources = resources or assumed_resources(size, plan.device)
    return choose_spread(plan.architecture, size, _load(plan), resources)


def _load(plan: Plan) -> Load:
    """Returns what a run asks of its processes."""
    config, lengths = plan.config, plan.data.splits["train"].lengths
    costs = stage_costs(plan.architecture, round(float(lengths.mean())))
    if config.parallel.stage_costs is not None:
        costs = StageCosts(*config.parallel.stage_costs)
    at = np.linspace(0, len(lengths) - 1, min(len(lengths), _MAX_LENGTHS)).astype(int)
    return Load(
        tokens_per_step=-(-int(lengths.sum()) // plan.steps_per_epoch),
        micro_batch_tokens=settled(config.train.micro_batch_tokens),
        lengths=tuple(np.sort(lengths)[at].tolist()),
        precision=settled(config.train.precision),
        device_type=plan.device.type,
        recompute=config.train.recompute,
        label_smoothing=settled(config.train.label_smoothing),
        optimizer=settled(config.optim.optimizer),
        momentum=config.optim.momentum,
        averages=settled(config.train.ema_decay) > 0,
        keeps_best=len(plan.data.splits["validation"]) > 0,
        schedule=config.parallel.schedule,
        costs=costs,
        part=trained_part(config.finetune),
    )


def _check_evaluation(config: RunConfig, task: type[Task]) -> None:
    """Refuses what would only come to light at the first evaluation, or the last.

    Raises:
        UsageError: naming the key.
    """
    settings, metrics = config.eval, task.higher_is_better
    if settings.metric not in metrics:
        raise UsageError(
            f"eval.metric '{settings.metric}' is not measured in {task.name}; there are "
            f"{', '.join(metrics)}.{nearest(settings.metric, metrics)}"
        )
    if settings.metric in task.decoded_metrics and not settings.decode_examples:
        raise UsageError(
            f"eval.metric '{settings.metric}' is measured by decoding: set eval.decode_examples "
            "above 0."
        )
    if settings.num_beams == 1 and settings.length_penalty != 1:
        raise UsageError(
            "eval.length_penalty compares beams: set eval.num_beams above 1, or leave it out."
        )


def _facts(data: PreparedData) -> DataFacts:
    train = data.splits["train"]
    return DataFacts(
        architecture=data.task.architecture,
        head=data.task.model_options()["head"],
        num_examples=len(train),
        num_classes=data.task.num_classes,
        num_tokens=int(train.lengths.sum()),
        num_threads=available_cores(),
        threads_reason="OMP_NUM_THREADS"
        if os.environ.get("OMP_NUM_THREADS")
        else "this machine's cores",
        has_validation=len(data.splits["validation"]) > 0,
        has_merges=all(map(supports_dropout, data.task.tokenizers)),
    )


def _shown(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def available_cores() -> int:
    """Returns the threads to compute with: OMP_NUM_THREADS, else the cores this process may use."""
    if wanted := os.environ.get("OMP_NUM_THREADS", "").strip():
        return max(1, int(wanted)) if wanted.isdigit() else torch.get_num_threads()
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return len(affinity(0)) if affinity is not None else torch.get_num_threads()


def build_loop(plan: Plan, folder: Path, observer: Observer, ranks: Ranks = ALONE) -> Loop:
    """Builds model, optimizer, schedule and loop for a planned run; all its processes at once."""
    config, data = plan.config, plan.data
    if config.train.deterministic and plan.device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    use_library(settled(config.train.matrix_library))
    model = build_model(plan, folder, observer).to(plan.device)
    for stack in model.stacks:
        stack.recompute = config.train.recompute
    convert_matrices(model, settled(config.train.precision))
    parallel = apply_parallel(model, ranks, _parallel_settings(plan))
    named = list(model.named_parameters())
    decayed, _ = split_parameters(named)
    decay, rates = config.finetune.layer_decay, None
    if decay != 1:
        rates = layer_rates((name for name, _ in named), plan.architecture, decay)
    optimizer = build_optimizer(
        settled(config.optim.optimizer),
        parameter_groups(named, weight_decay=settled(config.optim.weight_decay), rates=rates),
        learning_rate=settled(config.train.learning_rate),
        betas=settled(config.optim.betas),
        momentum=config.optim.momentum,
        epsilon=config.optim.epsilon,
    )
    ema_decay = settled(config.train.ema_decay)
    parts = Parts(
        model=model,
        parallel=parallel,
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
            precision=settled(config.train.precision),
            l1=config.train.l1,
            l2=config.train.l2,
        ),
    )
    validation = data.splits["validation"]
    return Loop(
        parts=parts,
        train=data.splits["train"],
        validation=validation if len(validation) else None,
        settings=_loop_settings(plan),
        folder=folder,
        observer=observer,
    )


def _parallel_settings(plan: Plan) -> ParallelSettings:
    config, load = plan.config, _load(plan)
    precision = settled(config.train.precision)
    return ParallelSettings(
        device=plan.device,
        computing=lambda: computing_in(precision, plan.device),
        schedule=config.parallel.schedule,
        num_tokens=load.num_tokens(choose_layout(config.parallel.layout, None)),
        costs=load.costs,
        compiles=config.train.compile,
    )


def build_model(plan: Plan, folder: Path, observer: Observer) -> Transformer:
    """Builds the plain model with the weights that a run begins with.

    Args:
        plan: of the run.
        folder: of the run, where weights to begin with are read once they are there.
        observer: told of what a pretrained folder lacks.

    Raises:
        DamagedError: weights cannot be read.
        UsageError: settings that do not fit the model.
    """
    config = plan.config
    torch.manual_seed(derive_seed("weights", config.train.seed))
    if plan.pretrained is None:
        model = Transformer.from_config(plan.architecture)
    else:
        model = begin_with(plan.pretrained, plan.architecture, plan.data.task.labels, observer)
    trained = prepare_fine_tuning(model, config.finetune)
    if plan.pretrained is not None:
        observer.note(trained)
    read_start(folder, model)
    return model


def _architecture(
    config: RunConfig, task: Task, pretrained: Pretrained | None
) -> TransformerConfig:
    """Returns what the model is made of: as is set and as the task, or a folder, decides."""
    if pretrained is not None:
        decided = pretrained.with_head(task.model_options())
        return dataclasses.replace(decided, **free_options(config, decided))
    fields = {field.name for field in dataclasses.fields(TransformerConfig)}
    options = {n: v for n, v in config.model.model_dump().items() if n in fields}
    decided = {"architecture": task.architecture, **task.model_options()}
    if not config.model.portable:
        return TransformerConfig(**options | decided)
    portable = portable_options(task.architecture, task.head)
    architecture = TransformerConfig(**options | portable | decided)
    check_portable(architecture)
    return architecture


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
    if config.eval.patience and not len(plan.data.splits["validation"]):
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
        decode_examples=config.eval.decode_examples,
    )
