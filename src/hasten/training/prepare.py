"""From opened files to what the loop reads: tokenizers, task, examples.

Sources --tokenizer_texts--> tokenizers --from_data--> task --examples--> Examples of each split
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from tokenizers import Tokenizer

from hasten.config.schema import RunConfig, settled
from hasten.core.errors import UsageError
from hasten.data.augment import parse_augmentation
from hasten.data.examples import Examples
from hasten.data.template import Framing
from hasten.data.tokenizer import choose_vocab_size, load_tokenizer, train_tokenizer
from hasten.plan.choices import Choice
from hasten.plan.portable import portable_framing
from hasten.task.contract import Drawing, Task, TaskSettings
from hasten.training.observe import Observer
from hasten.training.sources import Sources

SETTING_KEYS = {
    "loss": "train.loss",
    "focal_gamma": "train.focal_gamma",
    "label_smoothing": "train.label_smoothing",
    "class_weights": "train.class_weights",
    "segments": "data.segments",
    "pooling": "model.pooling",
    "max_length": "tokenizer.max_length",
    "stride": "data.stride",
    "shared_vocabulary": "tokenizer.shared",
}
"""Where in the configuration each of ``TaskSettings`` stands."""


@dataclass(frozen=True)
class PreparedData:
    """Everything that the data decides.

    Attributes:
        sources: files, columns and rows.
        task: what is learned.
        splits: examples of train, validation and, where there is a file for it, test.
        choices: what was chosen of the settings left to the data.
    """

    sources: Sources
    task: Task
    splits: dict[str, Examples]
    choices: tuple[Choice, ...] = ()


def prepare_data(
    config: RunConfig,
    sources: Sources,
    observer: Observer,
    tokenizers: tuple[Tokenizer, ...] | None = None,
    framing: Framing | None = None,
) -> PreparedData:
    """Prepares all splits of a run.

    Args:
        config: of the run.
        sources: its opened files.
        observer: told every guess and warning.
        tokenizers: those of a run that is resumed, or of a pretrained model; None to train or
            load them.
        framing: what a pretrained model wants around texts; None for a model of our own.
    """
    settings = dataclasses.replace(_task_settings(config, sources.task), framing=framing)
    train, rows = sources.corpora["train"], sources.rows["train"]
    choices: list[Choice] = []
    if tokenizers is None:
        texts = sources.task.tokenizer_texts(train, rows, sources.reading, settings)
        tokenizers = tuple(
            _make_tokenizer(config, sources, one, len(texts), choices, observer) for one in texts
        )
    if settings.segments == "auto" and "segments" in sources.task.uses:
        value = "separate" if train.num_texts > 1 else "join"
        choices.append(Choice("data.segments", value, f"text columns: {train.num_texts}"))
    if config.model.portable and sources.task.architecture == "encoder":
        settings = dataclasses.replace(settings, framing=portable_framing(tokenizers[0]))
    task = sources.task.from_data(train, rows, sources.reading, tokenizers, settings)
    splits = {}
    for name, numbers in sources.rows.items():
        corpus = sources.corpora.get(name, train)
        splits[name] = task.examples(corpus, numbers)
        cut = splits[name].num_truncated
        if cut and (name == "train" or corpus is not train):
            observer.warn(
                f"{corpus.name}: {cut:,} texts are longer than {settings.max_length} tokens and "
                "were cut (--tokenizer.max_length)"
            )
    return PreparedData(sources, task, splits, tuple(choices))


def with_drawing(data: PreparedData, config: RunConfig) -> PreparedData:
    """Returns the data with training texts drawn anew each epoch, where that is configured."""
    augmentation = parse_augmentation(config.data.augment)
    if augmentation.is_off:
        return data
    sources = data.sources
    train = data.task.examples(
        sources.corpora["train"], sources.rows["train"], Drawing(config.train.seed, augmentation)
    )
    return dataclasses.replace(data, splits={**data.splits, "train": train})


def _task_settings(config: RunConfig, task: type[Task]) -> TaskSettings:
    """Collects what a person may set of the task, and refuses what has no place in it.

    Raises:
        UsageError: naming the key.
    """
    values, defaults = {}, RunConfig()
    for name, key in SETTING_KEYS.items():
        section, _, field = key.partition(".")
        value = getattr(getattr(config, section), field)
        if name not in task.uses:
            if value not in (getattr(getattr(defaults, section), field), "auto"):
                raise UsageError(f"{key} has no effect on {task.name}; leave it out.")
            continue
        values[name] = value if name == "segments" else settled(value)
    return TaskSettings(**values)


def _make_tokenizer(
    config: RunConfig,
    sources: Sources,
    texts: Iterator[str],
    num_tokenizers: int,
    choices: list[Choice],
    observer: Observer,
) -> Tokenizer:
    settings, train = config.tokenizer, sources.corpora["train"]
    if settings.path is not None:
        tokenizer = load_tokenizer(settings.path)
        observer.note(f"tokenizer: {settings.path}, {tokenizer.get_vocab_size():,} tokens")
        return tokenizer
    size, reason = settings.vocab_size, "as asked for"
    if size == "auto":
        size, reason = choose_vocab_size(
            train.num_characters // num_tokenizers,
            settings.kind,
            generates=sources.task.architecture != "encoder",
        )
        choices.append(Choice("tokenizer.vocab_size", size, reason))
    tokenizer = train_tokenizer(
        texts,
        kind=settings.kind,
        vocab_size=size,
        lowercase=settings.lowercase,
        exact=sources.task.exact_text,
        split_han=sources.task.split_han,
    )
    observer.note(
        f"tokenizer: {settings.kind} trained on the training rows, "
        f"{tokenizer.get_vocab_size():,} tokens ({reason})"
    )
    return tokenizer
