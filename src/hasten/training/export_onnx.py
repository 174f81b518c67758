"""A trained model as ONNX, checked against the runtime before it is kept.

    Transformer --DenseTransformer, torch.export--> model.onnx --onnxruntime--> scores
                '--packed------------------------------------------------------> the same scores

    folder/  model.onnx  inputs.json  tokenizer.json ...

Inputs are called as the field calls them. inputs.json says what they are, in a form that a program
can read. Batch and lengths are free; padding follows the tokens. Of a decoder there are the scores
of all tokens and no cache.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hasten.core.batch import PackedBatch, SequenceLayout, positions_from_lengths
from hasten.core.errors import HastenError, MachineError
from hasten.model.config import TransformerConfig
from hasten.model.dense import DenseTransformer
from hasten.model.heads import TokenOutputs
from hasten.model.transformer import Transformer
from hasten.training.saved import SavedModel

MODEL_FILE, INPUTS_FILE = "model.onnx", "inputs.json"
_TOLERANCE = 1e-4
_OPSET = 18
_NEEDED = ("onnx", "onnxruntime", "onnxscript")
# From here on weights lie in a file of their own: one of ONNX ends at 2 GiB.
_LARGE_BYTES = 1_500_000_000
# Lengths of sequences (and of sources) in the batches that are compared; one is a batch of one.
_CHECKED = (((1,), (3,)), ((3, 1, 7, 2), (1, 5, 2, 4)), ((40, 40), (33, 60)))


@dataclass(frozen=True)
class Checked:
    """How far the runtime's scores are from ours.

    Attributes:
        relative_error: largest difference over the largest score.
        num_batches: that were compared.
    """

    relative_error: float
    num_batches: int


class MismatchError(HastenError):
    """The runtime computes something else than the model that was exported."""


class _Named(nn.Module):
    """Takes inputs by position, which gives them their names in the file."""

    def __init__(self, model: Transformer, names: Sequence[str]) -> None:
        super().__init__()
        has_source = model.config.architecture == "encoder_decoder"
        own = _OF_TRANSLATORS if has_source else _OF_STACKS
        self.dense, self.names = DenseTransformer(model), [own[name] for name in names]
        self.is_span = model.config.head == "span"

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Returns scores; of spans those of beginnings and those of ends."""
        scores = self.dense(**dict(zip(self.names, inputs, strict=True)))
        return (scores[..., 0], scores[..., 1]) if self.is_span else scores


def export_onnx(saved: SavedModel, folder: Path) -> Checked:
    """Writes model.onnx and inputs.json into a folder that exists.

    Raises:
        MachineError: an extra is missing.
        MismatchError: the runtime computes something else.
    """
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise MachineError(f"ONNX needs {', '.join(missing)}: pip install 'hasten[export]'")
    model = saved.model.cpu().float().eval()
    names = input_names(model.config)
    _write(model, names, folder / MODEL_FILE)
    checked = _check(model, names, folder / MODEL_FILE)
    text = json.dumps(_describe(saved, names, checked), ensure_ascii=False, indent=2)
    (folder / INPUTS_FILE).write_text(text + "\n", encoding="utf-8")
    return checked


def input_names(config: TransformerConfig) -> tuple[str, ...]:
    """Returns the inputs of a model's file, in their order."""
    if config.architecture == "encoder_decoder":
        return ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask")
    types = ("token_type_ids",) if config.num_token_types else ()
    return ("input_ids", "attention_mask", *types)


def output_names(config: TransformerConfig) -> tuple[str, ...]:
    """Returns the outputs of a model's file."""
    return ("start_logits", "end_logits") if config.head == "span" else ("logits",)


def _write(model: Transformer, names: tuple[str, ...], path: Path) -> None:
    config = model.config
    lengths, of_sources = (5, 3), (4, 6)
    inputs = _inputs(config, names, *_sequences(config, lengths, of_sources, seed=0))
    shapes = tuple({0: "batch", 1: _length_axis(config, name)} for name in names)
    num_bytes = sum(tensor.nbytes for tensor in model.state_dict().values())
    with _silence(), torch.inference_mode():
        program = torch.onnx.export(
            _Named(model, names).eval(),
            tuple(inputs[name] for name in names),
            input_names=names,
            output_names=output_names(config),
            dynamic_shapes=(shapes,),
            opset_version=_OPSET,
            dynamo=True,
            verbose=False,
        )
        assert program is not None
        program.save(path, external_data=num_bytes > _LARGE_BYTES)


def _check(model: Transformer, names: tuple[str, ...], path: Path) -> Checked:
    """Compares ragged batches, padded there and packed here."""
    import onnxruntime

    config, worst = model.config, 0.0
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    for seed, (lengths, of_sources) in enumerate(_CHECKED):
        lengths = [min(n, config.max_positions) for n in lengths]
        of_sources = [min(n, config.max_positions) for n in of_sources]
        sequences, sources = _sequences(config, lengths, of_sources, seed + 1)
        inputs = _inputs(config, names, sequences, sources)
        given = {name: tensor.numpy() for name, tensor in inputs.items()}
        outputs = [np.asarray(output) for output in session.run(None, given)]
        found = np.stack(outputs, -1) if config.head == "span" else outputs[0]
        with torch.inference_mode():
            scores = model(_packed(config, sequences, sources))
            scores = scores.scores() if isinstance(scores, TokenOutputs) else scores
        expected = scores.numpy()
        if found.ndim == 3:
            found = np.concatenate([row[:n] for row, n in zip(found, lengths, strict=True)])
        if found.shape != expected.shape or not np.isfinite(found).all():
            raise MismatchError(f"{path.name}: scores of another shape, or no numbers.")
        worst = max(worst, float(abs(found - expected).max() / max(abs(expected).max(), 1e-6)))
    if not worst <= _TOLERANCE:
        raise MismatchError(
            f"{path.name}: onnxruntime's scores differ by {worst:.1e} of the largest, more than "
            f"{_TOLERANCE}; nothing is written."
        )
    return Checked(worst, len(_CHECKED))


def _describe(saved: SavedModel, names: tuple[str, ...], checked: Checked) -> dict[str, Any]:
    config, task = saved.model.config, saved.task
    labels = task.to_json().get("id2label")
    last = {"classification": ["num_labels"], "language_modelling": ["length", "vocab_size"]}
    target = "target_length" if config.architecture == "encoder_decoder" else "length"
    axes = [target if name == "length" else name for name in last.get(config.head, ["length"])]
    return {
        "task": task.name,
        "file": MODEL_FILE,
        "inputs": [
            {
                "name": name,
                "dtype": "int64",
                "axes": ["batch", _length_axis(config, name)],
                "meaning": _MEANINGS[name],
            }
            for name in names
        ],
        "outputs": [
            {"name": name, "dtype": "float32", "axes": ["batch", *axes]}
            for name in output_names(config)
        ],
        "max_length": config.max_positions,
        "padding_side": "right",
        **({} if labels is None else {"id2label": labels}),
        "checked": {
            "with": "onnxruntime",
            "batches": checked.num_batches,
            "relative_error": checked.relative_error,
        },
    }


def _length_axis(config: TransformerConfig, name: str) -> str:
    if config.architecture != "encoder_decoder":
        return "length"
    return "target_length" if name.startswith("decoder_") else "source_length"


def _sequences(
    config: TransformerConfig, lengths: Sequence[int], of_sources: Sequence[int], seed: int
) -> tuple[list[Tensor], list[Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    size = config.vocab_size, config.source_vocab_size or config.vocab_size
    own, of_source = (
        [torch.randint(number, (n,), generator=draw) for n in wanted]
        for number, wanted in zip(size, (lengths, of_sources), strict=True)
    )
    return own, of_source


def _inputs(
    config: TransformerConfig,
    names: Sequence[str],
    sequences: Sequence[Tensor],
    sources: Sequence[Tensor],
) -> dict[str, Tensor]:
    """Returns padded ids with their masks, by name."""
    has_source = config.architecture == "encoder_decoder"
    found: dict[str, Tensor] = {}
    for name in names:
        is_own = name.startswith("decoder_") or not has_source
        rows = sequences if is_own else sources
        if name.endswith("attention_mask"):
            rows = [torch.ones_like(row) for row in rows]
        elif name == "token_type_ids":
            rows = [_types(row, config) for row in rows]
        found[name] = nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    return found


def _packed(
    config: TransformerConfig, sequences: Sequence[Tensor], sources: Sequence[Tensor]
) -> PackedBatch:
    source = None
    if config.architecture == "encoder_decoder":
        source = _packed_stream(sources)
    types = [_types(row, config) for row in sequences] if config.num_token_types else None
    return _packed_stream(sequences, types, source)


def _packed_stream(
    sequences: Sequence[Tensor],
    types: Sequence[Tensor] | None = None,
    source: PackedBatch | None = None,
) -> PackedBatch:
    lengths = [len(row) for row in sequences]
    return PackedBatch(
        token_ids=torch.cat(list(sequences)),
        positions=torch.from_numpy(positions_from_lengths(lengths)),
        layout=SequenceLayout.from_lengths(lengths),
        example_ids=torch.arange(len(lengths)),
        token_types=None if types is None else torch.cat(list(types)),
        source=source,
    )


def _types(row: Tensor, config: TransformerConfig) -> Tensor:
    return row % config.num_token_types


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keeps what exporters say of themselves from a person, who can do nothing about it."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


# What inputs are called in a file, and in DenseTransformer.
_OF_STACKS = {
    "input_ids": "token_ids",
    "attention_mask": "mask",
    "token_type_ids": "token_types",
}
_OF_TRANSLATORS = {
    "input_ids": "source_ids",
    "attention_mask": "source_mask",
    "decoder_input_ids": "token_ids",
    "decoder_attention_mask": "mask",
}
_MEANINGS = {
    "input_ids": "numbers of the tokens; any at padding",
    "attention_mask": "1 at tokens, 0 at padding, which follows them",
    "token_type_ids": "number of the segment that a token is in",
    "decoder_input_ids": "numbers of the target's tokens so far; any at padding",
    "decoder_attention_mask": "1 at tokens of the target, 0 at padding, which follows them",
}
