"""From the flags of a verb to a configuration, and the list of all keys for `--help-all`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import typer

from hasten.config.load import build_config, known_keys
from hasten.config.schema import SECTIONS, RunConfig
from hasten.core.errors import UsageError, nearest

_TOKENIZER_KINDS = ("bpe", "wordpiece", "unigram", "word", "char", "byte")


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


def tokenizer_flags(value: str | None) -> dict[str, str | None]:
    """Returns the keys that `--tokenizer` sets: a kind to train, or a file to load."""
    if value is None:
        return {}
    return {"tokenizer.kind" if value in _TOKENIZER_KINDS else "tokenizer.path": value}


def show_all_keys(wanted: bool) -> None:
    """Prints every key with its default and meaning, and stops."""
    if not wanted:
        return
    typer.echo("Every key; write --section.key VALUE, or sections in a YAML file for --config.\n")
    for section, model in SECTIONS.items():
        typer.echo(f"{section}: {(model.__doc__ or '').strip()}")
        for name, field in model.model_fields.items():
            default = "" if field.default is None else f" [{field.default}]"
            typer.echo(f"  --{section}.{name:<22} {field.description}{default}")
        typer.echo("")
    raise typer.Exit
