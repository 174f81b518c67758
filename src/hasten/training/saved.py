"""The model folder: weights, configuration and tokenizer in the layout of the Hugging Face Hub.

    model/  hasten.json  config.json  model.safetensors  tokenizer.json  [generation_config.json]

hasten.json is ours: the architecture, how text becomes tokens, the task, and the SHA-256 of the
other files. These are as transformers has them, tensors under its names, where one of its classes
has the model's options (``family``). Otherwise tensors have our names, and config.json says so. A
model with a vocabulary of its own for targets has target_tokenizer.json too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from hasten.core.errors import DamagedError, UsageError
from hasten.core.files import committed_folder, file_hash, machine_errors
from hasten.data.template import Framing
from hasten.data.tokenizer import load_tokenizer
from hasten.model.config import TransformerConfig
from hasten.model.pretrained.family import Family
from hasten.model.pretrained.reading import WEIGHTS, load_weights
from hasten.model.pretrained.writing import family_for, save_pretrained
from hasten.model.search import DecodingSettings
from hasten.model.transformer import Transformer
from hasten.task.contract import Task
from hasten.task.registry import task_named
from hasten.training.architecture import architecture_from_json
from hasten.training.checkpoint import copy_into
from hasten.training.saved_tokenizer import (
    TOKENIZER_FILES,
    token_numbers,
    write_tokenizers,
    writing_numbers,
)

FORMAT_VERSION = 3
OWN_FILE, CONFIG, GENERATION = "hasten.json", "config.json", "generation_config.json"
_END = "eos_token_id"
# What transformers looks for in config.json.
_LABEL_KEYS = ("id2label", "label2id")


@dataclass(frozen=True)
class Inherited:
    """What a fine-tuned model keeps of the folder that it began with.

    Attributes:
        config: keys of config.json that say nothing of the architecture, such as token numbers.
        generation: of generation_config.json, or config.json; None where there was no such model.
        framing: what it wants around texts.
        names: its special tokens, by transformers' names; None where there was no such model.
        family: that it is of; None where there was no such model.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    generation: Mapping[str, Any] | None = None
    framing: Framing | None = None
    names: Mapping[str, str] | None = None
    family: str | None = None


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
    """Reads tokenizers; what they put around texts for other programs, here a task does."""
    tokenizers = [
        load_tokenizer(folder / name)
        for number, name in enumerate(TOKENIZER_FILES)
        if number == 0 or (folder / name).is_file()
    ]
    for tokenizer in tokenizers:
        tokenizer.post_processor = None
    return tuple(tokenizers)


def save_model(
    folder: Path,
    saved: SavedModel,
    tensors: Mapping[str, Tensor],
    inherited: Inherited | None = None,
) -> None:
    """Writes the folder in one rename.

    Args:
        folder: to be written.
        saved: what it holds.
        tensors: the model's, whole.
        inherited: of the pretrained model; None where there was none.

    Raises:
        MachineError: it cannot be written.
    """
    task, config = saved.task, saved.model.config
    inherited = inherited or Inherited()
    values = task.to_json()
    labels = {key: values[key] for key in _LABEL_KEYS if key in values}
    family = writable_as(config)
    content: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "family": None if family is None else family.name,
        "architecture": asdict(config),
        "task": task.name,
        "reading": {
            "form": task.reading.form,
            "columns": list(task.reading.columns),
            "label": task.reading.label,
        },
        "task_options": values,
        "decoding": {
            "num_beams": saved.decoding.num_beams,
            "length_penalty": saved.decoding.length_penalty,
        },
    }
    with machine_errors("writing the model"), committed_folder(folder) as partial:
        if family is None:
            own = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            save_file(own, partial / WEIGHTS, metadata={"format": "pt"})
            kind = {"model_type": "hasten", "architectures": ["Transformer"]}
            _write_json(partial / CONFIG, {**kind, **asdict(config), **labels})
        else:
            # What a family says of token numbers may decide where its positions begin.
            said = {k for k, v in family.config(config).items() if v is not None}
            numbers = token_numbers(task) if inherited.names is None else inherited.config
            numbers = _with_own(numbers, writing_numbers(task))
            kept = {k: v for k, v in numbers.items() if k not in said}
            save_pretrained(partial, config, tensors, {**kept, **labels})
        names = [CONFIG, WEIGHTS, *write_tokenizers(partial, task, config, inherited.names)]
        if task.generates:
            said = inherited.generation
            generation = token_numbers(task) if said is None else said
            _write_json(partial / GENERATION, _with_own(generation, writing_numbers(task)))
        content["sha256"] = {name: file_hash(partial / name) for name in names}
        _write_json(partial / OWN_FILE, content)


def _with_own(numbers: Mapping[str, Any], own: Mapping[str, int]) -> dict[str, Any]:
    """Returns numbers of tokens with a run's own; of several ends of a text its own comes first."""
    found: dict[str, Any] = {**numbers, **own}
    ends, end = numbers.get(_END), own.get(_END)
    if isinstance(ends, list) and end is not None:
        found[_END] = [end, *(other for other in ends if other != end)]
    return found


def writable_as(config: TransformerConfig) -> Family | None:
    """Returns the family that transformers can read a model as; None where there is none."""
    try:
        return family_for(config)
    except UsageError:
        return None


def load_model(folder: Path, device: torch.device | str = "cpu") -> SavedModel:
    """Reads a model folder.

    Raises:
        DamagedError: a file is missing, altered, or does not fit the others.
    """
    try:
        content = json.loads((folder / OWN_FILE).read_text(encoding="utf-8"))
        if content["format_version"] != FORMAT_VERSION:
            raise DamagedError(
                f"{folder}: format version {content['format_version']}; this hasten reads "
                f"{FORMAT_VERSION}."
            )
        for name, expected in content["sha256"].items():
            if file_hash(folder / name) != expected:
                raise DamagedError(f"{folder / name}: not what was written (its SHA-256 differs).")
        config = architecture_from_json(content["architecture"])
        kind, reading = task_named(content["task"]), content["reading"]
        reading = kind.reading_of(reading["form"], tuple(reading["columns"]), reading["label"])
        task = kind.from_json(content["task_options"], reading, load_tokenizers(folder))
        decoding = DecodingSettings(**content["decoding"])
        _check_sizes(folder, config, task)
        model = _read_weights(folder, config, content["family"])
    except DamagedError:
        raise
    except FileNotFoundError as error:
        raise DamagedError(f"{error.filename or folder}: missing from the model folder.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise DamagedError(f"{folder}: not a whole model folder: {error}.") from None
    return SavedModel(model.to(device).eval(), task, decoding)


def _read_weights(folder: Path, config: TransformerConfig, family: str | None) -> Transformer:
    if family is None:
        model = Transformer.from_config(config)
        copy_into(model, load_file(folder / WEIGHTS), str(folder / WEIGHTS))
        return model
    loaded = load_weights(folder, config)
    if loaded.missing:
        raise DamagedError(f"{folder / WEIGHTS}: has no tensor for {loaded.missing[0]}.")
    return loaded.model


def _check_sizes(folder: Path, config: TransformerConfig, task: Task) -> None:
    decided = task.model_options()
    for name in ("num_labels", "vocab_size"):
        found, wanted = getattr(config, name), decided.get(name)
        # A pretrained embedding may have more rows than there are tokens.
        if wanted is not None and (found < wanted or (name == "num_labels" and found > wanted)):
            raise DamagedError(
                f"{folder / OWN_FILE}: {name} is {found}, but the labels or the tokenizer beside "
                f"it make it {wanted}."
            )


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, ensure_ascii=False, indent=2)
    path.write_text(text + "\n", encoding="utf-8")
