"""A file's usable rows on disk, memory-mapped: texts, labels, and where each came from.

    RowFile --one pass--> text.bin     UTF-8 of all text cells
                          bounds.npy   (R * k + 1,) int64: R rows of k text columns each
                          labels.npy   (R,) int32 numbers into ``label_names``; -1 without label
                          lines.npy    (R,) int64 line of each row
                          hashes.npy   (R,) uint64 of each row's text
                          meta.json    names, counts, rejections

The file is parsed once; tokenizer, token store and baseline read from here, in bounded memory.
Every row read is either used or rejected with its line and reason.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hasten.core.errors import DataError
from hasten.data.cache import cached, content_key
from hasten.data.columns import CellError, label_of, resolve_columns, texts_of
from hasten.data.rows import Rejected, RowFile

_FORMAT = 1


@dataclass(frozen=True)
class Corpus:
    """The used rows of one file.

    Attributes:
        name: how messages call the file.
        key: hash of the content and of the columns read from it.
        text_columns: names of the k text columns.
        label_column: name of the label column, or None.
        label_names: labels in order of first appearance.
        labels: (R,) int32 numbers into ``label_names``.
        lines: (R,) int64 line of each row in the file.
        hashes: (R,) uint64 hash of each row's text.
        rejected: the rows not used.
        folder: where the arrays lie.
    """

    name: str
    key: str
    text_columns: tuple[str, ...]
    label_column: str | None
    label_names: tuple[str, ...]
    labels: np.ndarray
    lines: np.ndarray
    hashes: np.ndarray
    rejected: tuple[Rejected, ...]
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
        size, k = (self.folder / "text.bin").stat().st_size, len(self.text_columns)
        blob = np.memmap(self.folder / "text.bin", mode="r") if size else np.empty(0, np.uint8)
        for row in range(len(self)) if rows is None else rows.tolist():
            cuts = bounds[row * k : row * k + k + 1].tolist()
            yield tuple(blob[a:b].tobytes().decode() for a, b in itertools.pairwise(cuts))

    @property
    def num_characters(self) -> int:
        """Bytes of text in all used rows, which for most scripts is near their characters."""
        return (self.folder / "text.bin").stat().st_size

    def class_counts(self) -> dict[str, int]:
        """Returns the number of rows of each label, most frequent first."""
        counts = np.bincount(self.labels[self.labels >= 0], minlength=len(self.label_names))
        pairs = zip(self.label_names, counts.tolist(), strict=True)
        return dict(sorted(pairs, key=lambda pair: (-pair[1], pair[0])))


def open_corpus(file: RowFile, text_columns: tuple[str, ...], label_column: str | None) -> Corpus:
    """Returns the corpus of a file, from the cache where its content was seen before.

    Args:
        file: an opened file.
        text_columns: names or numbers of the text columns.
        label_column: name or number of the label column; None where there is none.

    Raises:
        DataError: the file cannot be read to its end.
    """
    wanted = (*text_columns, *(() if label_column is None else (label_column,)))
    indices = resolve_columns(file.columns, wanted)
    key = content_key(
        format=_FORMAT,
        content=file.fingerprint(),
        # The notes tell everything that was detected or asked for, the encoding among it.
        reading=[file.format, file.delimiter, file.has_header, *file.columns, *file.notes],
        columns=list(indices),
        labelled=label_column is not None,
    )
    folder = cached("rows", key, lambda target: _build(file, indices, label_column, target))
    return _load(folder, file.display_name, key)


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
        first = f" The first: line {corpus.rejected[0].line}: {corpus.rejected[0].reason}." * bool(
            corpus.rejected
        )
        raise DataError(
            f"{corpus.name}: {len(corpus.rejected):,} of {corpus.num_read:,} rows cannot be used, "
            f"more than the {max_fraction:.0%} allowed (--data.max_rejected_fraction).{first}"
        )


def held_out_rows(corpus: Corpus, fraction: float) -> np.ndarray:
    """Chooses the same rows on every machine: the lowest hashes of each class.

    Args:
        corpus: labelled rows.
        fraction: share of each class's texts, rounded; rows of equal text stay together, and a
            text under several labels counts for the rarest of them.

    Returns:
        (R,) bool, True where the row is held out. A class keeps at least one row to train on.
    """
    labels, names = np.asarray(corpus.labels), corpus.label_names
    counts = np.bincount(labels, minlength=len(names))
    rank = np.empty(len(names), dtype=np.int64)
    rank[sorted(range(len(names)), key=lambda i: (counts[i], names[i]))] = range(len(names))
    hashes, text_of_row = np.unique(corpus.hashes, return_inverse=True)
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


def _build(file: RowFile, indices: tuple[int, ...], label_column: str | None, folder: Path) -> None:
    """Parses the file once and writes the arrays; see the module's picture."""
    text_indices = indices if label_column is None else indices[:-1]
    bounds, labels, lines, hashes = array("q", [0]), array("i"), array("q"), array("Q")
    label_ids: dict[str, int] = {}
    rejected: list[tuple[int, str]] = []
    with (folder / "text.bin").open("wb") as blob:
        for row in file:
            if isinstance(row, Rejected):
                rejected.append((row.line, row.reason))
                continue
            try:
                cells = [text.encode() for text in texts_of(row.cells, text_indices)]
                label = None if label_column is None else label_of(row.cells[indices[-1]])
            except UnicodeEncodeError:
                rejected.append((row.line, "the text holds half of a surrogate pair"))
                continue
            except CellError as error:
                rejected.append((row.line, str(error)))
                continue
            digest = hashlib.blake2b(digest_size=8)
            for cell in cells:
                digest.update(cell + b"\x00")
                bounds.append(bounds[-1] + blob.write(cell))
            labels.append(-1 if label is None else label_ids.setdefault(label, len(label_ids)))
            lines.append(row.line)
            hashes.append(int.from_bytes(digest.digest(), "little"))
    for name, values, dtype in (
        ("bounds", bounds, np.int64),
        ("labels", labels, np.int32),
        ("lines", lines, np.int64),
        ("hashes", hashes, np.uint64),
    ):
        np.save(folder / f"{name}.npy", np.frombuffer(values, dtype=dtype))
    meta: dict[str, Any] = {
        "text_columns": [file.columns[i] for i in text_indices],
        "label_column": None if label_column is None else file.columns[indices[-1]],
        "label_names": list(label_ids),
        "rejected": rejected,
    }
    (folder / "meta.json").write_text(json.dumps(meta, ensure_ascii=False), encoding="utf-8")


def _load(folder: Path, name: str, key: str) -> Corpus:
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    return Corpus(
        name=name,
        key=key,
        text_columns=tuple(meta["text_columns"]),
        label_column=meta["label_column"],
        label_names=tuple(meta["label_names"]),
        labels=np.load(folder / "labels.npy", mmap_mode="r"),
        lines=np.load(folder / "lines.npy", mmap_mode="r"),
        hashes=np.load(folder / "hashes.npy", mmap_mode="r"),
        rejected=tuple(Rejected(name, line, reason) for line, reason in meta["rejected"]),
        folder=folder,
    )
