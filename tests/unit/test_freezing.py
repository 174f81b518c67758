"""Freezing, layer-wise rates and more tokens: what of a pretrained model moves, and how far."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from builders import VOCAB, pack, random_sequences, small_model
from hasten.core.errors import UsageError
from hasten.model.freezing import count_trained, freeze
from hasten.model.vocabulary import extend_vocabulary
from hasten.optim.layer_decay import layer_rates
from hasten.optim.optimizers import build_optimizer, parameter_groups, set_learning_rate

NAMES = sorted(name for name, _ in small_model().named_parameters())


@settings(deadline=None, max_examples=60)
@given(name=st.sampled_from(NAMES), cut=st.integers(0, 6), stars=st.sets(st.integers(0, 5)))
def test_a_pattern_freezes_what_it_names(name: str, cut: int, stars: set[int]):
    parts = name.split(".")
    parts = ["*" if i in stars else part for i, part in enumerate(parts)]
    pattern = ".".join(parts[: len(parts) - cut] or parts[:1])
    wanted = {n for n in NAMES if any(fnmatchcase(n, p) for p in (pattern, f"{pattern}.*"))}
    model = small_model()
    if all(n.startswith("head.") for n in wanted):
        with pytest.raises(UsageError, match="always trained"):
            freeze(model, [pattern])
        return
    freeze(model, [pattern])
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {n for n in wanted if not n.startswith("head.")}
    trained, total = count_trained(model)
    assert trained == sum(p.numel() for n, p in model.named_parameters() if n not in frozen)
    assert total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("encoder.block.0", "Did you mean 'encoder.blocks.0"),
        ("embeding", "Did you mean 'embedding'"),
        ("bert.encoder.layer.0.*", "There are|Did you mean"),
        ("encoder.blocks.7.*", "Did you mean"),
    ],
)
def test_a_pattern_that_names_nothing_is_refused(pattern: str, said: str):
    with pytest.raises(UsageError, match=f"names no weight.*({said})"):
        freeze(small_model(), ["embedding", pattern])


def test_a_model_without_a_new_head_cannot_be_frozen_whole():
    model = small_model(architecture="decoder", head="language_modelling")
    with pytest.raises(UsageError, match="leaves no weight to train"):
        freeze(model, ["*"])


def test_the_backward_pass_ends_at_the_lowest_trained_weight():
    model = small_model()
    freeze(model, ["embedding", "encoder.blocks.0"])
    seen: list[bool] = []
    blocks = model.encoder.blocks  # pyright: ignore[reportOptionalMemberAccess]
    blocks[1].register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0].requires_grad))
    model(pack(random_sequences([4, 2]))).sum().backward()
    assert seen == [False]
    for name, parameter in model.named_parameters():
        is_frozen = name.startswith(("embedding.", "encoder.blocks.0."))
        assert (parameter.grad is None) == is_frozen, name


def test_frozen_weights_have_no_group_state_or_decay():
    model = small_model()
    freeze(model, ["encoder"])
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    groups = parameter_groups(list(model.named_parameters()), weight_decay=0.5)
    optimizer = build_optimizer("adamw", groups, learning_rate=0.1)
    model(pack(random_sequences([4, 2]))).sum().backward()
    optimizer.step()
    assert {p for g in optimizer.param_groups for p in g["params"]} == {
        p for p in model.parameters() if p.requires_grad
    }
    for name, parameter in model.named_parameters():
        if name.startswith("encoder."):
            assert torch.equal(parameter, before[name])
            assert parameter not in optimizer.state


def test_rates_fall_from_the_head_to_the_embeddings():
    model = small_model(num_layers=3, positions="learned", norm_placement="post")
    rates = layer_rates(NAMES := [n for n, _ in model.named_parameters()], model.config, 0.5)
    for name in NAMES:
        if ".blocks." in name:
            wanted = 3 - int(name.split(".")[2])
        else:
            wanted = 0 if name.startswith("head.") else 4
        assert rates[name] == 0.5**wanted, name
    assert set(layer_rates(NAMES, model.config, 1.0).values()) == {1.0}


def test_rates_of_an_encoder_decoder_count_from_the_top_of_each_stack():
    model = small_model(
        architecture="encoder_decoder", head="language_modelling", num_decoder_layers=1
    )
    rates = layer_rates([n for n, _ in model.named_parameters()], model.config, 0.1)
    depth = {
        "embedding.tokens.weight": 3,
        "encoder.blocks.0.attention.query.weight": 2,
        "encoder.blocks.1.feed_forward.up.weight": 1,
        "encoder.final_norm.weight": 0,
        "decoder.blocks.0.attention.query.weight": 1,
    }
    for name, steps in depth.items():
        assert rates[name] == pytest.approx(0.1**steps), name


@pytest.mark.parametrize("name", ["adamw", "sgd", "muon"])
def test_a_step_moves_each_weight_by_its_own_rate(name: str):
    """What is learned with a factor is what is learned at that rate."""

    def step(rate: float, factors: dict[str, float] | None) -> dict[str, torch.Tensor]:
        model = small_model()
        named = list(model.named_parameters())
        groups = parameter_groups(named, weight_decay=0.1, rates=factors)
        optimizer = build_optimizer(name, groups, learning_rate=1.0)
        model(pack(random_sequences([4, 2]))).square().sum().backward()
        set_learning_rate(optimizer, rate)
        optimizer.step()
        return {n: p.detach() for n, p in named}

    rates = layer_rates(NAMES, small_model().config, 0.5)
    mixed = step(0.01, rates)
    for factor in set(rates.values()):
        alone = step(0.01 * factor, None)
        for one in (n for n in NAMES if rates[n] == factor):
            torch.testing.assert_close(mixed[one], alone[one], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_get_rows_around_the_mean(tied: bool):
    options = {"architecture": "decoder", "head": "language_modelling", "logit_bias": True}
    model, old = (small_model(tie_embeddings=tied, **options) for _ in range(2))
    extend_vocabulary(model, [VOCAB, VOCAB + 1, VOCAB + 2])
    assert model.config.vocab_size == VOCAB + 3
    tables = ["embedding.tokens.weight", *["head.scorer.weight"] * (not tied)]
    for name in tables:
        before, after = old.get_parameter(name), model.get_parameter(name)
        assert torch.equal(after[:VOCAB], before)
        new, mean, spread = after[VOCAB:], before.mean(0), before.std(0)
        assert ((new - mean).abs() < 0.1 * spread).all()
        assert len(new.unique(dim=0)) == 3
    batch = pack([torch.tensor([1, VOCAB + 2, 3])])
    scores = model(batch).scores()
    assert scores.shape == (3, VOCAB + 3)
    # Where only old tokens are read, their scores are the old ones.
    batch = pack([torch.tensor([1, 2, 3])])
    torch.testing.assert_close(model(batch).scores()[:, :VOCAB], old(batch).scores())
    assert model.head.bias is not None and old.head.bias is not None
    torch.testing.assert_close(model.head.bias[VOCAB:], old.head.bias.mean().expand(3))


def test_tokens_take_the_spare_rows_of_an_embedding_first():
    model, old = small_model(), small_model()
    extend_vocabulary(model, [VOCAB - 1])
    assert model.config.vocab_size == VOCAB
    changed = (model.embedding.tokens.weight != old.embedding.tokens.weight).any(1)
    assert changed.tolist() == [False] * (VOCAB - 1) + [True]
