"""Positions, feed-forward, dropout, initial weights, sizes: each against its formula."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from builders import VOCAB, default_dtype, pack, random_sequences, small_model
from hasten.core.batch import SequenceLayout
from hasten.core.errors import UsageError
from hasten.model.config import TransformerConfig
from hasten.model.heads import TokenOutputs
from hasten.model.layers import (
    Dropout,
    Embedding,
    FeedForward,
    RotaryTable,
    StochasticDepth,
    apply_rotary,
    build_norm,
    sinusoidal_table,
)
from hasten.model.transformer import Stack, Transformer


def config(**options: Any) -> TransformerConfig:
    settings: dict[str, Any] = {
        "vocab_size": 30,
        "num_layers": 2,
        "hidden_size": 16,
        "num_heads": 2,
        **options,
    }
    return TransformerConfig(**settings)


@pytest.mark.parametrize("size", [6, 16, 7])
def test_sinusoids_follow_vaswani_et_al(size: int):
    table = sinusoidal_table(50, size)
    assert table.shape == (50, size)
    for position in (0, 1, 17, 49):
        for column in range(size):
            angle = position / 10000 ** (2 * (column // 2) / size)
            expected = math.cos(angle) if column % 2 else math.sin(angle)
            assert float(table[position, column]) == pytest.approx(expected, abs=2e-5)


def test_sinusoidal_embedding_adds_the_table_to_the_scaled_tokens():
    module = Embedding(config(positions="sinusoidal")).eval()
    ids, positions = torch.tensor([3, 4, 3]), torch.tensor([0, 1, 0], dtype=torch.int32)
    expected = module.tokens.weight[ids] * 4 + sinusoidal_table(512, 16)[[0, 1, 0]]
    torch.testing.assert_close(module(ids, positions, None), expected)


def test_learned_positions_and_segments_are_added():
    module = Embedding(config(positions="learned", num_token_types=2, max_positions=9)).eval()
    ids, positions = torch.tensor([3, 4, 3]), torch.tensor([0, 8, 1], dtype=torch.int32)
    types = torch.tensor([0, 1, 1])
    expected = (
        module.tokens.weight[ids]
        + module.positions.weight[[0, 8, 1]]
        + module.token_types.weight[types]
    )
    torch.testing.assert_close(module(ids, positions, types), expected)
    # Without segments all tokens are of the first.
    torch.testing.assert_close(
        module(ids, positions, None), module(ids, positions, torch.zeros_like(types))
    )


def test_rotary_positions_are_a_complex_product(double_precision):
    table = RotaryTable(config(rotary_base=100.0, max_positions=40))
    positions = torch.tensor([0, 3, 39, 1], dtype=torch.int32)
    x = torch.randn(4, 2, 8)
    found = apply_rotary(x, *table(positions))
    pairs = torch.complex(x[..., :4], x[..., 4:])
    frequencies = 100.0 ** (-torch.arange(4) / 4)
    turned = pairs * torch.exp(1j * positions[:, None, None] * frequencies)
    torch.testing.assert_close(found, torch.cat([turned.real, turned.imag], -1))


@settings(max_examples=60)
@given(
    first=st.integers(0, 200),
    second=st.integers(0, 200),
    shift=st.integers(0, 300),
    seed=st.integers(0, 99),
)
def test_rotary_scores_depend_on_the_distance_only(first: int, second: int, shift: int, seed: int):
    with default_dtype(torch.float64):
        table = RotaryTable(config())
        q, k = torch.randn(2, 1, 1, 8, generator=torch.Generator().manual_seed(seed))

        def score(a: int, b: int) -> float:
            at_a, at_b = (table(torch.tensor([p], dtype=torch.int32)) for p in (a, b))
            return float((apply_rotary(q, *at_a) * apply_rotary(k, *at_b)).sum())

        assert score(first, second) == pytest.approx(score(first + shift, second + shift), abs=1e-9)
        assert float(apply_rotary(q, *table(torch.tensor([first]))).norm()) == pytest.approx(
            float(q.norm())
        )


def test_rotary_scores_do_depend_on_the_distance():
    table = RotaryTable(config())
    q = torch.ones(2, 1, 8)
    turned = apply_rotary(q, *table(torch.tensor([0, 5])))
    assert not torch.allclose(turned[0], turned[1])


@pytest.mark.parametrize("positions", ["rotary", "learned", "sinusoidal"])
def test_the_order_of_the_tokens_matters(positions: str):
    model = small_model(positions=positions)
    scores = model(pack([torch.tensor([1, 2, 3, 4]), torch.tensor([4, 2, 3, 1])]))
    assert not torch.allclose(scores[0], scores[1], atol=1e-3)


@pytest.mark.parametrize("activation", ["gelu", "relu", "relu_squared", "swiglu"])
def test_the_feed_forward_is_its_formula(activation: str, double_precision):
    module = FeedForward(config(activation=activation))
    x = torch.randn(5, 16)
    up = x @ module.up.weight.T + module.up.bias
    if activation == "gelu":
        inner = up * 0.5 * (1 + torch.erf(up / math.sqrt(2)))
    elif activation == "relu":
        inner = torch.where(up > 0, up, 0)
    elif activation == "relu_squared":
        inner = torch.where(up > 0, up * up, 0)
    else:
        gate = x @ module.gate.weight.T + module.gate.bias
        inner = gate / (1 + torch.exp(-gate)) * up
    torch.testing.assert_close(module(x), inner @ module.down.weight.T + module.down.bias)
    assert (module.gate is not None) == (activation == "swiglu")


@pytest.mark.parametrize("bias", [True, False])
def test_norms_are_their_formulas(bias: bool, double_precision):
    x = 3 + 2 * torch.randn(4, 16)
    layer = build_norm(config(norm="layernorm", norm_epsilon=0.01, bias=bias))
    centred = x - x.mean(-1, keepdim=True)
    expected = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 0.01)
    torch.testing.assert_close(layer(x), expected)
    assert (getattr(layer, "bias", None) is not None) == bias
    rms = build_norm(config(norm="rmsnorm", norm_epsilon=0.01, bias=bias))
    expected = x / torch.sqrt(x.square().mean(-1, keepdim=True) + 0.01)
    torch.testing.assert_close(rms(x), expected)


def test_stochastic_depth_drops_whole_sequences_and_keeps_the_mean():
    torch.manual_seed(0)
    module, layout = StochasticDepth(0.3).train(), SequenceLayout.from_lengths([1, 4, 2] * 5000)
    out = module(torch.ones(layout.num_tokens, 2), layout)
    kept = [part[0, 0].item() for part in out.split(list(layout.lengths))]
    for value, part in zip(kept, out.split(list(layout.lengths)), strict=True):
        assert value in (0.0, pytest.approx(1 / 0.7)) and (part == value).all()
    share = sum(value > 0 for value in kept) / len(kept)
    assert share == pytest.approx(0.7, abs=4 * math.sqrt(0.21 / 15000))
    assert torch.equal(module.eval()(torch.ones(7, 2), layout), torch.ones(7, 2))


def test_stochastic_depth_grows_from_nothing_to_the_last_block():
    options = {"num_decoder_layers": 3, "stochastic_depth": 0.6}
    model = Transformer(30, 4, 16, 2, architecture="encoder_decoder", **options)
    for stack, expected in (
        (model.encoder, [0.0, 0.2, 0.4, 0.6]),
        (model.decoder, [0.0, 0.3, 0.6]),
    ):
        rates = [block.stochastic_depth.rate for block in stack.blocks]
        assert rates == pytest.approx(expected)


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_token_dropout_zeroes_whole_embeddings_and_keeps_the_mean(positions: str):
    torch.manual_seed(0)
    module = Embedding(config(token_dropout=0.25, positions=positions)).train()
    ids, places = torch.full((20000,), 5), torch.zeros(20000, dtype=torch.int32)
    added = module.positions.weight[0] if module.positions is not None else torch.zeros(16)
    out = module(ids, places, None) - added
    row = module.tokens.weight[5]
    dropped = out.abs().amax(1) < 1e-6
    torch.testing.assert_close(out[~dropped], (row / 0.75).expand(int((~dropped).sum()), -1))
    assert float(dropped.float().mean()) == pytest.approx(
        0.25, abs=4 * math.sqrt(0.25 * 0.75 / 20000)
    )
    torch.testing.assert_close(module.eval()(ids, places, None) - added, row.expand(20000, -1))


@pytest.mark.parametrize("rate_name", ["dropout", "head_dropout", "token_dropout"])
def test_each_dropout_acts_in_training_only(rate_name: str):
    model = small_model(**{"dropout": 0.0, "head_dropout": 0.0, rate_name: 0.5})
    batch = pack(random_sequences([8, 8]))
    evaluated = model(batch)
    assert torch.equal(evaluated, model(batch))
    model.train()
    assert not torch.allclose(model(batch), evaluated)


def test_the_heads_dropout_is_the_models_unless_given():
    assert small_model(dropout=0.5).head.dropout.rate == 0.5
    assert small_model(dropout=0.5, head_dropout=0.0).head.dropout.rate == 0.0


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.5, 0.9])
def test_dropout_zeroes_each_element_by_itself_and_keeps_the_mean(rate: float):
    torch.manual_seed(0)
    count = 400_003  # no multiple of the four elements that share a draw
    x = torch.linspace(1, 2, count).requires_grad_()
    out = Dropout(rate).train()(x)
    kept = out.detach() != 0
    torch.testing.assert_close(out[kept], x[kept] / (1 - rate), rtol=2e-4, atol=0)
    out.sum().backward()
    torch.testing.assert_close(x.grad, out.detach() / x.detach())
    dropped = (~kept).double()

    def assert_mean(values: torch.Tensor, wanted: float) -> None:
        error = 5 * math.sqrt(wanted * (1 - wanted) / len(values)) + 2 / 65536
        assert values.mean().item() == pytest.approx(wanted, abs=error)

    assert_mean(dropped, rate)
    for lane in range(4):
        assert_mean(dropped[lane::4], rate)
    for distance in (1, 2, 3, 4, 5, 8):  # neighbours, and those of one draw, know nothing of it
        assert_mean(dropped[:-distance] * dropped[distance:], rate * rate)


@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (0, 4), (2, 3, 7)])
def test_dropout_takes_any_shape_and_type(shape: tuple[int, ...]):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x = torch.ones(shape, dtype=dtype)
        out = Dropout(0.5).train()(x)
        assert out.shape == x.shape and out.dtype == dtype
        assert set(out.flatten().tolist()) <= {0.0, 2.0}
        assert Dropout(0.5).eval()(x) is x and Dropout(0.0).train()(x) is x


def test_dropout_repeats_from_the_same_seed_whatever_the_rate_may_be():
    x = torch.ones(1000)
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(Dropout(0.3).train()(x))
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])
    for rate in (1e-9, 0.9999999):  # within what a configuration admits
        assert torch.isfinite(Dropout(rate).train()(x)).all()


def expected_parameters(c: TransformerConfig) -> int:
    """The count from the architecture alone."""
    d, f, per_head = c.hidden_size, c.inner_size, c.head_size
    kv = c.kv_heads * per_head
    norm = d * (2 if c.norm == "layernorm" and c.bias else 1)
    attention = d * d * 2 + 2 * d * kv + (2 * d + 2 * kv) * c.bias + 2 * per_head * c.qk_norm
    matrices = 3 if c.activation == "swiglu" else 2
    feed_forward = matrices * d * f + ((matrices - 1) * f + d) * c.bias
    embedding = c.vocab_size * d + c.num_token_types * d
    embedding += c.max_positions * d if c.positions == "learned" else 0
    head = d * c.num_labels + c.num_labels + (d + 1 if c.pooling == "attention" else 0)
    if c.head == "span":
        head = 2 * d + 2
    elif c.head == "language_modelling":
        head = 0 if c.tie_embeddings else c.vocab_size * d
    block = attention + feed_forward + 2 * norm
    if c.architecture != "encoder_decoder":
        return embedding + norm + c.num_layers * block + head
    if c.source_vocab_size:
        embedding += embedding + (c.source_vocab_size - c.vocab_size) * d
    num_blocks = c.num_decoder_layers or c.num_layers
    decoder = norm + num_blocks * (block + attention + norm)
    return embedding + norm + c.num_layers * block + decoder + head


@settings(max_examples=60)
@given(
    options=st.fixed_dictionaries(
        {
            "num_layers": st.integers(1, 3),
            "num_kv_heads": st.sampled_from([None, 1, 2]),
            "feed_forward_size": st.sampled_from([None, 24]),
            "activation": st.sampled_from(["gelu", "swiglu"]),
            "norm": st.sampled_from(["layernorm", "rmsnorm"]),
            "norm_placement": st.sampled_from(["pre", "post"]),
            "positions": st.sampled_from(["rotary", "learned", "sinusoidal"]),
            "num_token_types": st.sampled_from([0, 2]),
            "qk_norm": st.booleans(),
            "bias": st.booleans(),
            "num_labels": st.integers(1, 4),
            "pooling": st.sampled_from(["first", "mean", "attention"]),
            "architecture": st.sampled_from(["encoder", "decoder", "encoder_decoder"]),
            "num_decoder_layers": st.sampled_from([None, 1, 3]),
            "source_vocab_size": st.sampled_from([None, 45]),
            "head": st.sampled_from(["classification", "language_modelling", "span"]),
            "tie_embeddings": st.booleans(),
        }
    )
)
def test_the_number_of_parameters_follows_from_the_architecture(options: dict[str, Any]):
    if options["architecture"] != "encoder_decoder":
        options = {**options, "source_vocab_size": None, "num_decoder_layers": None}
    c = config(**options)
    model = Transformer.from_config(c)
    assert model.config == c
    assert sum(p.numel() for p in model.parameters()) == expected_parameters(c)
    assert all(p.requires_grad for p in model.parameters())


def test_the_inner_width_of_swiglu_costs_no_more_parameters():
    plain, gated = config(hidden_size=96), config(hidden_size=96, activation="swiglu")
    assert gated.inner_size % 16 == 0
    assert 0 <= 3 * gated.inner_size - 2 * plain.inner_size < 3 * 16


@pytest.mark.parametrize("architecture", ["encoder", "decoder", "encoder_decoder"])
@pytest.mark.parametrize("placement", ["pre", "post"])
def test_at_the_start_zero_initialised_blocks_say_nothing(placement: str, architecture: str):
    options = {"norm_placement": placement, "zero_init_residual": True, "dropout": 0.0}
    torch.manual_seed(1)
    model = Transformer(30, 3, 16, 2, architecture=architecture, **options).eval()
    sequences = [torch.randint(30, (6,)), torch.randint(30, (9,))]
    batch = pack(sequences, sources=sequences[::-1] if model.encoder and model.decoder else None)
    before = model(batch)
    ends, stacks = [], [stack for stack in (model.encoder, model.decoder) if stack is not None]
    with torch.no_grad():
        for stack in stacks:
            for name, parameter in stack.blocks.named_parameters():
                if name.endswith(("attention.output.weight", "feed_forward.down.weight")):
                    assert not parameter.any()
                    ends.append(parameter)
                elif parameter.ndim == 2:
                    parameter.normal_()
    assert len(ends) == {"encoder": 6, "decoder": 6, "encoder_decoder": 15}[architecture]
    torch.testing.assert_close(model(batch), before, rtol=1e-4, atol=1e-5)
    # Gradients must still reach what starts at zero, or it would stay there. Nothing reaches the
    # encoder of an encoder_decoder as long as no decoder block reads it.
    model(batch).square().sum().backward()
    for weight in ends if architecture != "encoder_decoder" else ends[6:]:
        assert weight.grad is not None and weight.grad.any()


def test_initial_weights_have_the_wanted_spread():
    torch.manual_seed(0)
    model = Transformer(500, 8, 128, 4, initializer_std=0.05)
    block = model.encoder.blocks[3]
    for weight in (
        model.embedding.tokens.weight,
        block.attention.query.weight,
        block.feed_forward.up.weight,
    ):
        assert weight.std().item() == pytest.approx(0.05, rel=0.03)
    for weight in (block.attention.output.weight, block.feed_forward.down.weight):
        assert weight.std().item() == pytest.approx(0.05 / 4, rel=0.03)
    assert not block.attention.query.bias.any() and not model.head.classifier.bias.any()
    model = Transformer(500, 2, 128, 4, architecture="encoder_decoder", num_decoder_layers=8)
    block = model.decoder.blocks[3]
    for module in (block.attention, block.source_attention):
        assert module.output.weight.std().item() == pytest.approx(0.02 / 4, rel=0.03)
        assert module.value.weight.std().item() == pytest.approx(0.02, rel=0.03)


@pytest.mark.parametrize(
    "options",
    [
        {"pooling": "attention"},
        {"architecture": "decoder", "head": "language_modelling", "tie_embeddings": False},
        {"architecture": "encoder_decoder", "source_vocab_size": 50, "head": "span"},
    ],
)
def test_drawing_weights_anew_forgets_everything(options: dict[str, Any]):
    model = small_model(num_token_types=2, qk_norm=True, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    torch.manual_seed(3)
    model.reset_parameters()
    assert not [name for name, p in model.named_parameters() if (p == 7.0).any()]
    settings = {f: getattr(model.config, f) for f in model.config.__dataclass_fields__}
    torch.manual_seed(3)
    fresh = Transformer(**settings)
    torch.manual_seed(3)
    fresh.reset_parameters()
    for (name, a), b in zip(model.named_parameters(), fresh.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 30, "num_heads": 4}, "30 is not a multiple of .*4.*3 heads|5 heads"),
        ({"num_heads": 4, "num_kv_heads": 3}, "num_kv_heads 3"),
        ({"hidden_size": 6, "num_heads": 2}, "even head size, not 3"),
        ({"dropout": 1.0}, "dropout"),
        ({"stochastic_depth": -0.1}, "stochastic_depth"),
        ({"head_dropout": 1.0}, "head_dropout"),
        ({"activation": "glue"}, "activation is 'glue'.*'gelu'"),
        ({"num_layers": 0}, "num_layers"),
        ({"num_labels": 0}, "num_labels"),
        ({"feed_forward_size": 0}, "feed_forward_size"),
        ({"num_kv_heads": 0}, "num_kv_heads"),
        ({"num_kv_heads": -1}, "num_kv_heads"),
        ({"num_token_types": -1}, "num_token_types"),
        ({"architecture": "decodr"}, "architecture is 'decodr'.*'decoder'"),
        ({"head": "spam"}, "head is 'spam'.*'span'"),
        ({"num_decoder_layers": 0}, "num_decoder_layers"),
        ({"source_vocab_size": 0}, "source_vocab_size"),
        ({"sliding_window": -1}, "sliding_window must not be negative"),
        ({"attention_softcap": -1.0}, "attention_softcap must not be negative"),
        ({"logit_softcap": -0.5}, "logit_softcap must not be negative"),
        ({"num_decoder_layers": 2}, "num_decoder_layers has no effect with architecture 'encoder'"),
        ({"source_vocab_size": 9, "architecture": "decoder"}, "source_vocab_size has no effect"),
        ({"sliding_window": 3}, "sliding_window has no effect with architecture 'encoder'"),
        ({"logit_softcap": 3.0}, "logit_softcap has no effect with head 'classification'"),
    ],
)
def test_an_architecture_that_does_not_fit_is_refused(options: dict[str, Any], message: str):
    with pytest.raises(UsageError, match=message):
        config(**options)


def test_an_unknown_option_names_the_nearest():
    with pytest.raises(UsageError, match=r"'poolng'.*'pooling'"):
        Transformer(10, 1, 8, 2, poolng="mean")


def test_a_sequence_beyond_the_positions_is_refused_with_both_lengths():
    model = small_model(max_positions=8)
    model(pack(random_sequences([8])))
    with pytest.raises(UsageError, match=r"9 tokens.* 8 positions"):
        model(pack(random_sequences([3, 9])))


@pytest.mark.parametrize("architecture", ["encoder", "decoder", "encoder_decoder"])
def test_a_source_belongs_to_an_encoder_decoder_alone(architecture: str):
    model, (own, source) = small_model(architecture=architecture), random_sequences([3, 5])
    batches = {False: pack([own]), True: pack([own], sources=[source])}
    wanted = architecture == "encoder_decoder"
    model(batches[wanted])
    with pytest.raises(UsageError, match="a source belongs to an encoder_decoder"):
        model(batches[not wanted])


def test_a_source_beyond_the_positions_is_refused():
    model = small_model(architecture="encoder_decoder", max_positions=8)
    with pytest.raises(UsageError, match=r"9 tokens.* 8 positions"):
        model(pack(random_sequences([3]), sources=random_sequences([9])))


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_looking_at_a_source_knows_no_order_but_what_the_encoder_put_into_it(positions: str):
    """Positions of two streams have no distance between them."""
    torch.manual_seed(0)
    stack = Stack(config(positions=positions), causal=True, reads_source=True).eval()
    batch = pack(random_sequences([3, 4]), sources=random_sequences([5, 2]))
    x, memory = torch.randn(7, 16), torch.randn(7, 16)
    expected = stack(x, batch, memory)
    order = [3, 0, 4, 1, 2, 6, 5]
    torch.testing.assert_close(stack(x, batch, memory[order]), expected)
    across = [5, 1, 2, 3, 4, 0, 6]  # another sequence's source is another matter
    assert not torch.allclose(stack(x, batch, memory[across]), expected, atol=1e-3)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("softcap", [0.0, 2.5])
def test_scores_of_tokens_are_products_with_their_vectors(tie: bool, softcap: float):
    model = small_model(
        architecture="decoder",
        head="language_modelling",
        tie_embeddings=tie,
        logit_softcap=softcap,
    )
    batch = pack(random_sequences([4, 7]))
    outputs = model(batch)
    assert isinstance(outputs, TokenOutputs)
    weight = model.embedding.tokens.weight if tie else model.head.scorer.weight
    hidden = model.decoder(model.embed(batch), batch)
    expected = hidden @ weight.T
    if softcap:
        expected = softcap * torch.tanh(expected / softcap)
        assert float(expected.detach().abs().max()) > 0.8 * softcap  # or there was nothing to bound
    torch.testing.assert_close(outputs.scores(), expected, rtol=1e-4, atol=1e-4)
    rows = torch.tensor([10, 0, 3])
    torch.testing.assert_close(outputs.scores(rows), expected[rows], rtol=1e-4, atol=1e-4)
    assert ("scorer.weight" in dict(model.head.named_parameters())) is not tie


def test_a_span_head_scores_every_token_twice():
    model = small_model(head="span")
    batch = pack(random_sequences([4, 7]))
    hidden = model.encoder(model.embed(batch), batch)
    scorer = model.head.scorer
    torch.testing.assert_close(model(batch), hidden @ scorer.weight.T + scorer.bias)


def test_source_and_target_share_embeddings_unless_their_vocabularies_differ():
    shared = small_model(architecture="encoder_decoder")
    assert shared.source_embedding is None
    own = small_model(architecture="encoder_decoder", source_vocab_size=55)
    assert own.source_embedding.tokens.weight.shape == (55, 32)
    assert own.embedding.tokens.weight.shape == (VOCAB, 32)
    for model, wanted in ((shared, shared.embedding), (own, own.source_embedding)):
        source = pack(random_sequences([6]))
        x = wanted(source.token_ids, source.positions, None)
        torch.testing.assert_close(model.encode(source), model.encoder(x, source))
