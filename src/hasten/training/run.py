"""A finished run in Python: load it, predict with it, evaluate it.

run = hasten.train("train.csv", test="test.csv")
run = hasten.load("runs/train-1")
run.predict(["some text"])          [{"label": ..., "probability": ..., ...}]
run.evaluate("other.csv")           {"accuracy": ..., ...}
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hasten.config.load import build_config
from hasten.config.schema import DataConfig
from hasten.core.errors import DamagedError, DataError, UsageError
from hasten.data.corpus import Corpus, check_rejected, open_corpus
from hasten.data.order import cut_micro_batches
from hasten.data.packing import pack_texts
from hasten.data.rows import RowFile, open_rows
from hasten.data.tokens import encode_texts, open_tokens
from hasten.task.text_classification import (
    UNSEEN,
    ClassificationMeter,
    accuracy_interval,
)
from hasten.training.checkpoint import committed_checkpoints
from hasten.training.evaluate import measure
from hasten.training.machine import choose_device
from hasten.training.observe import Observer, Silent
from hasten.training.prepare import Split
from hasten.training.saved import SavedModel, load_model
from hasten.training.session import resume_run, standard_input_as_file, start_run

_BATCH_TOKENS = 8192
_CHUNK_TEXTS = 2000

Texts = str | Sequence[str]


class Run:
    """A trained model with what it knows about itself.

    Args:
        folder: the run's folder.
        device: where to compute: auto, cpu or cuda.

    Raises:
        UsageError: it is not a run folder, or its training is not finished.
        DamagedError: a file of the model is missing or altered.
    """

    def __init__(self, folder: str | Path, device: str = "auto") -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UsageError(f"{self.folder}: no such run folder.")
        if not (self.folder / "model").is_dir():
            if (self.folder / "config.yaml").is_file():
                raise UsageError(
                    f"{self.folder} is not finished; go on with: "
                    f"hasten train --resume {self.folder}"
                )
            raise UsageError(f"{self.folder} is not a run folder (it has no model/).")
        self.device, _ = choose_device(device)
        try:
            self.saved: SavedModel = load_model(self.folder / "model", self.device)
        except DamagedError as error:
            if not committed_checkpoints(self.folder / "checkpoints"):
                raise
            raise DamagedError(
                f"{error} Write it anew from its checkpoint: hasten train --resume {self.folder}"
            ) from None

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r}, labels={list(self.labels)})"

    @property
    def labels(self) -> tuple[str, ...]:
        """The label names."""
        return self.saved.task.labels

    @cached_property
    def result(self) -> dict[str, Any]:
        """What training ended with: metrics of each split, baselines, figures of the training."""
        file = self.folder / "result.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

    def predict(self, texts: Texts | Sequence[Sequence[str]]) -> list[dict[str, Any]]:
        """Predicts a label for each text.

        Args:
            texts: one text, several, or several rows of as many cells as there were text columns.

        Returns:
            For each, ``{"label", "probability", "probabilities"}``.

        Raises:
            UsageError: a row has another number of cells.
        """
        rows = [texts] if isinstance(texts, str) else texts
        return list(self.predict_rows((row,) if isinstance(row, str) else row for row in rows))

    def predict_rows(self, rows: Iterable[Sequence[str]]) -> Iterator[dict[str, Any]]:
        """Predicts rows of text cells one chunk at a time, in bounded memory."""
        iterator = iter(rows)
        columns = self.saved.text_columns
        while chunk := list(itertools.islice(iterator, _CHUNK_TEXTS)):
            for row in chunk:
                if len(row) != len(columns):
                    raise UsageError(
                        f"this run takes {len(columns)} texts for each prediction "
                        f"({', '.join(columns)}); a row of {len(row)} was given."
                    )
            # Surrounding white space is no part of a text in training either.
            yield from self._predict_chunk([tuple(cell.strip() for cell in row) for row in chunk])

    def evaluate(
        self,
        path: str | Path,
        *,
        text_columns: Sequence[str] | None = None,
        label_column: str | None = None,
        observer: Observer | None = None,
        reading: DataConfig | None = None,
    ) -> dict[str, Any]:
        """Measures the model on a file of labelled rows.

        Args:
            path: CSV, TSV or JSONL, also gzipped; ``-`` is standard input.
            text_columns: names or numbers; those of the training by default.
            label_column: likewise.
            observer: told of rejected rows and unseen labels.
            reading: delimiter, header and encoding, where they are not to be detected.

        Returns:
            loss, accuracy with its 95% interval, macro_f1, num_examples and per_class.

        Raises:
            UsageError: the file lacks a column.
            DataError: the file cannot be used, or has no label that was seen in training.
        """
        observer, reading = observer or Silent(), reading or DataConfig()
        saved = self.saved
        with rows_of(path, reading) as file, columns_of(file):
            corpus = open_corpus(
                file,
                tuple(text_columns or saved.text_columns),
                label_column or saved.label_column,
            )
        check_rejected(corpus, reading.max_rejected_fraction)
        for rejected in corpus.rejected[:5]:
            observer.warn(f"{rejected.file}, line {rejected.line}: {rejected.reason}")
        targets = saved.task.targets(corpus.label_names, corpus.labels)
        _check_seen(corpus, targets, saved, observer)
        store = open_tokens(corpus, saved.tokenizer, saved.form)
        split = Split("test", corpus, np.arange(len(corpus)), store, targets)
        meter = measure(
            saved.model, saved.task, split, device=self.device, batch_tokens=_BATCH_TOKENS
        )
        assert isinstance(meter, ClassificationMeter)
        metrics: dict[str, Any] = dict(meter.compute())
        return {
            **metrics,
            "accuracy_interval": accuracy_interval(metrics["accuracy"], len(corpus)),
            "per_class": meter.per_class(),
            "num_read": corpus.num_read,
            "num_rejected": len(corpus.rejected),
            "rejected": [asdict(entry) for entry in corpus.rejected[:10]],
        }

    @torch.inference_mode()
    def _predict_chunk(self, rows: list[tuple[str, ...]]) -> list[dict[str, Any]]:
        saved = self.saved
        texts = encode_texts(saved.tokenizer, rows, saved.form)
        lengths = np.array([len(text.token_ids) for text in texts])
        found: list[dict[str, Any]] = [{} for _ in texts]
        for piece in cut_micro_batches(np.arange(len(texts)), lengths, _BATCH_TOKENS):
            batch = pack_texts(
                [texts[i] for i in piece], with_types=saved.form.separate_segments
            ).to(self.device)
            for i, prediction in zip(
                piece.tolist(), saved.task.predictions(saved.model(batch)), strict=True
            ):
                found[i] = prediction
        return found


@contextmanager
def rows_of(path: str | Path, reading: DataConfig) -> Iterator[RowFile]:
    """Yields the opened file; ``-`` is standard input."""
    options = {"delimiter": reading.delimiter, "header": reading.header}
    if str(path) != "-":
        yield open_rows(path, encoding=reading.encoding, **options)
        return
    with standard_input_as_file() as spooled:
        yield open_rows(
            spooled, encoding=reading.encoding, display_name="standard input", **options
        )


@contextmanager
def columns_of(file: RowFile) -> Iterator[None]:
    """Puts the file's name and what to do into messages about its columns."""
    try:
        yield
    except UsageError as error:
        raise UsageError(
            f"{file.display_name}: {error} Name other columns with --text-column, --label-column."
        ) from None


def _check_seen(corpus: Corpus, targets: np.ndarray, saved: SavedModel, observer: Observer) -> None:
    """Warns of labels that the model cannot know; refuses a file that has no others."""
    num_unseen = int((targets == UNSEEN).sum())
    if not num_unseen:
        return
    unseen = [name for name in corpus.class_counts() if name not in saved.task.labels]
    names = ", ".join(unseen[:5]) + " ..." * (len(unseen) > 5)
    if num_unseen == len(corpus):
        known = ", ".join(saved.task.labels[:5]) + " ..." * (len(saved.task.labels) > 5)
        raise DataError(
            f"{corpus.name}: no label in column '{corpus.label_column}' ({names}) was seen in "
            f"training (which had {known}); name another with --label-column."
        )
    observer.warn(
        f"{corpus.name}: labels never seen in training count as errors: {names} "
        f"({num_unseen:,} of {len(corpus):,} rows)"
    )


def train(
    data: str | Path | None = None,
    *,
    validation: str | Path | None = None,
    test: str | Path | None = None,
    output: str | Path | None = None,
    resume: str | Path | None = None,
    preset: str | None = None,
    settings: dict[str, Any] | None = None,
    observer: Observer | None = None,
) -> Run:
    """Trains a model on a file of examples.

    Args:
        data: CSV, TSV or JSONL, also gzipped.
        validation: file to choose the best model by; a tenth of ``data`` by default.
        test: file measured once at the end.
        output: the run's folder; runs/<data>-<n> by default.
        resume: a run's folder to go on with; nothing else is given then.
        preset: a named set of settings.
        settings: dotted keys, for example ``{"train.epochs": 3}``.
        observer: told of every choice, step and evaluation.

    Raises:
        HastenError: a subclass for each kind of problem.
    """
    observer = observer or Silent()
    if resume is not None:
        if data is not None or settings or preset or output is not None or validation or test:
            raise UsageError("resume goes on with the run as it was: give it alone.")
        resume_run(Path(resume), observer)
        return Run(resume)
    if data is None:
        raise UsageError("there is no training file.")
    files = {"data.train": data, "data.validation": validation, "data.test": test}
    overrides = {key: str(path) for key, path in files.items() if path is not None}
    config = build_config(preset=preset, overrides={**overrides, **(settings or {})})
    return Run(start_run(config, output, observer)["run"])


def load(folder: str | Path, device: str = "auto") -> Run:
    """Loads a finished run; see ``Run``."""
    return Run(folder, device)
