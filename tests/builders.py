"""Small models, packed batches and data files that many tests need."""

from __future__ import annotations

import csv
import random
from collections import ChainMap
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from hasten.core.batch import PackedBatch, SequenceLayout, positions_from_lengths
from hasten.data.corpus import Corpus, open_corpus
from hasten.data.rows import RowFile
from hasten.model.transformer import Transformer
from hasten.task.text_classification import TextClassification

VOCAB = 40


@contextmanager
def default_dtype(dtype: torch.dtype):
    """Builds modules of the given type inside a ``with`` block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def small_model(seed: int = 0, **options: Any) -> Transformer:
    """A two-layer model in evaluation mode whose branches all matter."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "num_layers": 2,
        "hidden_size": 32,
        "num_heads": 4,
        "dropout": 0.0,
        "num_labels": 3,
        "max_positions": 700,
        "initializer_std": 0.3,
        **options,
    }
    model = Transformer(**settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # norms and biases away from ones and zeros
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif model.config.zero_init_residual and not parameter.any():
                raise AssertionError(f"{name} is zero and hides its branch")
        for name, buffer in model.named_buffers():
            if name == "head.bias":
                buffer.normal_()
    return model.eval()


def merged(*parts: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    """Draws options from each part; of equal names the last counts."""
    return st.tuples(*parts).map(lambda found: dict(ChainMap(*reversed(found))))


def random_sequences(lengths: Sequence[int], seed: int = 0) -> list[Tensor]:
    """One tensor of token ids for each length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCAB, (n,), generator=generator) for n in lengths]


def pack(
    sequences: Sequence[Tensor],
    types: Sequence[Tensor] | None = None,
    targets: Sequence[int] | None = None,
    weight: float = 1.0,
    sources: Sequence[Tensor] | None = None,
) -> PackedBatch:
    """Lays sequences end to end, and beside them those that an encoder-decoder reads."""
    lengths = [len(s) for s in sequences]
    return PackedBatch(
        token_ids=torch.cat(list(sequences)),
        positions=torch.from_numpy(positions_from_lengths(lengths)),
        layout=SequenceLayout.from_lengths(lengths),
        example_ids=torch.arange(len(lengths)),
        token_types=None if types is None else torch.cat(list(types)),
        source=None if sources is None else pack(sources),
        targets=None if targets is None else torch.tensor(list(targets)),
        weight=weight,
    )


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """Copies of all gradients, zeros where there is none; clears them."""
    found = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }
    model.zero_grad(set_to_none=True)
    return found


WORDS = {
    "fruit": ["apple", "pear", "plum", "cherry", "grape", "melon", "fig", "lemon"],
    "tool": ["hammer", "saw", "drill", "wrench", "plane", "chisel", "file", "vice"],
    "bird": ["heron", "robin", "finch", "wren", "eagle", "swift", "crow", "owl"],
}
COMMON = [
    "the",
    "a",
    "one",
    "was",
    "is",
    "very",
    "old",
    "new",
    "big",
    "small",
    "and",
    "with",
    "near",
    "red",
    "two",
]


def write_rows(path: Path, rows: Sequence[Sequence[str]], header: Sequence[str]) -> Path:
    """Writes a CSV file."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
    return path


def labelled_rows(
    count: int, seed: int = 0, labels: Sequence[str] = ("fruit", "tool", "bird"), noise: float = 0.0
) -> list[tuple[str, str]]:
    """Rows of text and label that a model can learn: each text names a thing of its kind."""
    draw = random.Random(seed)
    kinds = list(WORDS)
    rows = []
    for i in range(count):
        kind = i % len(labels)
        words = [draw.choice(COMMON) for _ in range(draw.randint(3, 20))]
        words.insert(draw.randrange(len(words)), draw.choice(WORDS[kinds[kind % len(kinds)]]))
        label = draw.choice(list(labels)) if draw.random() < noise else labels[kind]
        rows.append((" ".join(words), label))
    return rows


def write_labelled(path: Path, count: int, seed: int = 0, **options: Any) -> Path:
    """Writes ``labelled_rows`` as a CSV file with the columns text and label."""
    return write_rows(path, labelled_rows(count, seed, **options), ("text", "label"))


def corpus_of(
    *files: RowFile, text: Sequence[str] = ("text",), label: str | None = "label"
) -> Corpus:
    """The usable rows of files, read as text classification reads them."""
    return open_corpus(files, TextClassification.reading_of("text", text, label))


TINY: dict[str, Any] = {
    "model.num_layers": 2,
    "model.hidden_size": 32,
    "model.num_heads": 2,
    "model.pooling": "mean",
    "optim.schedule": "linear",
    "train.num_threads": 1,
    # What is measured may come out otherwise in the next run.
    "train.precision": "float32",
    "train.matrix_library": "default",
    "eval.baseline": False,
}
"""Settings of a run that takes about a second; each test adds what it is about."""


class Recorder:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self.steps: list[Any] = []
        self.evaluations: list[Any] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def step(self, info: Any) -> None:
        self.steps.append(info)

    def evaluation(self, info: Any) -> None:
        self.evaluations.append(info)


STILL = {
    "data.augment": "none",
    "model.dropout": 0.0,
    "model.token_dropout": 0.0,
    "model.head_dropout": 0.0,
}
"""No dropout anywhere."""
