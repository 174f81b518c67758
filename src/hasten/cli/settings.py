"""From the flags of a verb to a configuration, and the list of all keys for `--help-all`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import typer

from hasten.config.load import build_config, known_keys
from hasten.config.schema import SECTIONS, DataConfig, RunConfig
from hasten.core.errors import UsageError, nearest

_TOKENIZER_KINDS = ("bpe", "wordpiece", "unigram", "word", "char", "byte")
_READING_KEYS = tuple(
    f"data.{name}" for name in ("delimiter", "header", "encoding", "max_rejected_fraction")
)


def config_from_flags(
    flags: Mapping[str, Any], *, preset: str | None, file: str | None, assignments: list[str] | None
) -> RunConfig:
    """Builds the configuration from plain flags and `section.key=value` assignments.

    Args:
        flags: dotted key to value; None where the flag was not given.
        preset: `--preset`.
        file: `--config`.
        assignments: every `--section.key value`.

    Raises:
        UsageError: a key is unknown, or given both as a plain flag and as an assignment.
    """
    overrides = {key: value for key, value in flags.items() if value is not None}
    for assignment in assignments or []:
        key, separator, value = assignment.partition("=")
        if not separator:
            raise UsageError(f"--set {assignment}: write KEY=VALUE.")
        if key not in known_keys():
            raise UsageError(f"no such key: --{key}.{nearest(key, known_keys())}")
        if key in overrides and str(overrides[key]) != value:
            raise UsageError(f"--{key} is given twice, as {overrides[key]} and as {value}.")
        overrides[key] = value
    return build_config(preset=preset, file=file, overrides=overrides)


def reading_from_flags(assignments: list[str] | None, **flags: Any) -> DataConfig:
    """Builds what says how a file is to be read, for the verbs that train nothing.

    Args:
        assignments: every `--section.key value`.
        flags: values of keys of the section ``data``; None where the flag was not given.

    Raises:
        UsageError: a key that does not say how a file is read.
    """
    for assignment in assignments or []:
        key = assignment.partition("=")[0]
        if key in known_keys() and key not in _READING_KEYS:
            raise UsageError(
                f"--{key} is for training; here there are --{', --'.join(_READING_KEYS)}."
            )
    named = {f"data.{name}": value for name, value in flags.items()}
    return config_from_flags(named, preset=None, file=None, assignments=assignments).data


def tokenizer_flags(value: str | None) -> dict[str, str | None]:
    """Returns the keys that `--tokenizer` sets: a kind to train, or a file to load.

    Raises:
        UsageError: it is neither.
    """
    if value is None:
        return {}
    if value in _TOKENIZER_KINDS:
        return {"tokenizer.kind": value}
    if not Path(value).exists():
        raise UsageError(
            f"--tokenizer {value}: neither a file nor one of {', '.join(_TOKENIZER_KINDS)}."
            f"{nearest(value, _TOKENIZER_KINDS)}"
        )
    return {"tokenizer.path": value}


def show_all_keys(wanted: bool) -> None:
    """Prints every key with its default and meaning, and stops."""
    if not wanted:
        return
    typer.echo("Every key; write --section.key VALUE, or sections in a YAML file for --config.\n")
    sections = {"run": RunConfig, **SECTIONS}
    for section, model in sections.items():
        typer.echo(f"{section}: {(model.__doc__ or '').strip()}")
        for name, field in model.model_fields.items():
            if section == "run" and name in SECTIONS:
                continue
            key = name if section == "run" else f"{section}.{name}"
            choices = [str(c) for c in _literals(field.annotation) if c != field.default]
            default = [] if field.default is None else [f"[{_as_written(field.default)}]"]
            others = [f"or {', '.join(choices)}"] if choices else []
            typer.echo(f"  --{key:<27} {' '.join([str(field.description), *default, *others])}")
        typer.echo("")
    raise typer.Exit


def _literals(annotation: Any) -> tuple[Any, ...]:
    """Returns the words that a key may be set to."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return tuple(word for part in get_args(annotation) for word in _literals(part))


def _as_written(value: Any) -> str:
    """Writes a default as a person would, not as Python does."""
    return str(value).lower() if isinstance(value, bool) else str(value)
