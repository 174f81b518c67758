"""The model folder: weights, configuration and tokenizer in the layout of the Hugging Face Hub.

    model/  config.json  model.safetensors  tokenizer.json

config.json holds the architecture, the labels (``id2label``), how text becomes tokens, and the
SHA-256 of the other files.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from hasten.core.errors import DamagedError, HastenError
from hasten.core.files import committed_folder, file_hash, machine_errors
from hasten.data.tokenizer import load_tokenizer
from hasten.data.tokens import EncodingFormat
from hasten.model.config import TransformerConfig
from hasten.model.transformer import Transformer
from hasten.task.text_classification import TextClassification
from hasten.training.checkpoint import copy_into

FORMAT_VERSION = 1
_HASHED = ("model.safetensors", "tokenizer.json")


@dataclass(frozen=True)
class SavedModel:
    """A trained model and what it takes to use it.

    Attributes:
        model: in evaluation mode.
        task: with the labels.
        tokenizer: of the run.
        form: how text cells become one sequence.
        text_columns: names of the columns it was trained on.
        label_column: name of the label column.
    """

    model: Transformer
    task: TextClassification
    tokenizer: Tokenizer
    form: EncodingFormat
    text_columns: tuple[str, ...]
    label_column: str


def save_model(folder: Path, saved: SavedModel) -> None:
    """Writes the folder in one rename.

    Raises:
        MachineError: it cannot be written.
    """
    labels = saved.task.labels
    content = {
        "model_type": "hasten",
        "architectures": ["Transformer"],
        "task": saved.task.name,
        **asdict(saved.model.config),
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
        "hasten": {
            "format_version": FORMAT_VERSION,
            "encoding": asdict(saved.form),
            "text_columns": list(saved.text_columns),
            "label_column": saved.label_column,
        },
    }
    with machine_errors("writing the model"), committed_folder(folder) as partial:
        tensors = {n: t.detach().cpu().contiguous() for n, t in saved.model.state_dict().items()}
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        saved.tokenizer.save(str(partial / "tokenizer.json"))
        content["hasten"]["sha256"] = {name: file_hash(partial / name) for name in _HASHED}
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
        for name in _HASHED:
            if file_hash(folder / name) != own["sha256"][name]:
                raise DamagedError(f"{folder / name}: not what was written (its SHA-256 differs).")
        names = {field.name for field in dataclasses.fields(TransformerConfig)}
        config = TransformerConfig(**{n: v for n, v in content.items() if n in names})
        labels = tuple(content["id2label"][str(i)] for i in range(len(content["id2label"])))
        if len(labels) != config.num_labels:
            raise DamagedError(
                f"{folder / 'config.json'}: names {len(labels)} labels, the model has "
                f"{config.num_labels}."
            )
        form = EncodingFormat(**own["encoding"])
        tensors = load_file(folder / "model.safetensors")
    except DamagedError:
        raise
    except FileNotFoundError as error:
        raise DamagedError(f"{error.filename or folder}: missing from the model folder.") from None
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise DamagedError(f"{folder}: not a whole model folder: {error}.") from None
    try:
        tokenizer = load_tokenizer(folder)
    except HastenError as error:
        raise DamagedError(str(error)) from None
    model = Transformer.from_config(config)
    copy_into(model, tensors, str(folder / "model.safetensors"))
    return SavedModel(
        model=model.to(device).eval(),
        task=TextClassification(labels),
        tokenizer=tokenizer,
        form=form,
        text_columns=tuple(own["text_columns"]),
        label_column=own["label_column"],
    )
