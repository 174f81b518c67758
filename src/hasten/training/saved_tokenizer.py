"""Tokenizers in a model folder, so that transformers encodes a text as we do.

task --write_tokenizers--> tokenizer.json  tokenizer_config.json  [target_tokenizer.json]
     --token_numbers-----> what config.json and generation_config.json say of special tokens
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from hasten.data.template import with_template
from hasten.data.tokenizer import CLASS, MASK, PAD, SEPARATOR, UNKNOWN
from hasten.model.config import TransformerConfig
from hasten.task.contract import Task

TOKENIZER_FILES = ("tokenizer.json", "target_tokenizer.json")
TOKENIZER_CONFIG = "tokenizer_config.json"
# What transformers calls our own special tokens; a text that is written is between these two.
_OWN_NAMES = {
    "pad_token": PAD,
    "unk_token": UNKNOWN,
    "cls_token": CLASS,
    "sep_token": SEPARATOR,
    "mask_token": MASK,
}
_OWN_NAMES_OF_WRITERS = {"bos_token": CLASS, "eos_token": SEPARATOR}


def write_tokenizers(
    folder: Path, task: Task, config: TransformerConfig, names: Mapping[str, str] | None
) -> list[str]:
    """Writes a task's tokenizers for transformers, and returns the names of the files.

    Args:
        folder: of the model.
        task: with its tokenizers.
        config: of the model.
        names: special tokens of a pretrained model, by transformers' names; None for our own.
    """
    first, *others = task.tokenizers
    with_template(first, task.framing.read).save(str(folder / TOKENIZER_FILES[0]))
    files = [TOKENIZER_FILES[0]]
    for name, tokenizer in zip(TOKENIZER_FILES[1:], others, strict=False):
        tokenizer.save(str(folder / name))
        files.append(name)
    inputs = ["input_ids", "attention_mask"]
    if config.num_token_types > 1:
        inputs.insert(1, "token_type_ids")
    content: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_positions,
        "model_input_names": inputs,
        "clean_up_tokenization_spaces": False,
        **(_own_names(task) if names is None else names),
    }
    text = json.dumps(content, ensure_ascii=False, indent=2)
    (folder / TOKENIZER_CONFIG).write_text(text + "\n", encoding="utf-8")
    return [*files, TOKENIZER_CONFIG]


def token_numbers(task: Task) -> dict[str, int]:
    """Returns the numbers of our own special tokens, by the keys of config.json."""
    tokenizer = task.tokenizers[-1]
    numbers = {
        f"{name}_id": tokenizer.token_to_id(token) for name, token in _own_names(task).items()
    }
    return {name: number for name, number in numbers.items() if number is not None}


def writing_numbers(task: Task) -> dict[str, int]:
    """Returns what generation needs to know: what a text that is written begins and ends with."""
    if not task.generates or not task.framing.written.last:
        return {}
    written = task.framing.written
    found = {"eos_token_id": written.last[0]}
    if task.architecture == "encoder_decoder":
        found["decoder_start_token_id"] = written.first[0]
        if len(written.first) > 1:  # the code of a language
            found["forced_bos_token_id"] = written.first[1]
    return found


def _own_names(task: Task) -> dict[str, str]:
    names = {**_OWN_NAMES, **(_OWN_NAMES_OF_WRITERS if task.generates else {})}
    tokenizer: Tokenizer = task.tokenizers[0]
    return {n: token for n, token in names.items() if tokenizer.token_to_id(token) is not None}
