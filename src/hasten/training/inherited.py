"""What a fine-tuned model keeps of the folder that it began with, besides weights.

pretrained folder --write_inherited--> inherited.json of the run --read_inherited--> model/
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hasten.core.files import read_object
from hasten.data.template import Framing
from hasten.model.pretrained.registry import family_of
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
    "tokenizer_class",
    "task_specific_params",
)
# And what old ones say of generation, which transformers reads there only where there is no
# generation_config.json; we always write one.
_OF_GENERATION = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "decoder_start_token_id",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "bad_words_ids",
    "max_length",
    "min_length",
    "do_sample",
    "early_stopping",
    "num_beams",
    "num_beam_groups",
    "diversity_penalty",
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
    "repetition_penalty",
    "length_penalty",
    "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size",
    "num_return_sequences",
    "suppress_tokens",
    "begin_suppress_tokens",
    "remove_invalid_values",
    "exponential_decay_length_penalty",
    "use_cache",
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
        UsageError: it is of no family that is known here.
    """
    config = read_object(pretrained / CONFIG)
    generation = optional_object(pretrained / GENERATION)
    if generation is None:
        generation = _chosen(config, _OF_GENERATION)
    # Else older versions of transformers would look at config.json again, and there alone.
    generation.pop("_from_model_config", None)
    content = {
        "family": family_of(config, str(pretrained / CONFIG)).name,
        "config": _chosen(config, _KEPT),
        "generation": generation,
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
    framing, family = Framing.from_json(content["framing"]), content.get("family")
    return Inherited(content["config"], content["generation"], framing, content["names"], family)


def _chosen(content: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    return {key: content[key] for key in keys if content.get(key) is not None}


def optional_object(path: Path) -> dict[str, Any] | None:
    """Returns the JSON object in a file; None where there is no file, ``DamagedError`` else."""
    return read_object(path) if path.is_file() else None
