"""The model folder: weights, configuration and tokenizer in the layout of the Hugging Face Hub.

    model/  config.json  model.safetensors  tokenizer.json

config.json holds the architecture, the labels (``id2label``) where there are any, how text becomes
tokens, and the SHA-256 of the other files. A model with a vocabulary of its own for targets has
target_tokenizer.json too.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from hasten.core.errors import DamagedError
from hasten.core.files import committed_folder, file_hash, machine_errors
from hasten.data.tokenizer import load_tokenizer
from hasten.model.config import TransformerConfig
from hasten.model.search import DecodingSettings
from hasten.model.transformer import Transformer
from hasten.task.contract import Task
from hasten.task.registry import task_named
from hasten.training.checkpoint import copy_into

FORMAT_VERSION = 2
_WEIGHTS = "model.safetensors"
# What transformers expects at the top of config.json.
_SHARED_KEYS = ("id2label", "label2id")
TOKENIZER_FILES = ("tokenizer.json", "target_tokenizer.json")


@dataclass(frozen=True)
class SavedModel:
    """A trained model and what it takes to use it.

    Attributes:
        model: in evaluation mode.
        task: with its reading and tokenizers.
        decoding: how predictions are decoded unless a person says otherwise.
    """

    model: Transformer
    task: Task
    decoding: DecodingSettings


def save_tokenizers(folder: Path, tokenizers: tuple[Tokenizer, ...]) -> list[str]:
    """Writes one file for each tokenizer; returns their names."""
    names = TOKENIZER_FILES[: len(tokenizers)]
    for name, tokenizer in zip(names, tokenizers, strict=True):
        tokenizer.save(str(folder / name))
    return list(names)


def load_tokenizers(folder: Path) -> tuple[Tokenizer, ...]:
    """Reads the tokenizers that ``save_tokenizers`` wrote."""
    return tuple(
        load_tokenizer(folder / name)
        for number, name in enumerate(TOKENIZER_FILES)
        if number == 0 or (folder / name).is_file()
    )


def save_model(folder: Path, saved: SavedModel, tensors: Mapping[str, Tensor]) -> None:
    """Writes the folder in one rename.

    Args:
        folder: to be written.
        saved: what it holds.
        tensors: the model's, whole.

    Raises:
        MachineError: it cannot be written.
    """
    task, reading = saved.task, saved.task.reading
    content = {
        "model_type": "hasten",
        "architectures": ["Transformer"],
        "task": task.name,
        **asdict(saved.model.config),
        **{key: value for key, value in task.to_json().items() if key in _SHARED_KEYS},
        "hasten": {
            "format_version": FORMAT_VERSION,
            "reading": {
                "form": reading.form,
                "columns": list(reading.columns),
                "label": reading.label,
            },
            "task": {k: v for k, v in task.to_json().items() if k not in _SHARED_KEYS},
            "decoding": {
                "num_beams": saved.decoding.num_beams,
                "length_penalty": saved.decoding.length_penalty,
            },
        },
    }
    with machine_errors("writing the model"), committed_folder(folder) as partial:
        own = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(own, partial / _WEIGHTS, metadata={"format": "pt"})
        names = [_WEIGHTS, *save_tokenizers(partial, task.tokenizers)]
        content["hasten"]["sha256"] = {name: file_hash(partial / name) for name in names}
        (partial / "config.json").write_text(
            json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8"
        )


def load_model(folder: Path, device: torch.device | str = "cpu") -> SavedModel:
    """Reads a model folder.

    Raises:
        DamagedError: a file is missing, altered, or does not fit the others.
    """
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        own = content["hasten"]
        if own["format_version"] != FORMAT_VERSION:
            raise DamagedError(
                f"{folder}: format version {own['format_version']}; this hasten reads "
                f"{FORMAT_VERSION}."
            )
        for name, expected in own["sha256"].items():
            if file_hash(folder / name) != expected:
                raise DamagedError(f"{folder / name}: not what was written (its SHA-256 differs).")
        names = {field.name for field in dataclasses.fields(TransformerConfig)}
        config = TransformerConfig(**{n: v for n, v in content.items() if n in names})
        tensors = load_file(folder / _WEIGHTS)
        kind = task_named(content["task"])
        reading = kind.reading_of(
            own["reading"]["form"], tuple(own["reading"]["columns"]), own["reading"]["label"]
        )
        shared = {key: content[key] for key in _SHARED_KEYS if key in content}
        task = kind.from_json({**shared, **own["task"]}, reading, load_tokenizers(folder))
        decoding = DecodingSettings(**own["decoding"])
        decided = task.model_options()
    except DamagedError:
        raise
    except FileNotFoundError as error:
        raise DamagedError(f"{error.filename or folder}: missing from the model folder.") from None
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise DamagedError(f"{folder}: not a whole model folder: {error}.") from None
    for name in ("num_labels", "vocab_size"):
        if name in decided and decided[name] != getattr(config, name):
            raise DamagedError(
                f"{folder / 'config.json'}: {name} is {getattr(config, name)}, but the labels or "
                f"the tokenizer beside it make it {decided[name]}."
            )
    model = Transformer.from_config(config)
    copy_into(model, tensors, str(folder / _WEIGHTS))
    return SavedModel(model.to(device).eval(), task, decoding)
