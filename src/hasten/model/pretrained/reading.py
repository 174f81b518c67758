"""Reads a checkpoint folder: what it says is checked against what it holds before memory is taken.

    config.json --family_of--> TransformerConfig --Family.rules--> names
    model.safetensors, or an index and its shards --names, shapes agree--> Transformer

Tensors are mapped from the file and copied into parameters one by one, in float32. Pickle is not
read here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hasten.core.errors import DamagedError, UsageError
from hasten.core.files import read_object
from hasten.model.config import Head, TransformerConfig
from hasten.model.pretrained.family import Family, Rule
from hasten.model.pretrained.labels import label_names, row_order
from hasten.model.pretrained.registry import family_of
from hasten.model.transformer import Transformer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_MOST_POSITIONS = 1 << 24
_KINDS = ("F64", "F32", "F16", "BF16")
# What may differ from the checkpoint without another tensor or another result.
CHANGEABLE = (
    "dropout",
    "attention_dropout",
    "token_dropout",
    "head_dropout",
    "stochastic_depth",
    "initializer_std",
)


@dataclass(frozen=True)
class Loaded:
    """A pretrained model.

    Attributes:
        model: in float32, in training mode.
        family: that it belongs to.
        content: its config.json.
        missing: our parameters that the folder has not; they were drawn anew.
        unexpected: tensors of the folder that have no place in the model.
        other_labels: what the folder's classifier tells apart where it was not kept, since that is
            something else; None where it was kept, or there was none.
    """

    model: Transformer
    family: Family
    content: dict[str, Any]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    other_labels: tuple[str, ...] | None = None


@dataclass
class _Places:
    """Where the parameters of a model are read.

    Attributes:
        read: rules with the file's tensor of each.
        absent: our parameters that the file has not.
        taken: the file's tensors that are read, by all of their names.
        rows: of the file's classifier, one for each label of the model; None where it is not kept.
        other_labels: see ``Loaded``.
    """

    read: list[tuple[Rule, str]] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    taken: set[str] = field(default_factory=set)
    rows: tuple[int, ...] | None = None
    other_labels: tuple[str, ...] | None = None


class Weights:
    """The tensors of a folder, by name; nothing is read before it is asked for.

    Args:
        folder: with model.safetensors, or an index and shards.

    Raises:
        DamagedError: a file is missing, cut short or mislabelled.
        UsageError: there is only pickle.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Any] = {}
        self._places: dict[str, Path] = {}
        for path, names in _weight_files(folder):
            handle = self._files[str(path)] = _opened(path)
            held = set(handle.keys())
            for name in held if names is None else names:
                if name not in held:
                    raise DamagedError(
                        f"{path}: has no tensor '{name}', which the index puts there."
                    )
                self._places[name] = path

    @property
    def names(self) -> set[str]:
        """All names."""
        return set(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns a tensor's shape from the file's header.

        Raises:
            DamagedError: it does not hold floating-point numbers.
        """
        path = self._places[name]
        found = self._files[str(path)].get_slice(name)
        kind = found.get_dtype()
        if kind not in _KINDS:
            raise DamagedError(
                f"{path}: tensor '{name}' is of type {kind}; {', '.join(_KINDS)} are read."
            )
        return tuple(found.get_shape())

    def read(self, name: str) -> Tensor:
        """Returns a tensor, mapped from the file where that can be."""
        path = self._places[name]
        try:
            return self._files[str(path)].get_tensor(name)
        except SafetensorError as error:
            raise DamagedError(f"{path}: tensor '{name}' cannot be read: {error}.") from None


def read_config(folder: Path) -> dict[str, Any]:
    """Returns the object of a folder's config.json.

    Raises:
        UsageError: there is no such folder, or no config.json in it.
        DamagedError: the file is no JSON object.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder.")
    path = folder / "config.json"
    if not path.is_file():
        raise UsageError(f"{folder}: not a model folder: it has no config.json.")
    return read_object(path)


def config_of(
    folder: Path, *, head: Head, num_labels: int | None = None, **changes: Any
) -> TransformerConfig:
    """Returns the architecture of a folder's model with a head, without its weights.

    Args:
        folder: in the format of the Hugging Face Hub.
        head: of the model that is wanted.
        num_labels: classes of a classification head; None for those of config.json.
        **changes: of ``CHANGEABLE`` fields; None for what the folder says.

    Raises:
        UsageError: the family or an option is not honoured.
        DamagedError: config.json is damaged, or contradicts itself.
    """
    content = read_config(folder)
    origin = str(folder / "config.json")
    family = family_of(content, origin)
    options = family.read(content, head, origin)
    if family.ties and any((folder / name).is_file() for name in (WEIGHTS, INDEX)):
        options["tie_embeddings"] = _are_tied(Weights(folder), family.ties)
    if head == "classification":
        labels = content.get("id2label")
        there = len(labels) if isinstance(labels, Mapping) else content.get("num_labels", 2)
        options["num_labels"] = there if num_labels is None else num_labels
    for name, value in changes.items():
        if name not in CHANGEABLE:
            raise UsageError(f"model.{name} is what the pretrained model says; leave it out.")
        if value is not None:
            options[name] = value
    try:
        config = TransformerConfig(**options)
    except UsageError as error:
        raise DamagedError(f"{origin}: {error}") from None
    except TypeError as error:
        raise DamagedError(f"{origin}: a value is of the wrong kind: {error}.") from None
    if config.max_positions > _MOST_POSITIONS:
        raise DamagedError(
            f"{origin}: {config.max_positions:,} positions; at most {_MOST_POSITIONS:,} are taken."
        )
    return config


def load_pretrained(
    folder: Path, *, head: Head, num_labels: int | None = None, **changes: Any
) -> Loaded:
    """Builds a model and loads a folder's weights into it; a new head is drawn.

    Args:
        folder: in the format of the Hugging Face Hub.
        head: of the model that is wanted.
        num_labels: classes of a classification head; None for those of config.json.
        **changes: of ``CHANGEABLE`` fields; None for what the folder says.

    Raises:
        UsageError: the family or an option is not honoured, or there is only pickle.
        DamagedError: a file is missing or damaged, or a shape does not fit config.json.
    """
    config = config_of(folder, head=head, num_labels=num_labels, **changes)
    return load_weights(folder, config)


def load_weights(
    folder: Path, config: TransformerConfig, labels: Sequence[str] | None = None
) -> Loaded:
    """Builds the model of a configuration that ``config_of`` gave, and loads the weights.

    Args:
        folder: in the format of the Hugging Face Hub.
        config: of the model.
        labels: of a classification head, in the order of its scores: the folder's classifier is
            kept only where it is of the same. None for those of the folder, in its order.

    Raises:
        As ``load_pretrained``.
    """
    content = read_config(folder)
    family = family_of(content, str(folder / "config.json"))
    weights = Weights(folder)
    places = _place(family, config, weights, content, labels)
    with _NoDraws():
        model = Transformer.from_config(config)
    targets = {name: tensor.detach() for name, tensor in model.state_dict(keep_vars=True).items()}
    with torch.no_grad():
        for one, other in places.read:
            _check_copies(weights, family.prefix, one, other)
            tensor = weights.read(other)
            if one.is_of_labels and places.rows is not None:
                tensor = tensor[list(places.rows)]
            rows = [len(targets[name]) for name in one.own]
            for name, own in zip(one.own, one.to_own(tensor, rows), strict=True):
                targets[name].copy_(own)
        for name in places.absent:
            if targets[name].ndim > 1:
                nn.init.normal_(targets[name], std=config.initializer_std)
    unexpected = sorted(
        name
        for name in weights.names - places.taken
        if not any(fnmatch(_bare(name, family), pattern) for pattern in family.ignored)
    )
    return Loaded(
        model,
        family,
        content,
        missing=tuple(places.absent),
        unexpected=tuple(unexpected),
        other_labels=places.other_labels,
    )


def _place(
    family: Family,
    config: TransformerConfig,
    weights: Weights,
    content: Mapping[str, Any],
    labels: Sequence[str] | None,
) -> _Places:
    """Finds the file's tensor of every rule and compares shapes, before any memory is taken."""
    names = weights.names
    prefix = family.prefix if any(name.startswith(family.prefix) for name in names) else ""
    found: list[tuple[Rule, str | None]] = []
    for one in family.rules(config):  # lazily: a config.json may claim any number of blocks
        candidates = [one.other, *one.aliases]
        if not one.is_outside:
            candidates = [f"{prefix}{name}" for name in candidates] + candidates
        other = next((name for name in candidates if name in names), None)
        if other is None and not one.is_optional:
            raise DamagedError(f"{weights.folder}: tensor '{candidates[0]}' is missing.")
        found.append((one, other))
    shapes = _expected_shapes(config)
    places = _Places()
    num_classes: int | None = None
    for one, other in found:
        if one.is_optional and not shapes.keys() >= {*one.own}:
            continue  # of a head that is put together otherwise
        if other is None:
            places.absent += one.own
            continue
        places.taken |= {
            f"{lead}{name}" for name in (one.other, *one.aliases) for lead in ("", prefix)
        }
        expected, given = _shape_there(one, shapes), weights.shape(other)
        if one.is_of_labels:
            if num_classes is None:
                num_classes = given[0] if given else 0
                _settle_rows(places, content, num_classes, expected[0], labels)
            expected = num_classes, *expected[1:]
        if expected != given:
            raise DamagedError(
                f"{weights.folder}: tensor '{other}' has shape {given}, but config.json makes "
                f"it {expected}."
            )
        if one.is_of_labels and places.rows is None:
            places.absent += one.own
        else:
            places.read.append((one, other))
    return places


def _settle_rows(
    places: _Places,
    content: Mapping[str, Any],
    num_rows: int,
    num_labels: int,
    labels: Sequence[str] | None,
) -> None:
    """Says which rows of the file's classifier are wanted."""
    names = label_names(content, num_rows)
    if labels is not None:
        places.rows = row_order(names, labels)
    elif num_rows == num_labels:
        places.rows = tuple(range(num_rows))
    if places.rows is None:
        places.other_labels = names


def _are_tied(weights: Weights, ties: tuple[str, ...]) -> bool:
    """Whether the file has no matrix of its own for scoring tokens."""
    scorer, *embeddings = ties
    embedding = next((name for name in embeddings if name in weights.names), None)
    if scorer not in weights.names or embedding is None:
        return True
    return torch.equal(weights.read(scorer), weights.read(embedding))


def _check_copies(weights: Weights, prefix: str, one: Rule, other: str) -> None:
    """Refuses a file in which what should be one tensor is several."""
    for name in sorted({f"{lead}{alias}" for alias in one.aliases for lead in ("", prefix)}):
        is_copy = name != other and name in weights.names
        if is_copy and not torch.equal(weights.read(name), weights.read(other)):
            raise DamagedError(
                f"{weights.folder}: tensors '{other}' and '{name}' differ, but by config.json "
                "they are one."
            )


def _expected_shapes(config: TransformerConfig) -> dict[str, torch.Size]:
    try:
        with torch.device("meta"), _NoDraws():
            model = Transformer.from_config(config)
    except RuntimeError as error:  # more bytes than an integer can say
        raise DamagedError(f"config.json: sizes beyond any machine: {error}.") from None
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _shape_there(one: Rule, shapes: Mapping[str, torch.Size]) -> tuple[int, ...]:
    own = [shapes[name] for name in one.own]
    shape = (sum(size[0] for size in own), *own[0][1:])
    if one.is_row:
        return 1, *shape
    return shape[::-1] if one.transposed and len(shape) == 2 else shape


def _bare(name: str, family: Family) -> str:
    return name.removeprefix(family.prefix) if family.prefix else name


def _weight_files(folder: Path) -> Iterator[tuple[Path, Iterable[str] | None]]:
    """Yields each file with the names that are its; None for all that it holds."""
    if (folder / WEIGHTS).is_file():
        yield folder / WEIGHTS, None
        return
    if not (folder / INDEX).is_file():
        if any((folder / name).is_file() for name in PICKLED):
            raise UsageError(
                f"{folder}: its weights are pickle, which can run code; convert them once: "
                f"hasten convert {folder}"
            )
        raise DamagedError(f"{folder}: there is no {WEIGHTS}.")
    content = read_object(folder / INDEX).get("weight_map")
    if not isinstance(content, dict) or not all(isinstance(v, str) for v in content.values()):
        raise DamagedError(f"{folder / INDEX}: has no weight_map of names and files.")
    shards: dict[str, list[str]] = {}
    for name, file in content.items():
        shards.setdefault(file, []).append(name)
    for file, names in shards.items():
        path = folder / file
        # A file of the hub's cache is a link out of the folder; its name must stay inside.
        if Path(file).name != file or file in ("", ".", ".."):
            raise DamagedError(f"{folder / INDEX}: names a file outside of the folder: {file!r}.")
        if not path.is_file():
            raise DamagedError(f"{path}: missing, but the index names it.")
        yield path, names


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise DamagedError(f"{path}: not a whole safetensors file: {error}.") from None


class _NoDraws(TorchFunctionMode):
    """Leaves tensors as they are where they would be drawn at random."""

    # The functions of nn.init come here first, and what they call inside does no more.
    _DRAWS = frozenset({"normal_", "uniform_", "trunc_normal_", "kaiming_uniform_"})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in self._DRAWS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)
