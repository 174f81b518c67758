"""A finished run in Python: load it, predict with it, evaluate it.

run = hasten.train("train.csv", test="test.csv")
run = hasten.load("runs/train-1")
run.predict(["some text"])          [{"label": ..., "probability": ..., ...}]
run.evaluate("other.csv")           {"accuracy": ..., ...}
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hasten.config.load import build_config
from hasten.config.schema import DataConfig, RunConfig, settled
from hasten.core.errors import DamagedError, HastenError, UsageError, nearest
from hasten.core.products import using_library
from hasten.data.aligned import open_aligned
from hasten.data.corpus import check_rejected, open_corpus
from hasten.data.rows import RowFile, TextRows, open_rows
from hasten.model.search import DecodingSettings
from hasten.task.contract import Machine, PredictSettings, Task
from hasten.training.checkpoint import committed_checkpoints
from hasten.training.evaluate import evaluate
from hasten.training.folder import choose_folder, read_folder
from hasten.training.launching import launch_training, num_processes
from hasten.training.machine import choose_device
from hasten.training.observe import Observer, Silent
from hasten.training.saved import SavedModel, load_model
from hasten.training.session import resume_run, resumed_config, standard_input_as_file, start_run

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

        # That of the training, so that what was measured there is what is measured here; a model
        # without its run's settings is multiplied as torch does.
        self._library = None
        with suppress(HastenError):
            self._library = settled(read_folder(self.folder)[0].train.matrix_library)

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r}, task={self.task.name!r})"

    @property
    def task(self) -> Task:
        """What was learned; of a classifier, ``run.task.labels`` are its labels."""
        return self.saved.task

    @cached_property
    def result(self) -> dict[str, Any]:
        """What training ended with: metrics of each split, baselines, figures of the training."""
        file = self.folder / "result.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

    def predict(
        self, texts: Texts | Sequence[Sequence[str]], **decoding: Any
    ) -> list[dict[str, Any]]:
        """Predicts for each text: a label, a translation, a continuation, an answer.

        Args:
            texts: one text, several, or several rows of as many cells as the task takes columns
                (``run.task.input_columns``).
            **decoding: fields of ``DecodingSettings``, for tasks that generate.

        Returns:
            One dictionary each; its keys are the task's.

        Raises:
            UsageError: a row has another number of cells, or a decoding option is not known or
                contradicts another.
        """
        rows = [texts] if isinstance(texts, str) else texts
        settings = self.settings(**decoding)
        cells = ((row,) if isinstance(row, str) else tuple(row) for row in rows)
        return list(self.predict_rows(cells, settings))

    def settings(
        self,
        *,
        stop: Sequence[str] = (),
        stream: Callable[[str], None] | None = None,
        **options: Any,
    ) -> PredictSettings:
        """Returns how this run predicts, with some options of ``DecodingSettings`` changed.

        Raises:
            UsageError: an option that is not known, contradicts another, or has no effect on
                the run's task.
        """
        if (options or stop or stream) and not self.task.generates:
            names = ", ".join([*options, *["stop"] * bool(stop), *["stream"] * bool(stream)])
            raise UsageError(f"{names}: no effect on {self.task.name}, which generates no text.")
        known = {field.name for field in dataclasses.fields(DecodingSettings)}
        for name in options:
            if name not in known:
                raise UsageError(f"there is no decoding option '{name}'.{nearest(name, known)}")
        base = self.saved.decoding
        if options.get("temperature") and "num_beams" not in options:
            base = DecodingSettings()  # sampling has no beams
        if options.get("num_beams") == 1:
            base = dataclasses.replace(base, num_beams=1, length_penalty=1.0)
        return PredictSettings(dataclasses.replace(base, **options), tuple(stop), stream)

    def predict_rows(
        self, rows: Iterable[Sequence[str]], settings: PredictSettings | None = None
    ) -> Iterator[dict[str, Any]]:
        """Predicts rows of text cells one chunk at a time, in bounded memory."""
        iterator, settings = iter(rows), settings or self.settings()
        columns = self.task.input_columns
        fewest = len(columns) - self.task.num_optional_inputs
        machine = Machine(self.device, _BATCH_TOKENS)
        while chunk := list(itertools.islice(iterator, _CHUNK_TEXTS)):
            for row in chunk:
                if not fewest <= len(row) <= len(columns):
                    raise UsageError(
                        f"this run takes {len(columns)} texts for each prediction "
                        f"({', '.join(columns)}); a row of {len(row)} was given."
                    )
            with using_library(self._library), torch.inference_mode():
                yield from self.task.predict(
                    self.saved.model,
                    [tuple(row) for row in chunk],
                    machine,
                    settings,
                )
            first = settings.first_example + len(chunk)
            settings = dataclasses.replace(settings, first_example=first)

    def evaluate(
        self,
        path: str | Path | Sequence[str | Path],
        *,
        text_columns: Sequence[str] | None = None,
        label_column: str | None = None,
        observer: Observer | None = None,
        reading: DataConfig | None = None,
    ) -> dict[str, Any]:
        """Measures the model on a file of examples.

        Args:
            path: a file such as the run was trained on; ``-`` is standard input; a pair of
                line-aligned files for a translation run.
            text_columns: names or numbers; those of the training by default.
            label_column: likewise.
            observer: told of rejected rows and unseen labels.
            reading: delimiter, header and encoding, where they are not to be detected.

        Returns:
            The task's metrics, and its details.

        Raises:
            UsageError: the file lacks a column.
            DataError: the file cannot be used.
        """
        observer, options = observer or Silent(), reading or DataConfig()
        task, own = self.task, self.task.reading
        with rows_of(path, options) as file, columns_of(file):
            columns = tuple(text_columns or own.columns)
            wanted = task.reading_of(own.form, columns, label_column or own.label)
            corpus = open_corpus([file], wanted)
        check_rejected(corpus, options.max_rejected_fraction)
        for rejected in corpus.rejected[:5]:
            observer.warn(f"{rejected.file}, line {rejected.line}: {rejected.reason}")
        for warning in task.check_evaluation(corpus):
            observer.warn(warning)
        with using_library(self._library):
            found = evaluate(
                self.saved.model,
                task,
                task.examples(corpus, np.arange(len(corpus))),
                Machine(self.device, _BATCH_TOKENS),
                decoding=self.saved.decoding,
            )
        return {
            **found.metrics,
            **found.details,
            "samples": list(found.samples),
            "num_read": corpus.num_read,
            "num_rejected": len(corpus.rejected),
            "rejected": [asdict(entry) for entry in corpus.rejected[:10]],
        }


@contextmanager
def rows_of(
    path: str | Path | Sequence[str | Path], reading: DataConfig, text_rows: TextRows = "blocks"
) -> Iterator[RowFile]:
    """Yields the opened file, or pair of line-aligned files; ``-`` is standard input."""
    if not isinstance(path, str | Path):
        source, target = path
        yield open_aligned(source, target, encoding=reading.encoding)
        return
    options = {"delimiter": reading.delimiter, "header": reading.header}
    if str(path) != "-":
        yield open_rows(path, encoding=reading.encoding, text_rows=text_rows, **options)
        return
    with standard_input_as_file() as spooled:
        yield open_rows(
            spooled,
            encoding=reading.encoding,
            display_name="standard input",
            text_rows=text_rows,
            **options,
        )


@contextmanager
def columns_of(file: RowFile) -> Iterator[None]:
    """Puts the file's name and what to do into messages about its columns."""
    try:
        yield
    except UsageError as error:
        raise UsageError(
            f"{file.display_name}: {error} Other columns are named with --text-column and, where "
            "there are labels, --label-column."
        ) from None


def train(
    data: str | Path | Sequence[str | Path] | None = None,
    *,
    validation: str | Path | Sequence[str | Path] | None = None,
    test: str | Path | Sequence[str | Path] | None = None,
    output: str | Path | None = None,
    resume: str | Path | None = None,
    preset: str | None = None,
    settings: dict[str, Any] | None = None,
    observer: Observer | None = None,
) -> Run:
    """Trains a model on a file of examples.

    Args:
        data: CSV, TSV, JSONL, Parquet, text or SQuAD JSON, also gzipped; or several files. Two
            line-aligned files are given as ``settings={"data.source": ..., "data.target": ...}``,
            alone or beside tables of pairs.
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
        config = resumed_config(Path(resume))
        if num_processes(config.parallel) > 1:
            _launch(config, resume, resumes=True)
        else:
            resume_run(Path(resume), observer)
        return Run(resume)
    files = {"data.train": data, "data.validation": validation, "data.test": test}
    overrides = {
        key: tuple(map(str, [path] if isinstance(path, str | Path) else path))
        for key, path in files.items()
        if path is not None
    }
    config = build_config(preset=preset, overrides={**overrides, **(settings or {})})
    if num_processes(config.parallel) == 1:
        return Run(start_run(config, output, observer)["run"])
    folder = choose_folder(output, config.data)
    _launch(config, folder, resumes=False)
    return Run(folder)


def _launch(config: RunConfig, folder: str | Path, *, resumes: bool) -> None:
    """Trains in processes of their own, which tell their progress and errors themselves."""
    code = launch_training(config, folder, resumes=resumes, shows_output=False)
    if code:
        raise HastenError(
            f"the processes of {folder} ended with exit code {code}; standard error says why."
        )


def load(folder: str | Path, device: str = "auto") -> Run:
    """Loads a finished run; see ``Run``."""
    return Run(folder, device)
