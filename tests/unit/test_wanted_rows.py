"""Where a head looks at one token of each sequence, the last block computes no others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from builders import default_dtype, small_model
from hasten.core.batch import PackedBatch, pack_padded
from hasten.model.transformer import Transformer

LENGTHS = (7, 1, 4, 12, 4)
LEARNED = {"positions": "learned", "norm_placement": "post", "head_activation": "tanh"}
WINDOW = {"sliding_window": 3, "local_rotary_base": 50.0, "global_layers": (1,)}
DECODER = {"architecture": "decoder", "pooling": "last", "norm": "rmsnorm", "bias": False}
CASES: dict[str, dict[str, Any]] = {
    "learned": LEARNED,
    "rotary": {"pooling": "first"},
    "last of an encoder": {"pooling": "last", "num_kv_heads": 2},
    "window below": {"pooling": "first", **WINDOW, "first_norm": False, "embedding_norm": True},
    "sandwich": {"pooling": "first", "norm_placement": "sandwich", "attention_softcap": 5.0},
    "decoder": {**DECODER, "qk_norm": True},
    "decoder, window below": {**DECODER, **WINDOW, "activation": "swiglu"},
}
ALL_ROWS: dict[str, dict[str, Any]] = {
    "window above": {"pooling": "first", "sliding_window": 3},
    "relative": {"pooling": "first", "positions": "relative"},
    "mean": {"pooling": "mean"},
    "attention": {"pooling": "attention"},
}


def ragged() -> PackedBatch:
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    ids = torch.randint(1, 40, mask.shape, generator=torch.Generator().manual_seed(1))
    return pack_padded(ids, mask)


def whole(model: Transformer, batch: PackedBatch) -> Tensor:
    """Scores from hidden states of all tokens."""
    stack = model.decoder or model.encoder
    assert stack is not None
    scores = model.score(stack(model.embed(batch), batch), batch.layout)
    assert isinstance(scores, Tensor)
    return scores


def gradients(model: Transformer, scores: Tensor) -> dict[str, Tensor]:
    weights = torch.linspace(-1, 1, scores.numel(), dtype=scores.dtype).view_as(scores)
    named = dict(model.named_parameters())
    found = torch.autograd.grad((scores * weights).sum(), list(named.values()))
    return dict(zip(named, found, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_scores_and_gradients_are_those_of_all_rows(name: str):
    with default_dtype(torch.float64):
        model, batch = small_model(**{"pooling": "first", **CASES[name]}), ragged()
        rows: list[int] = []
        last = (model.decoder or model.encoder).blocks[-1].feed_forward
        last.register_forward_hook(lambda module, given, out: rows.append(len(out)))
        few, all_of_them = model(batch), whole(model, batch)
        assert rows == [len(LENGTHS), sum(LENGTHS)]
        torch.testing.assert_close(few, all_of_them, rtol=1e-11, atol=1e-12)
        ours, expected = gradients(model, few), gradients(model, all_of_them)
        for parameter, gradient in expected.items():
            torch.testing.assert_close(ours[parameter], gradient, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ALL_ROWS)
def test_all_rows_are_computed_where_they_are_needed(name: str):
    model, batch = small_model(**ALL_ROWS[name]), ragged()
    rows: list[int] = []
    last = model.encoder.blocks[-1].feed_forward
    last.register_forward_hook(lambda module, given, out: rows.append(len(out)))
    scores = model(batch)
    assert rows == [sum(LENGTHS)] and torch.equal(scores, whole(model, batch))


def test_recomputing_changes_nothing():
    model, batch = small_model(pooling="first", **WINDOW), ragged()
    model.train()
    plain = gradients(model, model(batch))
    model.encoder.recompute = True
    again = gradients(model, model(batch))
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient)
