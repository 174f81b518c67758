"""Models as ONNX: other runtimes give the same scores, or nothing is written."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from builders import VOCAB, pack, random_sequences, small_model
from hasten.model.heads import TokenOutputs
from hasten.model.transformer import Transformer
from hasten.training.export_onnx import MismatchError, _check, export_onnx, input_names

onnxruntime = pytest.importorskip("onnxruntime")

MODELS: dict[str, dict[str, Any]] = {
    "classification": {"pooling": "attention", "positions": "learned", "position_offset": 2,
                       "num_token_types": 2, "norm_placement": "post"},
    "span": {"head": "span", "num_layers": 2, "sliding_window": 4, "global_layers": (0,),
             "norm": "rmsnorm"},
    "generation": {"architecture": "decoder", "head": "language_modelling", "num_kv_heads": 2,
                   "qk_norm": True, "attention_softcap": 3.0, "sliding_window": 3,
                   "logit_softcap": 2.0},
    "translation": {"architecture": "encoder_decoder", "head": "language_modelling",
                    "positions": "relative", "relative_buckets": 8, "attention_scale": 1.0,
                    "source_vocab_size": VOCAB + 3},
}  # fmt: skip


def saved(model: Transformer) -> Any:
    """What an exporter looks at besides the model."""
    task = SimpleNamespace(name="text-classification", to_json=lambda: {"id2label": {"0": "a"}})
    return SimpleNamespace(model=model, task=task)


@pytest.fixture(scope="module", params=MODELS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("onnx")
    model = small_model(**{"num_layers": 1, **MODELS[request.param]})
    checked = export_onnx(saved(model), folder)
    return SimpleNamespace(folder=folder, model=model, checked=checked)


def padded(rows: list[torch.Tensor], width: int, filler: int) -> tuple[np.ndarray, np.ndarray]:
    ids = np.full((len(rows), width), filler)
    mask = np.zeros((len(rows), width), dtype=np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    return ids, mask


def test_the_runtime_gives_the_same_scores(exported: Any):
    model, has_source = exported.model, exported.model.config.architecture == "encoder_decoder"
    rows, types = random_sequences([9, 2, 30], seed=8), None
    sources = random_sequences([4, 11, 1], seed=9) if has_source else None
    ids, mask = padded(rows, 33, VOCAB - 1)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if sources is not None:
        source_ids, source_mask = padded(sources, 11, VOCAB - 1)
        inputs = {"input_ids": source_ids, "attention_mask": source_mask,
                  "decoder_input_ids": ids, "decoder_attention_mask": mask}  # fmt: skip
    if model.config.num_token_types:
        types = [row % 2 for row in rows]
        inputs["token_type_ids"] = padded(types, 33, 0)[0]
    session = onnxruntime.InferenceSession(exported.folder / "model.onnx")
    found = session.run(None, inputs)
    found = np.stack(found, -1) if model.config.head == "span" else found[0]
    with torch.inference_mode():
        scores = model(pack(rows, types, sources=sources))
        expected = (scores.scores() if isinstance(scores, TokenOutputs) else scores).numpy()
    rows_of = found if found.ndim == 2 else found[mask.astype(bool)]
    np.testing.assert_allclose(rows_of, expected, rtol=0, atol=1e-4 * abs(expected).max())
    assert exported.checked.relative_error < 1e-4


def test_what_is_described_is_what_the_file_takes(exported: Any):
    described = json.loads((exported.folder / "inputs.json").read_text())
    session = onnxruntime.InferenceSession(exported.folder / "model.onnx")
    found = [(entry.name, entry.shape) for entry in session.get_inputs()]
    assert found == [(entry["name"], entry["axes"]) for entry in described["inputs"]]
    assert tuple(name for name, _ in found) == input_names(exported.model.config)
    outputs = [entry.name for entry in session.get_outputs()]
    assert outputs == [entry["name"] for entry in described["outputs"]]
    assert described["id2label"] == {"0": "a"}
    assert {path.name for path in exported.folder.iterdir()} == {"model.onnx", "inputs.json"}


def test_another_model_than_the_exported_one_is_noticed(exported: Any):
    model = exported.model
    other = small_model(seed=1, **vars(model.config))
    with pytest.raises(MismatchError, match="differ by"):
        _check(other, input_names(other.config), exported.folder / "model.onnx")
