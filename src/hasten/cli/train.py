"""`hasten train`: from a file to a trained and tested model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from hasten.cli.console import build_observer, count, say
from hasten.cli.settings import config_from_flags, show_all_keys, tokenizer_flags
from hasten.core.errors import UsageError

if TYPE_CHECKING:
    from hasten.config.schema import ParallelConfig, RunConfig
    from hasten.training.planned import Plan


def train(
    data: list[str] = typer.Argument(
        None,
        metavar="[FILE]...",
        help="Training file(s): CSV, TSV, JSONL, Parquet, text, SQuAD JSON; - is stdin.",
    ),
    validation: list[str] = typer.Option(
        None, metavar="FILE", help="Validation file; else a tenth is held out."
    ),
    test: list[str] = typer.Option(
        None, metavar="FILE", help="Test file, measured once after training."
    ),
    source: str = typer.Option(None, help="Column to translate from, or a file of lines."),
    target: str = typer.Option(None, help="Column to translate to, or a file of lines."),
    validation_source: str = typer.Option(None, metavar="FILE", help="Validation: source lines."),
    validation_target: str = typer.Option(None, metavar="FILE", help="Validation: target lines."),
    test_source: str = typer.Option(None, metavar="FILE", help="Test: source lines."),
    test_target: str = typer.Option(None, metavar="FILE", help="Test: target lines."),
    text_column: list[str] = typer.Option(None, help="Text column, name or number; repeatable."),
    label_column: str = typer.Option(None, help="Label column, name or number."),
    task: str = typer.Option(
        None,
        help="text-classification, text-generation, translation, question-answering.",
    ),
    model: str = typer.Option(
        None, metavar="MODEL", help="Pretrained model to begin with: folder, or owner/name."
    ),
    preset: str = typer.Option(None, help="Named settings: tiny, small, base, article."),
    config: str = typer.Option(None, "-c", "--config", help="YAML file of settings."),
    output: str = typer.Option(None, "-o", "--output", help="Run folder [runs/<data>-<n>]."),
    tokenizer: str = typer.Option(
        None, help="bpe, wordpiece, unigram, word, char, byte, or a file."
    ),
    seed: str = typer.Option(None, help="Every random choice derives from it."),
    epochs: str = typer.Option(None, help="Passes over the training data."),
    device: str = typer.Option(None, help="auto, cpu or cuda."),
    precision: str = typer.Option(None, help="auto, float32, bf16, fp16 or fp8."),
    processes: str = typer.Option(None, help="Processes to start on this machine."),
    parallel: str = typer.Option(
        None, metavar="LAYOUT", help="What they are for, as in shard=2,tensor=2."
    ),
    max_restarts: str = typer.Option(
        None, metavar="N", help="Times to go on by itself after a process was lost [0]."
    ),
    resume: str = typer.Option(None, help="Go on with this run folder, exactly."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Print the resolved plan and stop."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object and nothing else."),
    quiet: bool = typer.Option(False, "--quiet", help="No progress, only warnings and results."),
    assignments: list[str] = typer.Option(None, "--set", hidden=True),
    help_all: bool = typer.Option(
        False, "--help-all", is_eager=True, callback=show_all_keys, help="List every key and stop."
    ),
) -> None:
    """Train and test a model on a file of examples; everything not given is chosen and explained.

    Any key is a flag too: --train.learning_rate 3e-4. See --help-all.
    """
    flags = {
        "task": task,
        "data.train": tuple(data) if data else None,
        "data.validation": tuple(validation) if validation else None,
        "data.test": tuple(test) if test else None,
        "data.source": source,
        "data.target": target,
        "data.validation_source": validation_source,
        "data.validation_target": validation_target,
        "data.test_source": test_source,
        "data.test_target": test_target,
        "data.text_columns": tuple(text_column) if text_column else None,
        "data.label_column": label_column,
        "model.pretrained": model,
        "train.seed": seed,
        "train.epochs": epochs,
        "train.device": device,
        "train.precision": precision,
        **tokenizer_flags(tokenizer),
    }
    own = {
        "parallel.processes": processes,
        "parallel.layout": parallel,
        "parallel.max_restarts": max_restarts,
    }
    if resume is not None:
        given = [key for key, value in flags.items() if value is not None]
        if given or preset or config or output or assignments or dry_run:
            raise UsageError(
                "--resume goes on with the run as it was: give it alone, or with --processes, "
                "--parallel and --max-restarts."
            )
        layout = None
        if any(value is not None for value in own.values()):
            layout = config_from_flags(own, preset=None, file=None, assignments=None).parallel
        _train(_Wanted(None, resume, layout, as_json=as_json, quiet=quiet))
        return
    settings = config_from_flags(
        {**flags, **own}, preset=preset, file=config, assignments=assignments
    )
    if dry_run:
        from hasten.training.session import plan_only

        _show_plan(plan_only(settings, output, build_observer(quiet=quiet or as_json)), as_json)
        return
    _train(_Wanted(settings, output, None, as_json=as_json, quiet=quiet))


@dataclass(frozen=True)
class _Wanted:
    """A new run, or where there is no configuration the one in ``folder``, to be gone on with."""

    settings: RunConfig | None
    folder: str | None
    parallel: ParallelConfig | None
    as_json: bool
    quiet: bool


def _train(wanted: _Wanted) -> None:
    """Trains here, or starts the processes that do."""
    from hasten.training.launching import launch_training, num_processes
    from hasten.training.session import resumed_config

    if wanted.settings is not None:
        settings = wanted.settings
    else:
        assert wanted.folder is not None
        settings = resumed_config(Path(wanted.folder), wanted.parallel)
    if num_processes(settings.parallel) == 1:
        _finish(wanted)
        return
    flags = ["--json"] * wanted.as_json + ["--quiet"] * wanted.quiet
    code = launch_training(
        settings,
        wanted.folder,
        resumes=wanted.settings is None,
        flags=flags,
        say=lambda text: say(f"warning: {text}"),
    )
    if code:
        raise typer.Exit(code)


def _finish(wanted: _Wanted) -> None:
    """Trains in this process and prints the result, where it is the one that speaks."""
    from hasten.cli.show import verdict_text
    from hasten.training.folder import to_json
    from hasten.training.session import resume_run, speaks, start_run

    as_json, folder = wanted.as_json, wanted.folder
    observer = build_observer(quiet=wanted.quiet or as_json)
    try:
        if wanted.settings is None:
            assert folder is not None
            result = resume_run(Path(folder), observer, wanted.parallel)
        else:
            result = start_run(wanted.settings, folder, observer)
    finally:
        getattr(observer, "close", lambda: None)()
    if not speaks():
        return
    if as_json:
        typer.echo(to_json(result))
    else:
        typer.echo(verdict_text(result))


def _show_plan(plan: Plan, as_json: bool) -> None:
    from hasten.config.load import config_to_yaml

    if as_json:
        choices = {c.key: {"value": c.value, "reason": c.reason} for c in plan.choices}
        typer.echo(
            json.dumps(
                {
                    "config": plan.config.model_dump(mode="json"),
                    "choices": choices,
                    "steps": plan.total_steps,
                },
                ensure_ascii=False,
            )
        )
        return
    typer.echo(config_to_yaml(plan.config).rstrip())
    steps = count(plan.total_steps, "step")
    typer.echo(f"# {steps} of at most {plan.config.train.tokens_per_step:,} tokens")
