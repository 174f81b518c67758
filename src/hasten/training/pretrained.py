"""The pretrained model that a run begins with: where it is, what it decides, its weights.

    PATH or owner/name --find_folder--> folder
    folder, task --open_pretrained--> Pretrained: architecture, tokenizers    no weights are read
    Pretrained, TransformerConfig --begin_with--> Transformer    new head drawn, the rest read

Only a new run needs it: what it begins with is written into the run folder.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from torch import nn

from hasten.config.schema import RunConfig
from hasten.core.errors import DamagedError, MachineError, UsageError
from hasten.core.files import file_hash
from hasten.data.pretrained_tokenizer import read_tokenizers
from hasten.data.template import Framing
from hasten.model.config import Architecture, Pooling, TransformerConfig
from hasten.model.heads import ClassificationHead
from hasten.model.pretrained.labels import is_generic
from hasten.model.pretrained.reading import (
    INDEX,
    PICKLED,
    WEIGHTS,
    Loaded,
    config_of,
    load_weights,
    read_config,
)
from hasten.model.pretrained.registry import family_of
from hasten.model.transformer import Transformer
from hasten.model.vocabulary import extend_vocabulary
from hasten.task.contract import Task
from hasten.task.registry import TASKS
from hasten.training.framing import Described, read_framing
from hasten.training.inherited import optional_object
from hasten.training.observe import Observer
from hasten.training.saved import GENERATION
from hasten.training.saved_tokenizer import TOKENIZER_CONFIG

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
# Weights and whatever any tokenizer is made of; no pickle, no code.
_WANTED = ("*.json", "1_Pooling/config.json", "*.safetensors", "*.txt", "*.model", "*.spm")
_SHOWN = 4
_POOLING = Path("1_Pooling", "config.json")


@dataclass(frozen=True)
class Pretrained:
    """A folder with a pretrained model, opened for a task.

    Attributes:
        name: as a person called it.
        folder: with its files.
        architecture: with the head that the task needs; its number of labels may be another.
        vocab_size: rows of its embedding, without those that are to be added.
        tokenizers: one, or one for the source and one for the target.
        framing: what it wants around texts.
        names: its special tokens, by transformers' names.
        added: ids of the tokens that they got.
        differences: ``missing``, our parameters that the folder has not, and ``unexpected``, its
            tensors that have no place here; ``begin_with`` fills it.
    """

    name: str
    folder: Path
    architecture: TransformerConfig
    vocab_size: int
    tokenizers: tuple[Tokenizer, ...]
    framing: Framing
    names: Mapping[str, str]
    added: tuple[int, ...] = ()
    differences: dict[str, list[str]] = field(default_factory=dict)

    def with_head(self, options: dict[str, Any]) -> TransformerConfig:
        """Returns the architecture with as many labels as a task's ``model_options`` say.

        Raises:
            UsageError: the task tells more segments apart than the model can.
        """
        wanted, most = options.get("num_token_types", 0), self.architecture.num_token_types
        if wanted > max(most, 1):
            raise UsageError(f"{self.name} tells {most} segments of a text apart, not {wanted}.")
        labels = options.get("num_labels", self.architecture.num_labels)
        return dataclasses.replace(self.architecture, num_labels=labels)

    def describe(self) -> dict[str, Any]:
        """Returns what a run keeps of where it began, as JSON values.

        Its name, the SHA-256 of each file that may be read of it, by its path in the folder, and,
        once ``begin_with`` has read it, the names of all tensors that were missing or unexpected.
        """
        found = {path for pattern in _WANTED for path in self.folder.glob(pattern)}
        hashes = {
            path.relative_to(self.folder).as_posix(): file_hash(path) for path in sorted(found)
        }
        return {"name": self.name, "sha256": hashes, **self.differences}


def open_pretrained(config: RunConfig, task: type[Task], observer: Observer) -> Pretrained:
    """Opens the pretrained model of a run.

    Raises:
        UsageError: it is not there, or cannot learn the task.
        DamagedError: a file of it is missing or damaged, or does not fit the others.
        MachineError: it cannot be fetched.
    """
    name = config.model.pretrained
    assert name is not None
    folder = find_folder(name, observer)
    content = read_config(folder)
    family = family_of(content, str(folder / "config.json"))
    _check_task(name, family.architecture, task)
    architecture = config_of(folder, head=task.head)
    # Who sets it gets the head of the model's class, which transformers can load again.
    is_open = task.head == "classification" and "pooling" not in config.model.model_fields_set
    pooling = _pooling(folder) if is_open else None
    if pooling is not None:
        architecture = dataclasses.replace(
            architecture, pooling=pooling, head_activation="none", head_norm=False
        )
    vocabulary = read_tokenizers(folder)
    tokenizers = vocabulary.tokenizers
    _check_vocabulary(name, architecture, tokenizers)
    languages = (config.tokenizer.source_language, config.tokenizer.target_language)
    described = Described(
        name,
        config=content,
        generation=optional_object(folder / GENERATION),
        tokenizer=optional_object(folder / TOKENIZER_CONFIG) or {},
        architecture=architecture.architecture,
        vocab_size=architecture.vocab_size,
        has_types=architecture.num_token_types > 1,
    )
    framing = read_framing(described, vocabulary, languages)
    added = _add_tokens(tokenizers, config.tokenizer.add_tokens)
    vocab_size = architecture.vocab_size
    size = max([vocab_size, *(number + 1 for number in added)])
    architecture = dataclasses.replace(architecture, vocab_size=size)
    observer.note(
        f"pretrained: {name}, {architecture.architecture.replace('_', '-')} of "
        f"{architecture.num_layers} layers of {architecture.hidden_size}, "
        f"{architecture.vocab_size:,} tokens" + f", {len(added)} of them new" * bool(added)
    )
    if architecture.unused:
        said = ", ".join(f"{key} {value:g}" for key, value in architecture.unused)
        observer.note(f"of {name}, not used in training here but written back: {said}")
    return Pretrained(
        name,
        folder,
        architecture,
        vocab_size=vocab_size,
        tokenizers=tokenizers,
        framing=framing,
        names=vocabulary.names,
        added=added,
    )


def find_folder(name: str, observer: Observer) -> Path:
    """Returns the folder of a pretrained model; what is no folder here is fetched from the hub.

    Raises:
        UsageError: there is neither, its weights are pickle, or what fetches is not installed.
        MachineError: it cannot be fetched.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder.absolute()
    if folder.exists() or not HUB_ID.fullmatch(name):
        raise UsageError(
            f"model.pretrained {name}: no such folder; give the folder of a model, or the id of "
            "one on the Hugging Face hub (owner/name)."
        )
    try:
        import huggingface_hub
    except ImportError:
        raise UsageError(
            f"model.pretrained {name}: no such folder; to fetch it from the Hugging Face hub: "
            "pip install 'hasten[hub]'"
        ) from None
    observer.note(f"fetching {name} from the Hugging Face hub")
    try:
        folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=[*_WANTED]))
        # What lies in its cache needs no network, so that the list is asked for only here.
        is_whole = any((folder / file).is_file() for file in (WEIGHTS, INDEX))
        files = () if is_whole else huggingface_hub.list_repo_files(name)
    except Exception as error:  # its own types, those of its HTTP library, and OSError
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise MachineError(
            f"model.pretrained {name}: no such folder, and it cannot be fetched from the Hugging "
            f"Face hub: {said}"
        ) from None
    if any(file in PICKLED for file in files):
        own = name.rpartition("/")[2]
        raise UsageError(
            f"model.pretrained {name}: its weights are pickle, which can run code; fetch and "
            f"convert them once, then give --model {own}:\n"
            f"hf download {name} --local-dir {own} && hasten convert {own}"
        )
    return folder


def begin_with(
    pretrained: Pretrained,
    wanted: TransformerConfig,
    labels: Sequence[str],
    observer: Observer,
) -> Transformer:
    """Reads the weights; draws those that the folder has not.

    Args:
        pretrained: model.
        wanted: architecture of the run.
        labels: of the run, in the order of their scores; empty where it has none.
        observer: told what was missing and what was left out.

    Raises:
        DamagedError, UsageError: see ``load_weights``.
    """
    # New tokens come after the others, whose rows are read.
    size = pretrained.vocab_size
    there = dataclasses.replace(wanted, vocab_size=size)
    loaded = load_weights(pretrained.folder, there, labels or None)
    missing = [*loaded.missing]
    head = loaded.model.head
    if isinstance(head, ClassificationHead) and head.scorer is not None:  # no family has it
        nn.init.normal_(head.scorer.weight, std=wanted.initializer_std)
        missing += ["head.scorer.weight", "head.scorer.bias"]
    if missing:
        reason = _why_new(loaded, labels)
        observer.note(f"new, drawn at random: {_listed(missing)}{reason}")
    if loaded.unexpected:
        observer.note(f"in {pretrained.name}, of no use here: {_listed(loaded.unexpected)}")
    pretrained.differences.update(missing=missing, unexpected=[*loaded.unexpected])
    if pretrained.added:
        extend_vocabulary(loaded.model, pretrained.added)
    return loaded.model


def refuse_fine_tuning(config: RunConfig) -> None:
    """Refuses settings that are of a pretrained model where there is none.

    Raises:
        UsageError: naming the key.
    """
    defaults = RunConfig()
    for section, name in (
        *(("finetune", name) for name in type(config.finetune).model_fields),
        ("tokenizer", "add_tokens"),
        ("tokenizer", "source_language"),
        ("tokenizer", "target_language"),
    ):
        if getattr(getattr(config, section), name) != getattr(getattr(defaults, section), name):
            raise UsageError(f"{section}.{name} is of a pretrained model: name one with --model.")
    if config.tokenizer.kind == "pretrained":
        raise UsageError("tokenizer.kind pretrained is that of a model: name one with --model.")


def _check_task(name: str, own: Architecture, task: type[Task]) -> None:
    """Refuses an architecture that cannot learn the task, and names the tasks that it can."""

    def fits(other: type[Task]) -> bool:
        return own == other.architecture or own in other.other_architectures

    if not fits(task):
        article = "a" if own == "decoder" else "an"
        fitting = " or ".join(other.name for other in TASKS.values() if fits(other))
        raise UsageError(
            f"{name} is {article} {own.replace('_', '-')}, which cannot learn {task.name}; it can "
            f"learn {fitting} (--task)."
        )


def _pooling(folder: Path) -> Pooling | None:
    """Returns how a model of sentence-transformers makes one vector of a text; None of others."""
    content = optional_object(folder / _POOLING) or {}
    if content.get("pooling_mode_mean_tokens"):
        return "mean"
    return "last" if content.get("pooling_mode_lasttoken") else None


def _check_vocabulary(
    name: str, config: TransformerConfig, tokenizers: Sequence[Tokenizer]
) -> None:
    """Refuses a tokenizer with more tokens than the embedding has rows."""
    sizes = [config.vocab_size] * len(tokenizers)
    sizes[0] = config.source_vocab_size or config.vocab_size
    for tokenizer, size in zip(tokenizers, sizes, strict=True):
        needed = max(tokenizer.get_vocab().values(), default=-1) + 1  # ids may have gaps
        if not needed:
            raise DamagedError(f"{name}: the tokenizer's vocabulary is empty.")
        if needed > size:
            raise DamagedError(
                f"{name}: the tokenizer's vocabulary of {needed:,} tokens exceeds the {size:,} "
                "rows of the embedding."
            )


def _add_tokens(tokenizers: Sequence[Tokenizer], words: Sequence[str]) -> tuple[int, ...]:
    """Makes words tokens of their own; returns the ids of those that were none before."""
    found = set[tuple[int, ...]]()
    for tokenizer in tokenizers:
        new = [word for word in dict.fromkeys(words) if tokenizer.token_to_id(word) is None]
        tokenizer.add_tokens(new)
        ids = (tokenizer.token_to_id(word) for word in new)
        found.add(tuple(number for number in ids if number is not None))
    if len(found) > 1:
        raise UsageError("tokenizer.add_tokens needs one vocabulary for source and target.")
    return found.pop()


def _why_new(loaded: Loaded, labels: Sequence[str]) -> str:
    """Says why a classifier that is there was not kept."""
    names = loaded.other_labels
    if names is None:
        return ""
    others = "labels without a name" if is_generic(names) else _shortened(names)
    ours = f", not for {_shortened(labels)}" * bool(labels)
    return f" (the classifier there is for {others}{ours})"


def _listed(names: Sequence[str]) -> str:
    """Returns the first names of tensors, and where the others are."""
    return _shortened(names) + " (all are in data.json of the run)" * (len(names) > _SHOWN)


def _shortened(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + f" and {len(names) - _SHOWN} more" * (len(names) > _SHOWN)
