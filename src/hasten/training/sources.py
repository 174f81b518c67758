"""From a run's configuration to its opened files: which task, which columns, which rows.

    files --open--> RowFile --recognise--> task --choose_reading--> Reading
    RowFile, Reading --> Corpus --hold out--> rows of train, rows of validation

Every guess is told with its reason, every row that is not used is kept with its reason.
"""

from __future__ import annotations

import glob
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hasten.config.schema import DataConfig, RunConfig
from hasten.core.errors import DataError, UsageError
from hasten.data.aligned import open_aligned
from hasten.data.cache import cache_folder
from hasten.data.corpus import (
    Corpus,
    Reading,
    check_rejected,
    held_out_rows,
    held_out_tail,
    open_corpus,
    positions_in,
)
from hasten.data.inspection import ChosenReading
from hasten.data.rows import Rejected, Row, RowFile, open_rows
from hasten.task.contract import Certainty, Recognised, Task, WantedColumns
from hasten.task.registry import TASKS, task_named
from hasten.training.observe import Observer

_SAMPLE_ROWS = 1000
_FEW_EXAMPLES = 10
_NAMED_LABEL = Recognised(Certainty.CONTENTS, "--label-column names a column")


@dataclass(frozen=True)
class Sources:
    """The opened files of a run.

    Attributes:
        task: what is learned from them.
        task_reason: why it is that.
        reading: which columns are read, and how.
        corpora: rows of train, and of validation and test where there are files for them.
        rows: numbers of the rows of each split.
    """

    task: type[Task]
    task_reason: str
    reading: Reading
    corpora: dict[str, Corpus]
    rows: dict[str, np.ndarray]

    @property
    def rejected(self) -> list[Rejected]:
        """All rows not used, of all files."""
        return [entry for corpus in self.corpora.values() for entry in corpus.rejected]


def open_sources(config: RunConfig, observer: Observer) -> Sources:
    """Opens the files, chooses task and columns, and splits the rows.

    Raises:
        UsageError: no training file, or a column that is not there.
        DataError: a file that cannot be used.
    """
    data = config.data
    files = open_split(data, "train")
    for note in files[0].notes:
        observer.note(note)
    sample = sample_rows(files[0])
    wanted = wanted_columns(data)
    aligned = next((file for file in files[1:] if file.format == "aligned"), None)
    if aligned is None:
        task, task_reason = _choose_task(config.task, files[0], sample, wanted)
    else:
        observer.note(f"also {aligned.display_name}, {', '.join(aligned.notes)}")
        task, task_reason = _choose_task(config.task, aligned, sample_rows(aligned), wanted)
        wanted = _columns_like(aligned, files[0]) or wanted
    observer.note(f"task: {task.name} ({task_reason})")
    reading, reasons = task.choose_reading(files[0], sample, wanted)
    for reason in reasons:
        observer.note(reason)
    read = {*reading.columns, reading.label}
    unread = [name for name in files[0].columns if name not in read]
    if unread:
        observer.note(f"columns not read: {', '.join(unread[:10])}{' ...' * (len(unread) > 10)}")
    corpora = {"train": open_corpus(_checked(files, reading), reading)}
    for name in ("validation", "test"):
        if others := open_split(data, name):
            corpora[name] = open_corpus(_checked(others, reading), reading)
    for corpus in corpora.values():
        check_rejected(corpus, data.max_rejected_fraction)
    task.check_corpus(corpora["train"])
    rows = {name: np.arange(len(corpus)) for name, corpus in corpora.items()}
    if "validation" not in corpora:
        rows["train"], rows["validation"] = _hold_out(corpora["train"], reading, data, observer)
    return Sources(task, task_reason, reading, corpora, rows)


def open_split(data: DataConfig, split: str) -> list[RowFile]:
    """Opens the files of a split; none where there are none.

    Raises:
        UsageError: there are no training files, or half a pair of aligned files.
        DataError: a file that cannot be read.
    """
    paths: Sequence[str] = getattr(data, split) or ()
    aligned, is_training = aligned_paths(data, split), split == "train"
    if paths and aligned and not is_training:
        raise UsageError(f"give --{split} or --{split}-source and --{split}-target, not both.")
    if len(aligned) == 1:
        raise _half_a_pair("" if is_training else f"{split}-")
    files = [open_file(path, data) for path in expand(paths)]
    if files and is_training:
        _check_named(data, files[0])
    if aligned:
        files.append(open_aligned(*aligned, encoding=data.encoding))
    if is_training and not files:
        raise UsageError("there is no training file: hasten train FILE.")
    return files


def aligned_paths(data: DataConfig, split: str) -> tuple[str, ...]:
    """Returns the line-aligned files of a split: two, none, or one where the other is missing.

    Beside training files, ``source`` and ``target`` are such files where both exist, else columns.
    """
    prefix = "" if split == "train" else f"{split}_"
    both = (getattr(data, f"{prefix}source"), getattr(data, f"{prefix}target"))
    given = tuple(path for path in both if path is not None)
    is_pair = len(given) == 2 and all(Path(path).is_file() for path in given)
    return given if is_pair or split != "train" or not data.train else ()


def _check_named(data: DataConfig, file: RowFile) -> None:
    """Refuses a source and target that may be columns or files, or are one of each.

    Raises:
        UsageError: saying what to write.
    """
    names = {"source": data.source, "target": data.target}
    columns = [name for name in names.values() if name in file.columns]
    files = [name for name in names.values() if name is not None and Path(name).is_file()]
    if columns and len(files) == 2:
        raise UsageError(
            f"'{columns[0]}' is a column of {file.display_name} and a file: write the column's "
            f"number, or ./{columns[0]} for the file."
        )
    for side, name in names.items():
        if not files or columns or name in files:
            continue
        if name is None:
            raise _half_a_pair("")
        raise UsageError(
            f"--{side} {name}: there is no such file, to go with {files[0]}, nor such a column "
            f"of {file.display_name}."
        )


def _half_a_pair(prefix: str) -> UsageError:
    return UsageError(
        f"--{prefix}source and --{prefix}target go together: two files, line by line."
    )


def _columns_like(aligned: RowFile, table: RowFile) -> WantedColumns | None:
    """Returns the columns of a table that are called as line-aligned files end: train.en, 'en'."""
    names = [path.name.removesuffix(".gz") for path in aligned.paths]
    source, target = (name.rpartition(".")[2] for name in names)
    has_both = source != target and {source, target} <= set(table.columns)
    return WantedColumns(source=source, target=target) if has_both else None


def expand(paths: Sequence[str]) -> list[str]:
    """Returns the files that paths and patterns such as ``texts/*.txt`` name, in order.

    Raises:
        DataError: a pattern that fits no file.
    """
    found: list[str] = []
    for path in paths:
        if Path(path).exists() or not glob.has_magic(path):
            found.append(path)
            continue
        names = glob.glob(path, recursive=True)  # noqa: PTH207 - a pattern may be absolute
        fitting = sorted(name for name in names if Path(name).is_file())
        if not fitting:
            raise DataError(f"{path}: no file fits this pattern.")
        found += fitting
    return found


def open_file(path: str | Path, data: DataConfig) -> RowFile:
    """Opens a file with the reading options of the run."""
    from_stdin = Path(path).is_relative_to(cache_folder())
    return open_rows(
        path,
        delimiter=data.delimiter,
        header=data.header,
        encoding=data.encoding,
        display_name="standard input" if from_stdin else None,
    )


def sample_rows(file: RowFile) -> list[Row]:
    """Returns the first rows of a file."""
    rows = (row for row in file if isinstance(row, Row))
    return list(itertools.islice(rows, _SAMPLE_ROWS))


def wanted_columns(data: DataConfig) -> WantedColumns:
    """Returns the columns that a person named; of line-aligned files there are none to name."""
    is_aligned = bool(aligned_paths(data, "train"))
    return WantedColumns(
        data.text_columns,
        data.label_column,
        None if is_aligned else data.source,
        None if is_aligned else data.target,
    )


def choose_reading(
    file: RowFile, sample: Sequence[Row], wanted: WantedColumns, task: str = "auto"
) -> ChosenReading:
    """Returns how a file would be read, which its task decides.

    Raises:
        UsageError: an unknown task, or a column that is not there.
    """
    kind, _ = _choose_task(task, file, list(sample), wanted)
    try:
        return ChosenReading(*kind.choose_reading(file, sample, wanted))
    except DataError:  # the inspection of a classifier's file says in full what is wrong
        return ChosenReading(TASKS["text-classification"].reading_of("text", (), ""), ())


def _choose_task(
    wanted: str, file: RowFile, sample: list[Row], columns: WantedColumns
) -> tuple[type[Task], str]:
    if wanted != "auto":
        return task_named(wanted), "as asked for"
    if columns.source or columns.target:
        return TASKS["translation"], "--source and --target name columns"
    found = [(task, task.recognise(file, sample)) for task in TASKS.values()]
    if columns.label:  # answers can be called labels too, where questions are plain to see
        found = [
            (task, recognised if recognised and recognised.certainty >= Certainty.NAMES else None)
            for task, recognised in found
            if task.takes_label
        ]
        found.append((TASKS["text-classification"], _NAMED_LABEL))
    sure = [(recognised, task) for task, recognised in found if recognised is not None]
    if not sure:  # the first task says best what it misses
        return next(iter(TASKS.values())), "the file fits no other task either"
    recognised, task = max(sure, key=lambda pair: pair[0].certainty)
    return task, recognised.reason


def _checked(files: list[RowFile], reading: Reading) -> list[RowFile]:
    """Looks for the columns in each file.

    Raises:
        DataError: naming the file and the column that it lacks.
    """
    for file in files:
        try:
            positions_in(file, reading)
        except UsageError as error:
            raise DataError(f"{file.display_name}: {error}") from None
    return files


def _hold_out(
    train: Corpus, reading: Reading, data: DataConfig, observer: Observer
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows to train on and the rows to validate on."""
    fraction = data.validation_fraction
    if reading.is_continuous:
        held = held_out_tail(train, fraction) if fraction else np.zeros(len(train), dtype=bool)
        how = f"the last {fraction:.0%} of {train.name}"
    else:
        held = held_out_rows(train, fraction)
        how = f"{held.sum():,} rows of {train.name} held out by a hash of their text"
        how += f", {fraction:.0%} of each class" * (reading.label is not None)
    if not held.any():
        how = "none: too little to hold any out, or none wanted (--validation FILE gives some)"
    observer.note(f"validation: {how}")
    return np.flatnonzero(~held), np.flatnonzero(held)


def warn_about_rows(sources: Sources, observer: Observer) -> None:
    """Warns of rejected, duplicate, leaked, rare and unseen rows."""
    train = sources.corpora["train"]
    for corpus in sources.corpora.values():
        used = f"{corpus.name}: {corpus.num_read:,} rows read, {len(corpus):,} used"
        if not corpus.rejected:
            observer.note(used)
            continue
        observer.warn(f"{used}, {len(corpus.rejected):,} rejected (first: {corpus.first_rejected})")
    duplicates = len(train) - len(np.unique(train.hashes))
    if duplicates:
        observer.warn(f"{train.name}: rows that repeat an earlier row's text: {duplicates:,}")
    rare = [name for name, count in train.class_counts().items() if count < _FEW_EXAMPLES]
    if rare:
        observer.warn(
            f"{train.name}: classes with fewer than {_FEW_EXAMPLES} examples: {len(rare)}, namely "
            f"{', '.join(rare[:5])}{' ...' if len(rare) > 5 else ''}"
        )
    for name, corpus in sources.corpora.items():
        if name == "train":
            continue
        shared = int(np.isin(corpus.hashes, train.hashes).sum())
        if shared:
            observer.warn(
                f"{corpus.name}: {shared:,} rows have the same text as a row of {train.name}"
            )
        unseen = sorted(set(corpus.class_counts()) - set(train.class_counts()))
        if unseen:
            observer.warn(
                f"{corpus.name}: labels never seen in training count as errors: "
                f"{', '.join(unseen[:5])}{' ...' if len(unseen) > 5 else ''}"
            )
