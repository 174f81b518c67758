"""The usable rows of files on disk, memory-mapped: texts, labels, and where each came from.

    RowFile --Reading, one pass--> text.bin     UTF-8 of all texts
                          bounds.npy   (R * k + 1,) int64: R rows of k texts each
                          labels.npy   (R,) int32 numbers into ``label_names``; -1 without label
                          lines.npy    (R,) int64 line of each row
                          hashes.npy   (R,) uint64 of each row's texts
                          groups.npy   (R,) uint64 of those that must not be held out apart
                          meta.json    names, counts, rejections

The file is parsed once; tokenizer, token store and baseline read from here, in bounded memory.
Every row read is either used or rejected with its line and reason.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hasten.core.errors import DataError
from hasten.data.cache import cached, content_key
from hasten.data.columns import CellError, label_of, resolve_columns
from hasten.data.rows import Cell, Rejected, RowFile

_FORMAT = 3


@dataclass(frozen=True)
class Reading:
    """Which cells of a row are read and how they become texts, as a task wants it.

    Attributes:
        task: the task's name.
        form: which of the task's ways of reading this is; part of the cache's key.
        columns: names or numbers of the columns that are read.
        label: name or number of the label column; None where there is none.
        read_row: the cells of ``columns`` -> the texts of a row, of the same number in every row;
            raises ``CellError`` with the reason why a row cannot be used.
        is_continuous: whether the rows are one text cut into pieces.
        group_texts: rows that agree in so many of their first texts, such as questions about one
            context, are held out together; 0 for all of them.
    """

    task: str
    form: str
    columns: tuple[str, ...]
    label: str | None
    read_row: Callable[[Sequence[Cell]], tuple[str, ...]]
    is_continuous: bool = False
    group_texts: int = 0


@dataclass(frozen=True)
class Corpus:
    """The used rows of one file, or of several read one after the other.

    Attributes:
        name: how messages call the file.
        key: hash of the content and of the columns read from it.
        columns: names of the columns that were read.
        num_texts: texts k of each row.
        label_column: name of the label column, or None.
        label_names: labels in order of first appearance.
        labels: (R,) int32 numbers into ``label_names``; -1 without label.
        lines: (R,) int64 line of each row in its file.
        hashes: (R,) uint64 hash of each row's texts.
        groups: (R,) uint64 hash of what rows that are held out together share.
        rejected: the rows not used.
        files: name of each file and the number of its first row.
        folder: where the arrays lie.
    """

    name: str
    key: str
    columns: tuple[str, ...]
    num_texts: int
    label_column: str | None
    label_names: tuple[str, ...]
    labels: np.ndarray
    lines: np.ndarray
    hashes: np.ndarray
    groups: np.ndarray
    rejected: tuple[Rejected, ...]
    files: tuple[tuple[str, int], ...]
    folder: Path

    def __len__(self) -> int:
        """Number of used rows R."""
        return len(self.lines)

    @property
    def num_read(self) -> int:
        """Rows read: used plus rejected."""
        return len(self) + len(self.rejected)

    def texts(self, rows: np.ndarray | None = None) -> Iterator[tuple[str, ...]]:
        """Yields the text cells of each row, or of the rows with the given numbers."""
        bounds = np.load(self.folder / "bounds.npy", mmap_mode="r")
        size, k = (self.folder / "text.bin").stat().st_size, self.num_texts
        blob = np.memmap(self.folder / "text.bin", mode="r") if size else np.empty(0, np.uint8)
        for row in range(len(self)) if rows is None else rows.tolist():
            cuts = bounds[row * k : row * k + k + 1].tolist()
            yield tuple(blob[a:b].tobytes().decode() for a, b in itertools.pairwise(cuts))

    @property
    def num_characters(self) -> int:
        """Bytes of text in all used rows, which for most scripts is near their characters."""
        return (self.folder / "text.bin").stat().st_size

    def num_bytes(self, rows: np.ndarray) -> np.ndarray:
        """Returns (rows, k), the bytes of each text of the given rows."""
        bounds = np.load(self.folder / "bounds.npy", mmap_mode="r")
        first = rows[:, None] * self.num_texts + np.arange(self.num_texts)
        return bounds[first + 1] - bounds[first]

    @property
    def first_rejected(self) -> str:
        """Where the first row that is not used stands, and why it is not."""
        entry = self.rejected[0]
        of_file = f"{entry.file} " if len(self.files) > 1 else ""
        return f"{of_file}line {entry.line}: {entry.reason}"

    def place(self, row: int) -> tuple[str, int]:
        """Returns where a row stands: its file and line."""
        name = next(name for name, first in reversed(self.files) if first <= row)
        return name, int(self.lines[row])

    def class_counts(self) -> dict[str, int]:
        """Returns the number of rows of each label, most frequent first."""
        counts = np.bincount(self.labels[self.labels >= 0], minlength=len(self.label_names))
        pairs = zip(self.label_names, counts.tolist(), strict=True)
        return dict(sorted(pairs, key=lambda pair: (-pair[1], pair[0])))


def open_corpus(files: Sequence[RowFile], reading: Reading) -> Corpus:
    """Returns the corpus of some files, from the cache where their content was seen before.

    Args:
        files: opened files, read one after the other.
        reading: which columns are read, and how.

    Raises:
        DataError: a file cannot be read to its end.
        UsageError: a file lacks a column.
    """
    indices = [positions_in(file, reading) for file in files]
    key = content_key(
        format=_FORMAT,
        reading=[reading.task, reading.form, reading.label is not None],
        files=[
            [
                file.fingerprint(),
                # The notes tell everything that was detected or asked for, the encoding too.
                [file.format, file.delimiter, file.has_header, *file.columns, *file.notes],
                list(found),
            ]
            for file, found in zip(files, indices, strict=True)
        ],
    )
    folder = cached("rows", key, lambda target: _build(files, indices, reading, target))
    return _load(folder, [file.display_name for file in files], key)


def positions_in(file: RowFile, reading: Reading) -> tuple[int, ...]:
    """Returns where the columns of a reading are in a file, that of labels last.

    Line-aligned files have no names for their two columns and take those of the reading in order.

    Raises:
        UsageError: a column that is not there.
    """
    if file.format == "aligned" and len(reading.columns) == 2 and reading.label is None:
        return (0, 1)
    labels = () if reading.label is None else (reading.label,)
    return resolve_columns(file.columns, (*reading.columns, *labels))


def check_rejected(corpus: Corpus, max_fraction: float) -> None:
    """Refuses a file of which too much would go unused.

    Raises:
        DataError: naming the share, the most frequent reason and the first line it occurs in.
    """
    if (
        corpus.num_read == 0
        or len(corpus) == 0
        or (len(corpus.rejected) > max_fraction * corpus.num_read)
    ):
        first = f" The first: {corpus.first_rejected}." if corpus.rejected else ""
        raise DataError(
            f"{corpus.name}: {len(corpus.rejected):,} of {corpus.num_read:,} rows cannot be used, "
            f"more than the {max_fraction:.0%} allowed (--data.max_rejected_fraction).{first}"
        )


def held_out_rows(corpus: Corpus, fraction: float) -> np.ndarray:
    """Chooses the same rows on every machine: the lowest hashes of each class.

    Args:
        corpus: rows, all with labels or all without.
        fraction: share of each class's texts, rounded; rows of equal text stay together, and a
            text under several labels counts for the rarest of them.

    Returns:
        (R,) bool, True where the row is held out. A class keeps at least one row to train on.
    """
    labels, names = np.maximum(corpus.labels, 0), corpus.label_names or ("",)
    counts = np.bincount(labels, minlength=len(names))
    rank = np.empty(len(names), dtype=np.int64)
    rank[sorted(range(len(names)), key=lambda i: (counts[i], names[i]))] = range(len(names))
    hashes, text_of_row = np.unique(corpus.groups, return_inverse=True)
    stratum = np.full(len(hashes), len(names))
    np.minimum.at(stratum, text_of_row, rank[labels])
    held = np.zeros(len(hashes), dtype=bool)
    by_stratum = np.argsort(stratum, kind="stable")  # within one, the lowest hashes come first
    bounds = np.searchsorted(stratum[by_stratum], np.arange(len(names) + 1))
    for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        wanted = min(round(fraction * (end - start)), end - start - 1)
        held[by_stratum[start : start + max(wanted, 0)]] = True
    kept = np.bincount(labels[~held[text_of_row]], minlength=len(names))
    for label in np.flatnonzero(kept == 0):  # all its texts are shared with rarer classes
        held[text_of_row[labels == label]] = False
    return held[text_of_row]


def held_out_tail(corpus: Corpus, fraction: float) -> np.ndarray:
    """Holds out the end of one continuous text.

    Returns:
        (R,) bool, True for the last rows, about ``fraction`` of the text's bytes; at least one
        row is left to train on.
    """
    size = corpus.num_bytes(np.arange(len(corpus))).sum(1)
    before = np.cumsum(size) - size
    held = before >= (1 - fraction) * size.sum()
    held[0] = False
    return held


def _build(
    files: Sequence[RowFile], indices: list[tuple[int, ...]], reading: Reading, folder: Path
) -> None:
    """Parses the files once and writes the arrays; see the module's picture."""
    num_columns = len(reading.columns)
    bounds, labels, lines, hashes = array("q", [0]), array("i"), array("q"), array("Q")
    groups = array("Q")
    label_ids: dict[str, int] = {}
    rejected: list[tuple[int, int, str]] = []
    firsts: list[int] = []
    with (folder / "text.bin").open("wb") as blob:
        for number, (file, at) in enumerate(zip(files, indices, strict=True)):
            firsts.append(len(lines))
            for row in file:
                if isinstance(row, Rejected):
                    rejected.append((number, row.line, row.reason))
                    continue
                try:
                    cells = [row.cells[i] for i in at]
                    texts = [text.encode() for text in reading.read_row(cells[:num_columns])]
                    label = None if reading.label is None else label_of(cells[-1])
                except UnicodeEncodeError:
                    reason = "the text holds half of a surrogate pair"
                    rejected.append((number, row.line, reason))
                    continue
                except CellError as error:
                    rejected.append((number, row.line, str(error)))
                    continue
                bounds.extend(itertools.accumulate(map(blob.write, texts), initial=bounds.pop()))
                labels.append(-1 if label is None else label_ids.setdefault(label, len(label_ids)))
                lines.append(row.line)
                hashes.append(_hash(texts))
                groups.append(_hash(texts[: reading.group_texts or len(texts)]))
    for name, values, dtype in (
        ("bounds", bounds, np.int64),
        ("labels", labels, np.int32),
        ("lines", lines, np.int64),
        ("hashes", hashes, np.uint64),
        ("groups", groups, np.uint64),
    ):
        np.save(folder / f"{name}.npy", np.frombuffer(values, dtype=dtype))
    named = [files[0].columns[i] for i in indices[0]]
    meta: dict[str, Any] = {
        "columns": named[:num_columns],
        "num_texts": (len(bounds) - 1) // max(1, len(lines)),
        "label_column": None if reading.label is None else named[-1],
        "label_names": list(label_ids),
        "rejected": rejected,
        "firsts": firsts,
    }
    (folder / "meta.json").write_text(json.dumps(meta, ensure_ascii=False), encoding="utf-8")


def _hash(texts: Sequence[bytes]) -> int:
    digest = hashlib.blake2b(b"".join(text + b"\x00" for text in texts), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


def _load(folder: Path, names: list[str], key: str) -> Corpus:
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return Corpus(
        name=names[0] + more,
        key=key,
        columns=tuple(meta["columns"]),
        num_texts=meta["num_texts"],
        label_column=meta["label_column"],
        label_names=tuple(meta["label_names"]),
        labels=np.load(folder / "labels.npy", mmap_mode="r"),
        lines=np.load(folder / "lines.npy", mmap_mode="r"),
        hashes=np.load(folder / "hashes.npy", mmap_mode="r"),
        groups=np.load(folder / "groups.npy", mmap_mode="r"),
        rejected=tuple(Rejected(names[i], line, reason) for i, line, reason in meta["rejected"]),
        files=tuple(zip(names, meta["firsts"], strict=True)),
        folder=folder,
    )
