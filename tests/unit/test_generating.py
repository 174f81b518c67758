"""What the tasks that generate share: the loss of tokens, its meter, and decoding in portions."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from builders import VOCAB, default_dtype, pack, random_sequences, small_model
from hasten.core.batch import PackedBatch
from hasten.data.packing import IGNORED
from hasten.data.tokens import EncodedText
from hasten.model.heads import TokenOutputs
from hasten.model.search import DecodingSettings
from hasten.model.transformer import Transformer
from hasten.task import generating
from hasten.task.contract import Machine
from hasten.task.generating import (
    OutputRules,
    TokenMeter,
    decode_sequences,
    spread,
    token_loss_sum,
)

CPU = Machine(torch.device("cpu"))
# A token of the vocabulary, or none that is learned.
TARGETS = st.lists(st.integers(-1, VOCAB - 1), min_size=1, max_size=12)


def outputs_of(num_tokens: int, seed: int, softcap: float = 0.0) -> TokenOutputs:
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = (
        torch.randn(n, 8, generator=generator, dtype=torch.float64) for n in (num_tokens, VOCAB)
    )
    return TokenOutputs(hidden, weight, softcap)


def batch_with(targets: list[int]) -> PackedBatch:
    wanted = [IGNORED if target < 0 else target for target in targets]
    return pack(random_sequences([len(targets)]), targets=wanted)


def reference(outputs: TokenOutputs, targets: list[int], smoothing: float = 0.0) -> Tensor:
    wanted = torch.tensor([-100 if target < 0 else target for target in targets])
    return F.cross_entropy(
        outputs.scores(), wanted, ignore_index=-100, reduction="sum", label_smoothing=smoothing
    )


# Loss and meter


@given(TARGETS, st.sampled_from([0.0, 0.1]), st.sampled_from([0.0, 2.0]), st.integers(0, 99))
def test_the_loss_is_torchs_over_the_learned_tokens(targets, smoothing, softcap, seed):
    outputs, wanted = outputs_of(len(targets), seed, softcap), outputs_of(len(targets), seed)
    wanted = wanted._replace(softcap=softcap)
    for one in (outputs, wanted):
        one.hidden_ND.requires_grad_()
        one.weight_VD.requires_grad_()
    loss = token_loss_sum(outputs, batch_with(targets), smoothing)
    expected = reference(wanted, targets, smoothing)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    loss.backward()
    expected.backward()
    for found, right in zip(outputs[:2], wanted[:2], strict=True):
        torch.testing.assert_close(found.grad, right.grad, rtol=1e-10, atol=1e-12)
    ignored = torch.tensor(targets) < 0
    assert outputs.hidden_ND.grad is not None
    assert not outputs.hidden_ND.grad[ignored].any()


@given(st.lists(TARGETS, min_size=1, max_size=4), st.integers(0, 99), st.data())
def test_the_meter_sums_over_batches_and_goes_on_from_its_state(parts, seed, data):
    meter = TokenMeter(7, num_bytes=50)
    cut = data.draw(st.integers(0, len(parts)))
    total = 0.0
    for number, targets in enumerate(parts):
        if number == cut:  # stopped here, and resumed by another
            state = {name: tensor.clone() for name, tensor in meter.state().items()}
            meter = TokenMeter(7, num_bytes=50)
            meter.load(state)
        outputs = outputs_of(len(targets), seed + number)
        meter.update(outputs, batch_with(targets))
        total += reference(outputs, targets).item()
    num_learned = sum(target >= 0 for targets in parts for target in targets)
    found = meter.compute()
    assert found["num_examples"] == 7
    assert found["bits_per_byte"] == pytest.approx(total / math.log(2) / 50, abs=1e-9)
    if num_learned:
        assert found["loss"] == pytest.approx(total / num_learned, rel=1e-9)
        assert found["perplexity"] == pytest.approx(math.exp(total / num_learned), rel=1e-9)
    else:
        assert math.isnan(found["loss"])


def test_a_meter_of_training_counts_nothing_but_can_be_kept():
    meter = TokenMeter()
    meter.update(outputs_of(2, 0), batch_with([1, 2]))
    assert meter.compute() == {} and meter.state()["sums"].tolist() == [0, 0]


def test_a_hopeless_loss_has_a_perplexity_all_the_same():
    meter = TokenMeter(1)
    outputs = TokenOutputs(torch.tensor([[1e4]]), torch.tensor([[0.0], [1.0]]), 0.0)
    meter.update(outputs, pack([torch.tensor([0])], targets=[0]))
    found = meter.compute()
    assert found["loss"] == pytest.approx(1e4) and math.isfinite(found["perplexity"])
    assert "bits_per_byte" not in found


# Decoding in portions


def model_of(architecture: str) -> Transformer:
    with default_dtype(torch.float64):
        return small_model(
            architecture=architecture,
            head="language_modelling",
            max_positions=40,
            initializer_std=0.2,
        )


def as_text(ids: Tensor) -> EncodedText:
    return EncodedText(ids.tolist(), [0] * len(ids), 0)


@pytest.mark.parametrize("architecture", ["decoder", "encoder_decoder"])
@pytest.mark.parametrize(
    "how",
    [
        DecodingSettings(max_new_tokens=8),
        DecodingSettings(max_new_tokens=8, temperature=1.0, num_return=2),
        DecodingSettings(max_new_tokens=8, num_beams=3),
    ],
)
def test_portions_and_their_order_change_nothing(architecture: str, how, monkeypatch):
    model = model_of(architecture)
    prompts = [p.tolist() for p in random_sequences([3, 9, 1, 4, 4, 12, 2])]
    sources = None
    if architecture == "encoder_decoder":
        sources = [as_text(s) for s in random_sequences([5, 1, 8, 2, 8, 3, 3], seed=1)]
    options: dict[str, Any] = {
        "sources": sources,
        "limits": [8, 3, 8, 0, 5, 8, 1],
        "rules": OutputRules(end_ids=frozenset({0, 1, 2})),
    }
    whole = decode_sequences(model, CPU, how, prompts, **options)
    monkeypatch.setattr(generating, "_MAX_ROWS", 4)
    assert decode_sequences(model, CPU, how, prompts, **options) == [
        [replace(d, score=pytest.approx(d.score, abs=1e-9)) for d in found] for found in whole
    ]
    for found, limit in zip(whole, options["limits"], strict=True):
        assert all(len(decoded.token_ids) <= limit for decoded in found)
    assert whole[3][0].token_ids == () and not whole[3][0].finished
    assert decode_sequences(model, CPU, how, []) == []


def test_what_is_told_of_a_token_names_its_prompt(monkeypatch):
    model = model_of("decoder")
    prompts = [p.tolist() for p in random_sequences([2, 7, 4, 7, 1])]
    how, end_ids = DecodingSettings(max_new_tokens=6), frozenset({0})
    told: dict[int, list[int]] = {i: [] for i in range(5)}
    asked: list[tuple[int, tuple[int, ...]]] = []

    def stop(number: int, ids: tuple[int, ...]) -> bool:
        asked.append((number, ids))
        return number == 3 and len(ids) == 2

    monkeypatch.setattr(generating, "_MAX_ROWS", 2)
    found = decode_sequences(
        model,
        CPU,
        how,
        prompts,
        rules=OutputRules(
            end_ids=end_ids,
            stop=stop,
            on_token=lambda number, token: told[number].append(token),
        ),
    )
    assert [tuple(ids) for ids in told.values()] == [one[0].token_ids for one in found]
    assert len(found[3][0].token_ids) == 2 and found[3][0].finished
    assert {number for number, _ in asked} == set(range(5))
    for number, ids in asked:
        assert found[number][0].token_ids[: len(ids)] == ids


def test_banned_tokens_never_come(monkeypatch):
    model = model_of("decoder")
    prompts = [p.tolist() for p in random_sequences([2, 7, 4])]
    free = decode_sequences(model, CPU, DecodingSettings(max_new_tokens=10), prompts)
    banned = {one[0].token_ids[0] for one in free}
    found = decode_sequences(
        model,
        CPU,
        DecodingSettings(max_new_tokens=10),
        prompts,
        rules=OutputRules(banned_ids=sorted(banned)),
    )
    assert not banned & {token for one in found for token in one[0].token_ids}


def test_a_draw_depends_on_the_number_of_the_prompt_alone():
    model, how = model_of("decoder"), DecodingSettings(max_new_tokens=10, temperature=2.0)
    same = decode_sequences(model, CPU, how, [[1, 2]] * 3)
    assert len({one[0].token_ids for one in same}) == 3
    others = decode_sequences(model, CPU, how, [[5], [1, 2], [7, 8, 9]])
    assert others[1][0].token_ids == same[1][0].token_ids


@settings(max_examples=50)
@given(st.integers(0, 300), st.one_of(st.none(), st.integers(0, 300)))
def test_a_limit_is_spread_over_all(num_examples, limit):
    found = spread(num_examples, limit)
    assert len(found) == min(num_examples, num_examples if limit is None else limit)
    assert (np.diff(found) > 0).all()
    if len(found) > 1:
        assert found[0] == 0 and found[-1] == num_examples - 1
        gaps = np.diff(found)
        assert gaps.max() - gaps.min() <= 1
