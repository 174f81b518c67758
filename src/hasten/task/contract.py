"""What a task provides to everything else: one file implements it, one line registers it.

    file --recognise, choose_reading--> Reading --> Corpus      which columns, and how they are read
    Corpus --tokenizer_texts--> tokenizers
    Corpus, tokenizers --from_data--> task --examples--> Examples --> PackedBatch
    outputs, batch --loss_sum--> scalar, divided by the step's summed weights
    outputs, batch --Meter.update--> running counts --compute--> {"accuracy": ...}
    model, rows --predict--> one JSON-like prediction a row

The loop, the run folder and the command line call these and hold no branch on a task's name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from hasten.core.batch import PackedBatch
from hasten.core.errors import UsageError
from hasten.core.ranks import ALONE, Ranks
from hasten.data.augment import Augmentation
from hasten.data.columns import text_of, texts_of
from hasten.data.corpus import Corpus, Reading
from hasten.data.examples import Examples
from hasten.data.rows import Cell, Row, RowFile
from hasten.data.template import Framing
from hasten.model.config import Architecture, Head
from hasten.model.search import DecodingSettings
from hasten.model.transformer import Transformer

Say = Callable[[str], None]


@dataclass(frozen=True)
class WantedColumns:
    """The columns that a person named, by name or number; None where they are to be guessed."""

    text: tuple[str, ...] | None = None
    label: str | None = None
    source: str | None = None
    target: str | None = None


@dataclass(frozen=True)
class TaskSettings:
    """What a person may set of a task; each is named after its configuration key.

    A task lists in ``Task.uses`` those that it honours; setting another is refused. ``framing`` is
    no setting: what a pretrained model wants around texts; None for a model of our own.
    """

    loss: Literal["cross_entropy", "focal"] = "cross_entropy"
    focal_gamma: float = 2.0
    label_smoothing: float = 0.0
    class_weights: Literal["none", "balanced"] = "none"
    segments: Literal["auto", "join", "separate"] = "auto"
    pooling: str = "attention"
    max_length: int = 512
    stride: int = 128
    shared_vocabulary: bool = True
    framing: Framing | None = None


class Certainty(IntEnum):
    """How sure a task is that a file is meant for it; the surest task is taken."""

    GUESS = 1
    CONTENTS = 2
    NAMES = 3
    FORMAT = 4


@dataclass(frozen=True)
class Recognised:
    """A file looks like one for a task.

    Attributes:
        certainty: by what.
        reason: in words.
    """

    certainty: Certainty
    reason: str


@dataclass(frozen=True)
class Drawing:
    """How training examples change from epoch to epoch, as a function of seed and epoch.

    Attributes:
        seed: of the run.
        augmentation: rates of each way of changing a text; all 0 for none.
    """

    seed: int = 0
    augmentation: Augmentation = field(default_factory=Augmentation)


@dataclass(frozen=True)
class Machine:
    """Where and in what portions a model is measured or used.

    Attributes:
        device: of the model.
        batch_tokens: token budget of one forward.
        ranks: the processes that share the work, each with the whole model.
    """

    device: torch.device
    batch_tokens: int = 8192
    ranks: Ranks = ALONE


@dataclass(frozen=True)
class PredictSettings:
    """How predictions are made.

    Attributes:
        decoding: how to search, for tasks that generate.
        stop: strings that end an output; they are not part of it.
        stream: told each piece of a single output as soon as it is known.
        first_example: number of the first row, on which what is drawn at random depends.

    Raises:
        UsageError: an empty stop string, which would end every output.
    """

    decoding: DecodingSettings = field(default_factory=DecodingSettings)
    stop: tuple[str, ...] = ()
    stream: Say | None = None
    first_example: int = 0

    def __post_init__(self) -> None:
        if "" in self.stop:
            raise UsageError("an empty stop string would end every output; leave it out.")

    def stop_rule(
        self, to_text: Callable[[int, tuple[int, ...]], str]
    ) -> Callable[[int, tuple[int, ...]], bool] | None:
        """Returns when an output ends, besides its end token; ``to_text`` decodes it."""
        if not self.stop:
            return None
        return lambda number, ids: any(text in to_text(number, ids) for text in self.stop)

    def cut(self, text: str) -> str:
        """Returns an output up to the first stop string."""
        places = [at for at in map(text.find, self.stop) if at >= 0]
        return text[: min(places)] if places else text


@dataclass(frozen=True)
class DecodedSample:
    """What decoding some examples gave.

    Attributes:
        metrics: by name, empty where a task decodes nothing.
        samples: predictions as text, for a person to see what has been learned.
    """

    metrics: dict[str, Any] = field(default_factory=dict)
    samples: tuple[str, ...] = ()


class Meter(ABC):
    """Running counts of one evaluation, in bounded memory."""

    @abstractmethod
    def update(self, outputs: Any, batch: PackedBatch) -> None:
        """Counts one batch."""

    @abstractmethod
    def compute(self) -> dict[str, float]:
        """Returns the metrics of everything counted."""

    def details(self) -> dict[str, Any]:
        """Returns what else there is to say of everything counted, as JSON values."""
        return {}

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Returns the counts as tensors, so that a resumed run goes on counting."""

    @abstractmethod
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from ``state``."""

    def merged(self, states: Sequence[Mapping[str, Tensor]]) -> Self:
        """Loads what several processes have counted, each its own batches; returns itself."""
        first, *others = states
        self.load({name: sum((s[name] for s in others), first[name]) for name in first})
        return self


class Task(ABC):
    """One way to learn from examples.

    Attributes:
        name: as on the Hugging Face Hub.
        architecture: of the model that learns it from scratch.
        other_architectures: of pretrained models that learn it too.
        head: of the model.
        higher_is_better: for each metric that a model can be judged by.
        default_metric: the one that it is judged by where none is named.
        decoded_metrics: those of them that ``decode`` measures.
        uses: names of the ``TaskSettings`` that it honours.
        takes_label: whether ``--label-column`` names one of its columns.
        generates: whether its predictions are decoded token by token.
        exact_text: whether tokens must give back a text to the letter, white space included.
        split_han: whether a tokenizer trained for it keeps Han characters apart.
        prediction_columns: keys of a prediction that become columns of a predicted file.
        labels: names of the classes, in the order of their scores; empty where there are none.
        reading: which columns it reads, and how.
        tokenizers: one, or one for the source and one for the target.
    """

    name: ClassVar[str]
    architecture: ClassVar[Architecture]
    other_architectures: ClassVar[frozenset[Architecture]] = frozenset()
    head: ClassVar[Head]
    higher_is_better: ClassVar[dict[str, bool]]
    default_metric: ClassVar[str]
    decoded_metrics: ClassVar[frozenset[str]] = frozenset()
    uses: ClassVar[frozenset[str]]
    exact_text: ClassVar[bool] = False
    split_han: ClassVar[bool] = False
    generates: ClassVar[bool] = False
    takes_label: ClassVar[bool] = False
    prediction_columns: ClassVar[tuple[str, ...]]

    labels: tuple[str, ...] = ()
    reading: Reading
    tokenizers: tuple[Tokenizer, ...]

    # From a file to examples

    @classmethod
    @abstractmethod
    def recognise(cls, file: RowFile, sample: Sequence[Row]) -> Recognised | None:
        """Returns how sure it is that a file is meant for this task; None where it is not."""

    @classmethod
    @abstractmethod
    def choose_reading(
        cls, file: RowFile, sample: Sequence[Row], wanted: WantedColumns
    ) -> tuple[Reading, tuple[str, ...]]:
        """Chooses the columns of a file.

        Returns:
            How rows are read, and the reasons, one line a column.

        Raises:
            UsageError: a named column is not there, or has no place in this task.
            DataError: no column fits.
        """

    @classmethod
    @abstractmethod
    def reading_of(cls, form: str, columns: Sequence[str], label: str | None) -> Reading:
        """Returns the reading of another file, or of a saved run."""

    @classmethod
    def check_corpus(cls, corpus: Corpus) -> None:
        """Refuses training rows that cannot be learned from, with ``DataError``."""
        del corpus

    @classmethod
    @abstractmethod
    def tokenizer_texts(
        cls, corpus: Corpus, rows: np.ndarray, reading: Reading, settings: TaskSettings
    ) -> list[Iterator[str]]:
        """Returns the texts that each tokenizer is trained on."""

    @classmethod
    @abstractmethod
    def from_data(
        cls,
        corpus: Corpus,
        rows: np.ndarray,
        reading: Reading,
        tokenizers: tuple[Tokenizer, ...],
        settings: TaskSettings,
    ) -> Task:
        """Builds the task from its training rows."""

    def check_evaluation(self, corpus: Corpus) -> list[str]:
        """Returns warnings about rows to be measured on; useless ones raise ``DataError``."""
        del corpus
        return []

    @abstractmethod
    def examples(
        self, corpus: Corpus, rows: np.ndarray, drawing: Drawing | None = None
    ) -> Examples:
        """Returns the examples in some rows of a corpus; ``drawing`` only for training."""

    # What is learned

    @abstractmethod
    def model_options(self) -> dict[str, Any]:
        """Returns what the task decides of ``TransformerConfig``."""

    @property
    def num_classes(self) -> int:
        """Between how many answers a unit of the loss chooses."""
        return self.tokenizers[-1].get_vocab_size()

    @abstractmethod
    def loss_sum(self, outputs: Any, batch: PackedBatch) -> Tensor:
        """Returns the scalar sum of the weighted losses of a batch with targets."""

    @abstractmethod
    def new_meter(self, examples: Examples | None = None) -> Meter:
        """Returns an empty meter; given ``examples``, one that counts all that they allow."""

    def decode(
        self,
        model: Transformer,
        examples: Examples,
        machine: Machine,
        settings: DecodingSettings,
        limit: int | None = None,
    ) -> DecodedSample:
        """Decodes examples and measures what came out.

        Args:
            model: in evaluation mode.
            examples: of a validation or test split.
            machine: where to compute.
            settings: how to decode.
            limit: decode only so many examples, spread over the split; None for all.
        """
        del model, examples, machine, settings, limit
        return DecodedSample()

    def calibrate(self, measured: Callable[[], Meter]) -> None:
        """Settles what follows from the trained model: called once, before it is saved.

        Args:
            measured: measures the model on the validation split.
        """
        del measured

    def baselines(self, train: Examples, judged: Examples, say: Say) -> dict[str, Any]:
        """Returns metrics of simpler ways on the same rows, by name."""
        del train, judged, say
        return {}

    # How it is used

    @property
    @abstractmethod
    def framing(self) -> Framing:
        """What stands around the texts that are read, and around those that are written."""

    @property
    @abstractmethod
    def input_columns(self) -> tuple[str, ...]:
        """The columns of a row to predict."""

    @property
    def num_optional_inputs(self) -> int:
        """How many of the input columns, the last ones, a row to predict may lack."""
        return 0

    def read_inputs(self, cells: Sequence[Cell]) -> tuple[str, ...]:
        """Returns a row to predict, of which a file gives the cells.

        White space, in which a task may count places, stays.

        Raises:
            CellError: why there is nothing to predict.
        """
        texts_of(cells, range(len(cells)))  # whether there is any text
        return tuple(c if isinstance(c, str) else "" if c is None else text_of(c) for c in cells)

    @abstractmethod
    def predict(
        self,
        model: Transformer,
        rows: Sequence[tuple[str, ...]],
        machine: Machine,
        settings: PredictSettings,
    ) -> list[dict[str, Any]]:
        """Returns one JSON-like prediction a row of ``input_columns`` texts."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Returns what ``from_json`` needs besides reading and tokenizers."""

    @classmethod
    @abstractmethod
    def from_json(
        cls, values: Mapping[str, Any], reading: Reading, tokenizers: tuple[Tokenizer, ...]
    ) -> Task:
        """Builds the task of a saved run."""
