"""What a fine-tuned model keeps of the folder that it began with, besides weights.

pretrained folder --write_inherited--> inherited.json of the run --read_inherited--> model/
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hasten.core.files import read_object
from hasten.data.template import Framing
from hasten.training.saved import CONFIG, GENERATION, Inherited

_FILE = "inherited.json"
# Keys of config.json that say how a model is used and nothing of what it computes.
_KEPT = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "sep_token_id",
    "cls_token_id",
    "mask_token_id",
    "unk_token_id",
    "decoder_start_token_id",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "bad_words_ids",
    "tokenizer_class",
    "task_specific_params",
)


def write_inherited(
    folder: Path, pretrained: Path, framing: Framing, names: Mapping[str, str]
) -> None:
    """Writes into a run folder what is to be kept of a pretrained one.

    Args:
        folder: of the run.
        pretrained: folder of the model.
        framing: what it wants around texts.
        names: its special tokens, by transformers' names.

    Raises:
        DamagedError: a file of that one is no JSON.
    """
    config = optional_object(pretrained / CONFIG) or {}
    content = {
        "config": {key: config[key] for key in _KEPT if config.get(key) is not None},
        "generation": optional_object(pretrained / GENERATION),
        "framing": asdict(framing),
        "names": dict(names),
    }
    text = json.dumps(content, ensure_ascii=False, indent=2)
    (folder / _FILE).write_text(text + "\n", encoding="utf-8")


def read_inherited(folder: Path) -> Inherited | None:
    """Returns what a run keeps; None where it began with nothing.

    Raises:
        DamagedError: the file is no JSON.
    """
    content = optional_object(folder / _FILE)
    if content is None:
        return None
    framing = Framing.from_json(content["framing"])
    return Inherited(content["config"], content["generation"], framing, content["names"])


def optional_object(path: Path) -> dict[str, Any] | None:
    """Returns the JSON object in a file; None where there is no file, ``DamagedError`` else."""
    return read_object(path) if path.is_file() else None
