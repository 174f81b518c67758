"""Builds the configuration of a run: defaults < preset < file < command line.

PRESETS[name], config.yaml, train.epochs=3
  -> nested mapping -> RunConfig (checked) -> config.yaml of the run
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from hasten.config.presets import PRESETS
from hasten.config.schema import SECTIONS, RunConfig
from hasten.core.errors import UsageError, nearest

Nested = dict[str, Any]


def build_config(
    *,
    preset: str | None = None,
    file: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> RunConfig:
    """Builds a run's configuration.

    Args:
        preset: name of a preset; one named in the file counts where this is None.
        file: YAML file of sections.
        overrides: dotted keys with their values; text is converted as on the command line.

    Raises:
        UsageError: an unknown key (with the nearest one), an unreadable file or a wrong value.
    """
    from_file = _read_yaml(Path(file)) if file is not None else {}
    from_flags: Nested = {}
    for key, value in (overrides or {}).items():
        _set(from_flags, key, value)
    name = preset or from_flags.get("preset") or from_file.get("preset")
    if name is not None and (not isinstance(name, str) or name not in PRESETS):
        raise UsageError(
            f"unknown preset '{name}'; there are {', '.join(PRESETS)}.{nearest(str(name), PRESETS)}"
        )
    merged: Nested = {"preset": name}
    for layer in (PRESETS[name] if name else {}, from_file, from_flags):
        _merge(merged, layer)
    merged["preset"] = name
    try:
        return RunConfig.model_validate(merged)
    except ValidationError as error:
        raise UsageError(_explain(error, merged)) from None


def config_to_yaml(config: RunConfig, *, only_given: bool = False) -> str:
    """Returns the configuration as YAML that ``build_config`` reads back to the same values.

    Args:
        config: of a run.
        only_given: leave out what nobody has set, so that it stays so.
    """
    content = config.model_dump(mode="json", exclude_unset=only_given)
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def replace_values(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """Returns a copy with the dotted keys of ``values`` set, checked anew."""
    nested = config.model_dump(exclude_unset=True)
    for key, value in values.items():
        _set(nested, key, value)
    try:
        return RunConfig.model_validate(nested)
    except ValidationError as error:
        raise UsageError(_explain(error, nested)) from None


def known_keys() -> list[str]:
    """Returns every key a person may set, dotted."""
    keys = [name for name in RunConfig.model_fields if name not in SECTIONS]
    for section, model in SECTIONS.items():
        keys += [f"{section}.{name}" for name in model.model_fields]
    return keys


def unsettled_keys(config: RunConfig) -> list[str]:
    """Returns the dotted keys that are still ``auto``, of which a run's own file has none."""
    values = config.model_dump()
    found = []
    for key in known_keys():
        section, _, name = key.rpartition(".")
        if (values[section] if section else values)[name] in ("auto", ("auto",)):
            found.append(key)
    return found


def differences(old: RunConfig, new: RunConfig) -> list[str]:
    """Returns the dotted keys whose values differ."""
    first, second = old.model_dump(), new.model_dump()
    found = []
    for key in known_keys():
        section, _, name = key.rpartition(".")
        a, b = (tree[section][name] if section else tree[name] for tree in (first, second))
        if a != b:
            found.append(key)
    return found


def _read_yaml(path: Path) -> Nested:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path}: no such configuration file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read: {error}.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UsageError(
            f"{path}{line}: not valid YAML: {getattr(error, 'problem', error)}."
        ) from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UsageError(
            f"{path}: expected sections such as 'train:', found a {type(content).__name__}."
        )
    for name in SECTIONS.keys() & content.keys():
        if content[name] is None:  # all its keys are commented out
            del content[name]
        elif not isinstance(content[name], dict):
            raise UsageError(
                f"{path}: {name}: {content[name]!r} does not fit: it should be a section of keys."
            )
    return content


def _set(tree: Nested, key: str, value: Any) -> None:
    if key not in known_keys():
        raise UsageError(f"unknown key '{key}'.{nearest(key, known_keys())}")
    section, _, name = key.rpartition(".")
    field = (SECTIONS[section] if section else RunConfig).model_fields[name]
    may_be_none = type(None) in get_args(field.annotation)
    if may_be_none and isinstance(value, str) and value.lower() in ("none", "null"):
        value = None
    if section:
        tree.setdefault(section, {})[name] = value
    else:
        tree[name] = value


def _merge(into: Nested, layer: Mapping[str, Any]) -> None:
    for key, value in layer.items():
        if isinstance(value, Mapping):
            _merge(into.setdefault(key, {}), value)
        else:
            into[key] = value


def _explain(error: ValidationError, given: Nested) -> str:
    """Puts the first problem of a validation error into one line."""
    problem = error.errors()[0]
    # A union reports one problem per member and adds the member's name to the place.
    place = [str(part) for part in problem["loc"]]
    key = ".".join(place[:2] if place and place[0] in SECTIONS else place[:1])
    if problem["type"] == "extra_forbidden":
        return f"unknown key '{key}'.{nearest(key, known_keys())}"
    section, _, name = key.rpartition(".")
    schema = (SECTIONS[section] if section else RunConfig).model_json_schema()["properties"][name]
    value = (given[section] if section else given)[name]
    accepted = _accepted(schema)
    if problem["type"] == "finite_number":  # which a schema of JSON, where all are, does not say
        accepted = accepted.replace("a number", "a finite number")
    return f"{key}: {value!r} does not fit: it should be {accepted}."


_KINDS = {"integer": "a whole number", "number": "a number", "string": "a text", "null": "'none'"}
_BOUNDS = {
    "minimum": "of at least",
    "exclusiveMinimum": "greater than",
    "maximum": "of at most",
    "exclusiveMaximum": "less than",
}


def _accepted(schema: Nested) -> str:
    """Says in words which values a JSON schema accepts."""
    if members := schema.get("anyOf"):
        return ", or ".join(map(_accepted, members))
    if "const" in schema:
        return repr(schema["const"])
    if words := schema.get("enum"):
        return f"{', '.join(map(repr, words[:-1]))} or {words[-1]!r}"
    if schema["type"] == "boolean":
        return "true or false"
    if schema["type"] == "array":
        items = schema.get("prefixItems")
        if items is None:
            return f"{_accepted(schema['items'])}, or a list of several"
        return f"{len(items)} values with a comma between, each {_accepted(items[0])}"
    bounds = [f"{words} {schema[bound]:g}" for bound, words in _BOUNDS.items() if bound in schema]
    return f"{_KINDS[schema['type']]} {' and '.join(bounds)}".rstrip()
