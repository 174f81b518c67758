"""The architecture of a run as a file: what its model is made of, whatever decided it.

TransformerConfig <--> architecture.json of the run folder

A resumed run reads it, so that it needs neither the rules by which a size was chosen nor the folder
of a pretrained model.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hasten.core.errors import DamagedError, UsageError
from hasten.model.config import RotaryScaling, TransformerConfig

_FILE = "architecture.json"


def save_architecture(folder: Path, config: TransformerConfig) -> None:
    """Writes architecture.json."""
    text = json.dumps(dataclasses.asdict(config), indent=2)
    (folder / _FILE).write_text(text + "\n", encoding="utf-8")


def read_architecture(folder: Path) -> TransformerConfig:
    """Reads architecture.json.

    Raises:
        DamagedError: it is missing, or does not describe a model.
    """
    file = folder / _FILE
    try:
        return architecture_from_json(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise DamagedError(f"{file}: missing from the run folder.") from None
    except (OSError, ValueError, TypeError, UsageError) as error:
        raise DamagedError(f"{file}: does not describe a model: {error}") from None


def architecture_from_json(values: Mapping[str, Any]) -> TransformerConfig:
    """Returns the configuration that ``dataclasses.asdict`` turned into JSON.

    Raises:
        UsageError: values that do not fit each other.
        TypeError: a field is missing, or unknown.
    """
    scaling = values.get("rotary_scaling")
    return TransformerConfig(
        **{
            **values,
            "global_layers": tuple(values.get("global_layers", ())),
            "rotary_scaling": None if scaling is None else RotaryScaling(**scaling),
        }
    )
