"""`hasten train`: from a file to a trained and tested model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from hasten.cli.console import build_observer, count
from hasten.cli.settings import config_from_flags, show_all_keys, tokenizer_flags
from hasten.core.errors import UsageError

if TYPE_CHECKING:
    from hasten.training.build import Plan


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
    source: str = typer.Option(
        None, help="Column to translate from; without FILE, a file of lines."
    ),
    target: str = typer.Option(None, help="Column to translate to; without FILE, a file of lines."),
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
    preset: str = typer.Option(None, help="Named settings: tiny, small, base, article."),
    config: str = typer.Option(None, "-c", "--config", help="YAML file of settings."),
    output: str = typer.Option(None, "-o", "--output", help="Run folder [runs/<data>-<n>]."),
    tokenizer: str = typer.Option(
        None, help="bpe, wordpiece, unigram, word, char, byte, or a file."
    ),
    seed: int = typer.Option(None, help="Every random choice derives from it."),
    epochs: str = typer.Option(None, help="Passes over the training data."),
    device: str = typer.Option(None, help="auto, cpu or cuda."),
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
        "train.seed": seed,
        "train.epochs": epochs,
        "train.device": device,
        **tokenizer_flags(tokenizer),
    }
    observer = build_observer(quiet=quiet or as_json)
    if resume is not None:
        given = [key for key, value in flags.items() if value is not None]
        if given or preset or config or output or assignments or dry_run:
            raise UsageError("--resume goes on with the run as it was: give it alone.")
        _finish(resume, observer, as_json, None)
        return
    settings = config_from_flags(flags, preset=preset, file=config, assignments=assignments)
    if dry_run:
        from hasten.training.session import plan_only

        _show_plan(plan_only(settings, output, observer), as_json)
        return
    _finish(output, observer, as_json, settings)


def _finish(folder: str | None, observer: Any, as_json: bool, settings: Any) -> None:
    """Trains a new run, or resumes the one in ``folder`` where there are no settings."""
    from hasten.cli.show import verdict_text
    from hasten.training.folder import to_json
    from hasten.training.session import resume_run, start_run

    try:
        if settings is None:
            assert folder is not None
            result = resume_run(Path(folder), observer)
        else:
            result = start_run(settings, folder, observer)
    finally:
        getattr(observer, "close", lambda: None)()
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
