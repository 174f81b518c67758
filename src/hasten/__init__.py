"""From a file of examples to a trained, tested, usable Transformer.

Public names are loaded when they are first used, so that importing this package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hasten.core.batch import PackedBatch
    from hasten.core.errors import HastenError
    from hasten.data.dataset import TextDataset
    from hasten.model.transformer import Transformer
    from hasten.training.run import Run, load, train

__version__ = "0.1.0"

_HOMES = {
    "HastenError": "hasten.core.errors",
    "PackedBatch": "hasten.core.batch",
    "Run": "hasten.training.run",
    "TextDataset": "hasten.data.dataset",
    "Transformer": "hasten.model.transformer",
    "load": "hasten.training.run",
    "train": "hasten.training.run",
}

__all__ = [  # noqa: RUF022 - in the order of use
    "train",
    "load",
    "Run",
    "Transformer",
    "TextDataset",
    "PackedBatch",
    "HastenError",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'hasten' has no attribute '{name}'")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
