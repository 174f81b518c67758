"""Text classification: one label for each text, or for each pair of texts.

    text, label -> tokens, class number -> scores (S, K) -> cross-entropy or focal loss

Shapes: S sequences, K classes, E examples.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from hasten.core.batch import PackedBatch
from hasten.core.errors import DataError, UsageError
from hasten.data.columns import check_label_values, choose_columns, is_label_name, texts_of
from hasten.data.corpus import Corpus, Reading
from hasten.data.examples import Examples
from hasten.data.order import cut_micro_batches
from hasten.data.packing import pack_examples, pack_texts
from hasten.data.redraw import Redraw, redrawn_tokens
from hasten.data.rows import Row, RowFile
from hasten.data.template import Framing, Template
from hasten.data.tokens import (
    EncodingFormat,
    TokenStore,
    encode_texts,
    open_tokens,
    template_of,
)
from hasten.model.transformer import Transformer
from hasten.task import baselines
from hasten.task.contract import (
    Certainty,
    Drawing,
    Machine,
    Meter,
    PredictSettings,
    Recognised,
    Say,
    Task,
    TaskSettings,
    WantedColumns,
)
from hasten.task.label_statistics import (
    accuracy_interval,
    balanced_class_weights,
    sort_labels,
)

UNSEEN = -1
"""Target of a label that training never saw: without loss, and always counted as an error."""


@dataclass(frozen=True)
class LossSettings:
    """How a wrong score is charged.

    Attributes:
        kind: cross_entropy, or focal: cross-entropy times ``(1 - p)^gamma`` with p the
            probability of the right class (Lin et al. 2017).
        focal_gamma: the exponent.
        label_smoothing: share of the target spread evenly over all classes (Szegedy et al. 2016).
    """

    kind: Literal["cross_entropy", "focal"] = "cross_entropy"
    focal_gamma: float = 2.0
    label_smoothing: float = 0.0


class LabelledExamples(Examples):
    """Texts with the number of their class.

    Args:
        corpus: the rows they come from.
        rows: (E,) those of the split.
        store: tokens of the corpus, row for row.
        targets: (E,) class numbers.
        weights: (E,) weight of each in the loss.
        redraw: draws an epoch's tokens; None where all epochs have the same.
    """

    def __init__(
        self,
        corpus: Corpus,
        rows: np.ndarray,
        store: TokenStore,
        *,
        targets: np.ndarray,
        weights: np.ndarray,
        redraw: Redraw | None = None,
    ) -> None:
        self.corpus, self.rows, self.store = corpus, rows, store
        self.targets, self.weights = targets, weights
        self.lengths, self.num_truncated = store.lengths[rows], store.num_truncated
        self._redraw = redraw

    def pack(self, examples: np.ndarray, weight: float = 1.0) -> PackedBatch:
        """Packs examples; targets are class numbers (S,)."""
        return pack_examples(
            self.store,
            self.rows[examples],
            example_ids=examples,
            targets=self.targets[examples],
            weight=weight,
        )

    def in_epoch(self, epoch: int) -> Examples:
        """Returns the examples with the tokens of an epoch."""
        if self._redraw is None:
            return self
        return LabelledExamples(
            self.corpus,
            self.rows,
            self._redraw(epoch),
            targets=self.targets,
            weights=self.weights,
            redraw=self._redraw,
        )


class TextClassification(Task):
    """Assigns one of K labels.

    Args:
        labels: the K label names; a class's number is its place here.
        loss: how scores are charged.
        class_weights: (K,) weight of each class in the loss; None for 1 each.
        reading: which columns are read, and how.
        tokenizers: the one tokenizer.
        form: how a row's texts become one sequence.
    """

    name = "text-classification"
    architecture = "encoder"
    other_architectures = frozenset({"decoder"})  # by their last token
    head = "classification"
    higher_is_better = {"loss": False, "accuracy": True, "macro_f1": True}  # noqa: RUF012
    default_metric = "accuracy"
    uses = frozenset(
        {
            "loss",
            "focal_gamma",
            "label_smoothing",
            "class_weights",
            "segments",
            "pooling",
            "max_length",
        }
    )
    prediction_columns = ("label", "probability")
    takes_label = True

    def __init__(
        self,
        labels: tuple[str, ...],
        loss: LossSettings | None = None,
        class_weights: tuple[float, ...] | None = None,
        *,
        reading: Reading | None = None,
        tokenizers: tuple[Tokenizer, ...] = (),
        form: EncodingFormat | None = None,
    ) -> None:
        self.labels = labels
        self.loss = loss or LossSettings()
        self.class_weights = class_weights
        self.reading = reading or self.reading_of("text", ("text",), "label")
        self.tokenizers = tokenizers
        self.form = form or EncodingFormat()

    @classmethod
    def recognise(cls, file: RowFile, sample: Sequence[Row]) -> Recognised | None:
        """Takes a file with a text column and one of few values, or one that is called label."""
        try:
            found = choose_columns(sample, file.columns, file=file.display_name)
        except DataError:
            # What is wrong with a column that is called the label is for this task to say.
            named = next((name for name in file.columns if is_label_name(name)), None)
            if named is None or len(file.columns) == 1:
                return None
            return Recognised(Certainty.CONTENTS, f"a column is called '{named}'")
        return Recognised(Certainty.CONTENTS, f"the column '{found.label}' holds labels")

    @classmethod
    def choose_reading(
        cls, file: RowFile, sample: Sequence[Row], wanted: WantedColumns
    ) -> tuple[Reading, tuple[str, ...]]:
        """Chooses text columns and label column by their names and contents."""
        if wanted.source or wanted.target:
            raise UsageError(
                "text classification has no source or target; name --text-column, --label-column."
            )
        found = choose_columns(
            sample, file.columns, text=wanted.text, label=wanted.label, file=file.display_name
        )
        return cls.reading_of("text", found.text, found.label), found.reasons

    @classmethod
    def reading_of(cls, form: str, columns: Sequence[str], label: str | None) -> Reading:
        """Reads the text columns stripped of white space, and the label."""
        read_row = partial(texts_of, positions=range(len(columns)))
        return Reading(cls.name, form, tuple(columns), label, read_row)

    @classmethod
    def check_corpus(cls, corpus: Corpus) -> None:
        """Refuses labels that cannot be learned."""
        assert corpus.label_column is not None
        check_label_values(
            corpus.class_counts(), corpus.label_column, len(corpus), file=corpus.name
        )

    @classmethod
    def tokenizer_texts(
        cls, corpus: Corpus, rows: np.ndarray, reading: Reading, settings: TaskSettings
    ) -> list[Iterator[str]]:
        """Returns all texts of the rows."""
        return [itertools.chain.from_iterable(corpus.texts(rows))]

    @classmethod
    def from_data(
        cls,
        corpus: Corpus,
        rows: np.ndarray,
        reading: Reading,
        tokenizers: tuple[Tokenizer, ...],
        settings: TaskSettings,
    ) -> TextClassification:
        """Builds the task whose classes are the labels of the training rows."""
        numbers = np.bincount(corpus.labels[rows], minlength=len(corpus.label_names)).tolist()
        counts = {n: c for n, c in zip(corpus.label_names, numbers, strict=True) if c}
        labels = sort_labels(tuple(counts))
        balanced = balanced_class_weights(tuple(counts[label] for label in labels))
        is_separate = corpus.num_texts > 1 and settings.segments != "join"
        template = None if settings.framing is None else settings.framing.read
        if template is not None and corpus.num_texts > 1 and not is_separate:
            template = Template(template.first, (), template.last)
        return cls(
            labels,
            LossSettings(settings.loss, settings.focal_gamma, settings.label_smoothing),
            balanced if settings.class_weights == "balanced" else None,
            reading=reading,
            tokenizers=tokenizers,
            form=EncodingFormat(
                max_length=settings.max_length,
                class_token=settings.pooling == "first",
                separate_segments=is_separate,
                template=template,
            ),
        )

    def check_evaluation(self, corpus: Corpus) -> list[str]:
        """Warns of labels that the model cannot know; refuses a file that has no others."""
        counts = corpus.class_counts()
        unseen = [name for name in counts if name not in self.labels]
        num_unseen = sum(counts[name] for name in unseen)
        if not num_unseen:
            return []
        names = ", ".join(unseen[:5]) + " ..." * (len(unseen) > 5)
        if num_unseen == len(corpus):
            known = ", ".join(self.labels[:5]) + " ..." * (len(self.labels) > 5)
            raise DataError(
                f"{corpus.name}: no label in column '{corpus.label_column}' ({names}) was seen in "
                f"training (which had {known}); name another with --label-column."
            )
        return [
            f"{corpus.name}: labels never seen in training count as errors: {names} "
            f"({num_unseen:,} of {len(corpus):,} rows)"
        ]

    def examples(
        self, corpus: Corpus, rows: np.ndarray, drawing: Drawing | None = None
    ) -> LabelledExamples:
        """Returns the labelled texts in some rows of a corpus."""
        tokenizer = self.tokenizers[0]
        targets = self.targets(corpus.label_names, corpus.labels[rows])
        redraw = None
        if drawing is not None:
            redraw = redrawn_tokens(
                corpus,
                rows,
                tokenizer,
                self.form,
                augmentation=drawing.augmentation,
                seed=drawing.seed,
            )
        return LabelledExamples(
            corpus,
            rows,
            open_tokens(corpus, tokenizer, self.form),
            targets=targets,
            weights=self.unit_weights(targets),
            redraw=redraw,
        )

    def model_options(self) -> dict[str, Any]:
        """Returns vocabulary, positions, segments and classes."""
        return {
            "vocab_size": self.tokenizers[0].get_vocab_size(),
            "max_positions": self.form.max_length,
            "num_token_types": len(self.reading.columns) if self.form.has_types else 0,
            "num_labels": len(self.labels),
            "head": self.head,
        }

    @property
    def num_classes(self) -> int:
        """The number K of labels."""
        return len(self.labels)

    def targets(self, label_names: tuple[str, ...], labels: np.ndarray) -> np.ndarray:
        """Translates a file's label numbers (R,) into class numbers, ``UNSEEN`` for others."""
        number = {name: i for i, name in enumerate(self.labels)}
        # A row without label has the number -1, which is the last entry.
        table = np.array([*(number.get(name, UNSEEN) for name in label_names), UNSEEN])
        return table[labels]

    def unit_weights(self, targets: np.ndarray) -> np.ndarray:
        """Returns (E,) the class weight of each target, 0 where the label is unseen."""
        weights = np.asarray(self.class_weights or [1.0] * len(self.labels))
        return np.where(targets == UNSEEN, 0.0, weights[np.maximum(targets, 0)])

    def loss_sum(self, outputs: Tensor, batch: PackedBatch) -> Tensor:
        """Returns the summed loss of scores (S, K); reductions are in float32 or wider."""
        assert batch.targets is not None
        scores_SK = outputs if outputs.dtype == torch.float64 else outputs.float()
        weights_K = None
        if self.class_weights is not None:
            weights_K = torch.tensor(
                self.class_weights, dtype=scores_SK.dtype, device=scores_SK.device
            )
        if self.loss.kind == "cross_entropy":
            return F.cross_entropy(
                scores_SK,
                batch.targets,
                weight=weights_K,
                ignore_index=UNSEEN,
                reduction="sum",
                label_smoothing=self.loss.label_smoothing,
            )
        losses_S = F.cross_entropy(
            scores_SK,
            batch.targets,
            weight=weights_K,
            ignore_index=UNSEEN,
            reduction="none",
            label_smoothing=self.loss.label_smoothing,
        )
        right_S = F.softmax(scores_SK, -1).gather(1, batch.targets.clamp(min=0)[:, None])[:, 0]
        # An exponent under 1 has an infinite slope at 0, which a certain score would reach.
        wrong_S = (1 - right_S).clamp(min=torch.finfo(scores_SK.dtype).eps)
        return (losses_S * wrong_S**self.loss.focal_gamma).sum()

    def new_meter(self, examples: Examples | None = None) -> ClassificationMeter:
        """Returns an empty confusion matrix and loss sum."""
        return ClassificationMeter(self)

    def baselines(self, train: Examples, judged: Examples, say: Say) -> dict[str, Any]:
        """Returns the accuracy of the largest class, and of TF-IDF with logistic regression."""
        assert isinstance(train, LabelledExamples) and isinstance(judged, LabelledExamples)
        largest = baselines.majority_accuracy(train.targets, judged.targets)
        found: dict[str, Any] = {"majority": {"accuracy": largest}}
        if not baselines.tfidf_available():
            return found
        if len(train) > baselines.MAX_ROWS:
            say(f"TF-IDF baseline: left out above {baselines.MAX_ROWS:,} rows")
            return found
        accuracy, seconds = baselines.tfidf_accuracy(
            _joined(train), train.targets, _joined(judged), judged.targets
        )
        found["tfidf_logistic_regression"] = {"accuracy": accuracy, "seconds": seconds}
        return found

    @property
    def input_columns(self) -> tuple[str, ...]:
        """The text columns."""
        return self.reading.columns

    def predict(
        self,
        model: Transformer,
        rows: Sequence[tuple[str, ...]],
        machine: Machine,
        settings: PredictSettings,
    ) -> list[dict[str, Any]]:
        """Returns ``{"label", "probability", "probabilities"}`` of each row of texts."""
        # Surrounding white space is no part of a text in training either.
        stripped = [tuple(cell.strip() for cell in row) for row in rows]
        texts = encode_texts(self.tokenizers[0], stripped, self.form)
        lengths = np.array([len(text.token_ids) for text in texts])
        found: list[dict[str, Any]] = [{} for _ in texts]
        for piece in cut_micro_batches(np.arange(len(texts)), lengths, machine.batch_tokens):
            batch = pack_texts([texts[i] for i in piece], with_types=self.form.has_types).to(
                machine.device
            )
            outputs = model(batch)
            assert isinstance(outputs, Tensor)
            for i, prediction in zip(piece.tolist(), self.predictions(outputs), strict=True):
                found[i] = prediction
        return found

    def to_json(self) -> dict[str, Any]:
        """Returns the labels and the format of a sequence."""
        return {
            "id2label": {str(i): label for i, label in enumerate(self.labels)},
            "label2id": {label: i for i, label in enumerate(self.labels)},
            "encoding": dataclasses.asdict(self.form),
        }

    @classmethod
    def from_json(
        cls, values: Mapping[str, Any], reading: Reading, tokenizers: tuple[Tokenizer, ...]
    ) -> TextClassification:
        """Builds the task of a saved run."""
        labels = tuple(values["id2label"][str(i)] for i in range(len(values["id2label"])))
        form = EncodingFormat.from_json(values["encoding"])
        return cls(labels, reading=reading, tokenizers=tokenizers, form=form)

    @property
    def framing(self) -> Framing:
        """What stands around and between texts."""
        template = template_of(self.tokenizers[0], self.form)
        return Framing(template, template)

    def predictions(self, outputs: Tensor) -> list[dict[str, Any]]:
        """Returns ``{"label", "probability", "probabilities"}`` of each sequence."""
        probabilities_SK = F.softmax(outputs.double(), -1).tolist()
        found = []
        for row in probabilities_SK:
            best = max(range(len(row)), key=row.__getitem__)
            found.append(
                {
                    "label": self.labels[best],
                    "probability": row[best],
                    "probabilities": dict(zip(self.labels, row, strict=True)),
                }
            )
        return found


class ClassificationMeter(Meter):
    """Confusion counts and loss of one pass.

    Attributes:
        confusion: (K + 1, K) examples by true and predicted class; the last row holds labels
            that training never saw.
    """

    def __init__(self, task: TextClassification) -> None:
        self._task = task
        classes = len(task.labels)
        self.confusion = np.zeros((classes + 1, classes), dtype=np.int64)
        self._loss = self._weight = 0.0

    def update(self, outputs: Tensor, batch: PackedBatch) -> None:
        """Counts one batch of scores (S, K)."""
        assert batch.targets is not None
        self._loss += self._task.loss_sum(outputs, batch).item()
        targets = batch.targets.cpu().numpy()
        self._weight += float(self._task.unit_weights(targets).sum())
        predicted = outputs.argmax(-1).cpu().numpy()
        np.add.at(self.confusion, (targets, predicted), 1)  # -1 is the last row

    def compute(self) -> dict[str, float]:
        """Returns loss, accuracy, macro_f1 (over classes that occur) and num_examples."""
        total = int(self.confusion.sum())
        f1 = [row["f1"] for row in self.per_class() if row["num_examples"]]
        return {
            "loss": self._loss / self._weight if self._weight else float("nan"),
            "accuracy": float(np.trace(self.confusion[:-1])) / total if total else float("nan"),
            "macro_f1": float(np.mean(f1)) if f1 else float("nan"),
            "num_examples": total,
        }

    def details(self) -> dict[str, Any]:
        """Returns the 95% interval of the accuracy, and a table of classes."""
        total, accuracy = int(self.confusion.sum()), self.compute()["accuracy"]
        return {
            "accuracy_interval": accuracy_interval(accuracy, total),
            "per_class": self.per_class(),
        }

    def state(self) -> dict[str, Tensor]:
        """Returns the counts as tensors."""
        sums = torch.tensor([self._loss, self._weight], dtype=torch.float64)
        return {"confusion": torch.from_numpy(self.confusion.copy()), "sums": sums}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from ``state``."""
        self.confusion[:] = state["confusion"].numpy()
        self._loss, self._weight = state["sums"].tolist()

    def per_class(self) -> list[dict[str, Any]]:
        """Returns precision, recall, F1 and the number of examples of each class."""
        right = np.diagonal(self.confusion)
        rows = []
        for i, label in enumerate(self._task.labels):
            actual, predicted = int(self.confusion[i].sum()), int(self.confusion[:, i].sum())
            rows.append(
                {
                    "label": label,
                    "precision": float(right[i]) / predicted if predicted else 0.0,
                    "recall": float(right[i]) / actual if actual else 0.0,
                    "f1": 2 * float(right[i]) / (actual + predicted) if actual + predicted else 0.0,
                    "num_examples": actual,
                }
            )
        return rows


def _joined(examples: Examples) -> list[str]:
    return [" ".join(cells) for cells in examples.corpus.texts(examples.rows)]
