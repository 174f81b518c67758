"""Positions, feed-forward, dropout, initial weights, sizes: each against its formula."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from builders import VOCAB, pack, random_sequences, small_model
from hasten.core.batch import SequenceLayout
from hasten.core.errors import UsageError
from hasten.model.config import RotaryScaling, TransformerConfig
from hasten.model.heads import TokenOutputs
from hasten.model.layers import (
    Dropout,
    Embedding,
    FeedForward,
    StochasticDepth,
    build_norm,
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


@pytest.mark.parametrize("positions", ["rotary", "learned", "sinusoidal"])
def test_the_order_of_the_tokens_matters(positions: str):
    model = small_model(positions=positions)
    scores = model(pack([torch.tensor([1, 2, 3, 4]), torch.tensor([4, 2, 3, 1])]))
    assert not torch.allclose(scores[0], scores[1], atol=1e-3)


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


NONLINEAR: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "relu": lambda x: torch.where(x > 0, x, 0),
    "relu_squared": lambda x: torch.where(x > 0, x * x, 0),
    "silu": silu,
}
GATES = {"swiglu": silu, "geglu": gelu, "geglu_tanh": gelu_tanh}


@pytest.mark.parametrize("activation", [*NONLINEAR, *GATES])
def test_the_feed_forward_is_its_formula(activation: str, double_precision):
    module = FeedForward(config(activation=activation))
    x = torch.randn(5, 16)
    up = x @ module.up.weight.T + module.up.bias
    if activation in GATES:
        inner = GATES[activation](x @ module.gate.weight.T + module.gate.bias) * up
    else:
        inner = NONLINEAR[activation](up)
    torch.testing.assert_close(module(x), inner @ module.down.weight.T + module.down.bias)
    assert (module.gate is not None) == (activation in GATES)


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


@pytest.mark.parametrize("num_token_types", [0, 2])
def test_token_dropout_zeroes_whole_embeddings_and_keeps_the_mean(num_token_types: int):
    torch.manual_seed(0)
    module = Embedding(config(token_dropout=0.25, num_token_types=num_token_types)).train()
    ids = torch.full((20000,), 5)
    added = module.token_types.weight[0] if num_token_types else torch.zeros(16)
    out = module(ids) - added
    row = module.tokens.weight[5]
    dropped = out.abs().amax(1) < 1e-6
    torch.testing.assert_close(out[~dropped], (row / 0.75).expand(int((~dropped).sum()), -1))
    assert float(dropped.float().mean()) == pytest.approx(
        0.25, abs=4 * math.sqrt(0.25 * 0.75 / 20000)
    )
    torch.testing.assert_close(module.eval()(ids) - added, row.expand(20000, -1))


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
    d, f, e = c.hidden_size, c.inner_size, c.embedding_size or c.hidden_size
    per_head = c.head_dim or d // c.num_heads
    q, kv = c.num_heads * per_head, (c.num_kv_heads or c.num_heads) * per_head
    has_bias = c.norm == "layernorm" and c.bias
    norm = d * (1 + has_bias)
    qkv_bias = c.bias if c.qkv_bias is None else c.qkv_bias
    output_bias = c.bias if c.output_bias is None else c.output_bias
    attention = 2 * d * (q + kv) + (q + 2 * kv) * qkv_bias + d * output_bias
    attention += 2 * per_head * c.qk_norm
    matrices = 3 if c.activation in GATES else 2
    feed_forward = matrices * d * f + ((matrices - 1) * f + d) * c.bias
    tables = c.vocab_size + (c.source_vocab_size or 0)
    tables += c.num_token_types * (2 if c.source_vocab_size else 1)
    stack = (c.max_positions + c.position_offset) * e if c.positions == "learned" else 0
    stack += c.relative_buckets * c.num_heads if c.positions == "relative" else 0
    stack += 0 if e == d else d * e + d
    if c.embedding_norm or (c.embedding_norm is None and c.norm_placement == "post"):
        stack += e * (1 + has_bias)
    stack += norm * (c.norm_placement != "post") - norm * (not c.first_norm)
    head = (d * d + d * c.bias) * (c.head_activation != "none") + norm * c.head_norm
    if c.head == "classification":
        head += (d + c.head_bias) * c.num_labels + (d + 1 if c.pooling == "attention" else 0)
    elif c.head == "span":
        head += 2 * (d + c.head_bias)
    else:
        head += 0 if c.tie_embeddings else c.vocab_size * d
    norms = 2 if c.norm_placement == "sandwich" else 1
    block = attention + feed_forward + 2 * norms * norm
    if c.architecture != "encoder_decoder":
        return tables * e + stack + c.num_layers * block + head
    num_blocks = c.num_decoder_layers or c.num_layers
    decoder = stack + num_blocks * (block + attention + norms * norm)
    return tables * e + stack + c.num_layers * block + decoder + head


OF_SCORES = {"head_activation": st.sampled_from(["none", "gelu"]), "head_bias": st.booleans()}


@settings(max_examples=100)
@given(
    options=st.fixed_dictionaries(
        {
            "num_layers": st.integers(1, 3),
            "num_kv_heads": st.sampled_from([None, 1, 2]),
            "head_dim": st.sampled_from([None, 6]),
            "feed_forward_size": st.sampled_from([None, 24]),
            "activation": st.sampled_from(["gelu", "silu", "swiglu", "geglu"]),
            "norm": st.sampled_from(["layernorm", "rmsnorm"]),
            "norm_placement": st.sampled_from(["pre", "post", "sandwich"]),
            "embedding_norm": st.sampled_from([None, False, True]),
            "embedding_size": st.sampled_from([None, 10, 16]),
            "positions": st.sampled_from(["rotary", "learned", "sinusoidal", "relative", "none"]),
            "num_token_types": st.sampled_from([0, 2]),
            "qk_norm": st.booleans(),
            "bias": st.booleans(),
            "qkv_bias": st.sampled_from([None, False, True]),
            "output_bias": st.sampled_from([None, False, True]),
            "num_labels": st.integers(1, 4),
            "pooling": st.sampled_from(["first", "last", "mean", "attention"]),
        }
    ),
    architecture=st.one_of(
        st.fixed_dictionaries({"architecture": st.sampled_from(["encoder", "decoder"])}),
        st.fixed_dictionaries(
            {
                "architecture": st.just("encoder_decoder"),
                "num_decoder_layers": st.sampled_from([None, 1, 3]),
                "source_vocab_size": st.sampled_from([None, 45]),
            }
        ),
    ),
    head=st.one_of(
        st.fixed_dictionaries({"head": st.sampled_from(["classification", "span"]), **OF_SCORES}),
        st.just({"head_activation": "tanh", "head_norm": True}),
        st.just({"head": "language_modelling", "embedding_size": None}),
        st.just({"head": "language_modelling", "tie_embeddings": False, "logit_bias": True}),
    ),
    number=st.integers(0, 3),
)
def test_the_number_of_parameters_follows_from_the_architecture(
    options: dict[str, Any], architecture: dict[str, Any], head: dict[str, Any], number: int
):
    options = {**options, **architecture, **head}
    if options["positions"] == "learned":
        options["position_offset"] = number
    if options["positions"] == "relative":
        options["relative_buckets"] = 16 + number
    if options["norm_placement"] != "post":
        options["first_norm"] = number > 1
    c = config(**options)
    model = Transformer.from_config(c)
    assert model.config == c
    assert sum(p.numel() for p in model.parameters()) == expected_parameters(c)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("activation", GATES)
def test_the_inner_width_of_a_gate_costs_no_more_parameters(activation: str):
    plain, gated = config(hidden_size=96), config(hidden_size=96, activation=activation)
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


SCORES_TOKENS = {"head": "language_modelling"}
SINUSOIDAL = {"positions": "sinusoidal"}


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
        ({"logit_softcap": 3.0}, "logit_softcap has no effect with head 'classification'"),
        ({"logit_scale": 0.5}, "logit_scale has no effect with head 'classification'"),
        ({"logit_bias": True}, "logit_bias has no effect with head 'classification'"),
        ({**SCORES_TOKENS, "head_activation": "tanh"}, "head_activation has no effect with head"),
        ({**SCORES_TOKENS, "head_bias": False}, "head_bias has no effect with head"),
        ({"head_norm": True}, "head_norm has no effect with head_activation 'none'"),
        ({"head_activation": "tahn"}, "head_activation is 'tahn'.*'tanh'"),
        ({"norm_placement": "sandwhich"}, "norm_placement is 'sandwhich'.*'sandwich'"),
        ({"first_norm": False, "norm_placement": "post"}, "first_norm has no effect with"),
        ({"head_dim": 0}, "head_dim must be at least 1"),
        ({"head_dim": 7}, r"even head size, not 7 \(model.head_dim\)"),
        ({"embedding_size": 0}, "embedding_size must be at least 1"),
        ({**SCORES_TOKENS, "embedding_size": 8}, "width 8 cannot score .* 16: set model.tie"),
        ({"embedding_scale": 0.0}, "embedding_scale must be above 0"),
        ({"attention_scale": -1.0}, "attention_scale must be above 0"),
        ({"position_offset": 2}, "position_offset has no effect with positions 'rotary'"),
        ({"positions": "learned", "position_offset": -1}, "position_offset must be at least 0"),
        ({"positions": "learned", "sinusoids": "halves"}, "sinusoids has no effect with positions"),
        ({**SINUSOIDAL, "sinusoids": "half"}, "sinusoids is 'half'.*'halves'"),
        ({**SINUSOIDAL, "sinusoids": "tensor2tensor", "embedding_size": 7}, "even width from 4"),
        ({"relative_buckets": 8}, "relative_buckets has no effect with positions 'rotary'"),
        ({"relative_max_distance": 64}, "relative_max_distance has no effect with positions"),
        ({"positions": "relative", "relative_buckets": 3}, "relative_buckets must be at least 4"),
        (
            {"positions": "relative", "relative_max_distance": 16},
            r"relative_max_distance must be above half of model.relative_buckets \(32\), not 16",
        ),
        ({"local_rotary_base": 10.0}, "local_rotary_base has no effect without model.sliding_w"),
        (
            {"local_rotary_base": 10.0, "sliding_window": 4, "positions": "none"},
            "local_rotary_base has no effect with positions 'none'",
        ),
        ({"rotary_base": 0.0}, "rotary_base must be above 0"),
        ({"global_layers": (1,)}, "global_layers has no effect without model.sliding_window"),
        (
            {"global_layers": (0, 2), "sliding_window": 4},
            "global_layers names block 2, but there are 2, counted from 0",
        ),
        (
            {"positions": "learned", "rotary_scaling": RotaryScaling("linear", 2.0)},
            "rotary_scaling has no effect with positions 'learned'",
        ),
        ({"rotary_scaling": {"kind": "yarm", "factor": 2.0}}, "'yarm'.*Did you mean 'yarn'"),
        ({"rotary_scaling": RotaryScaling("linear", 0.5)}, "factor must be at least 1, not 0.5"),
        ({"rotary_scaling": RotaryScaling("yarn", 2.0)}, "'yarn' needs original_positions"),
        (
            {"rotary_scaling": RotaryScaling("llama3", 2.0, 64, 4.0, 1.0)},
            "'llama3' needs bounds above 0 in ascending order, not 4.0 and 1.0",
        ),
    ],
)
def test_an_architecture_that_does_not_fit_is_refused(options: dict[str, Any], message: str):
    with pytest.raises(UsageError, match=message):
        config(**options)


def test_an_architecture_survives_json():
    scaling = RotaryScaling("yarn", 4.0, 100)
    c = config(sliding_window=4, global_layers=(1,), rotary_scaling=scaling)
    read = TransformerConfig(**json.loads(json.dumps(dataclasses.asdict(c))))
    assert read == c and hash(read) == hash(c)


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
@pytest.mark.parametrize(("softcap", "scale"), [(0.0, 1.0), (2.5, 1.0), (1.0, 0.4)])
@pytest.mark.parametrize("bias", [False, True])
def test_scores_of_tokens_are_products_with_their_vectors(
    tie: bool, softcap: float, scale: float, bias: bool
):
    model = small_model(
        architecture="decoder",
        head="language_modelling",
        tie_embeddings=tie,
        logit_softcap=softcap,
        logit_scale=scale,
        logit_bias=bias,
    )
    batch = pack(random_sequences([4, 7]))
    outputs = model(batch)
    assert isinstance(outputs, TokenOutputs)
    weight = model.embedding.tokens.weight if tie else model.head.scorer.weight
    hidden = model.decoder(model.embed(batch), batch)
    expected = hidden @ weight.T * scale
    if bias:
        expected = expected + model.head.bias
    if softcap:
        expected = softcap * torch.tanh(expected / softcap)
        assert float(expected.detach().abs().max()) > 0.8 * softcap  # or there was nothing to bound
    torch.testing.assert_close(outputs.scores(), expected, rtol=1e-4, atol=1e-4)
    rows = torch.tensor([10, 0, 3])
    torch.testing.assert_close(outputs.scores(rows), expected[rows], rtol=1e-4, atol=1e-4)
    assert ("scorer.weight" in dict(model.head.named_parameters())) is not tie
    # The bias is kept with the weights and is none of them.
    assert ("head.bias" in model.state_dict()) is bias
    assert "head.bias" not in dict(model.named_parameters())


PREPARING: list[dict[str, Any]] = [
    {},
    {"head_activation": "tanh"},
    {"head_activation": "relu", "bias": False, "head_bias": False},
    {"head_activation": "gelu", "head_norm": True},
]


def prepared(model: Transformer, x: Tensor) -> Tensor:
    """What a head's last matrix is given, from what the options say."""
    c, head = model.config, model.head
    if c.head_activation != "none":
        nonlinear = {"tanh": torch.tanh, **NONLINEAR}[c.head_activation]
        x = x @ head.dense.weight.T
        x = nonlinear(x + head.dense.bias if c.bias else x)
    return F.layer_norm(x, (32,), head.norm.weight, head.norm.bias) if c.head_norm else x


@pytest.mark.parametrize("options", PREPARING)
def test_a_span_head_scores_every_token_twice(options: dict[str, Any]):
    model = small_model(head="span", **options)
    batch = pack(random_sequences([4, 7]))
    hidden = prepared(model, model.encoder(model.embed(batch), batch))
    scorer = model.head.scorer
    expected = hidden @ scorer.weight.T + (0 if scorer.bias is None else scorer.bias)
    torch.testing.assert_close(model(batch), expected)
    assert (scorer.bias is not None) == options.get("head_bias", True)


@pytest.mark.parametrize("options", PREPARING)
@pytest.mark.parametrize(("pooling", "rows"), [("first", [0, 4]), ("last", [3, 10])])
def test_a_classification_head_looks_at_one_token(
    options: dict[str, Any], pooling: str, rows: list[int]
):
    model = small_model(pooling=pooling, **options)
    batch = pack(random_sequences([4, 7]))
    hidden = prepared(model, model.encoder(model.embed(batch), batch)[rows])
    classifier = model.head.classifier
    expected = hidden @ classifier.weight.T + (0 if classifier.bias is None else classifier.bias)
    torch.testing.assert_close(model(batch), expected)
    assert (classifier.bias is not None) == options.get("head_bias", True)


@pytest.mark.parametrize("architecture", ["decoder", "encoder_decoder"])
@pytest.mark.parametrize("placement", ["pre", "post", "sandwich"])
@pytest.mark.parametrize("first_norm", [True, False])
def test_norms_stand_where_they_are_placed(architecture: str, placement: str, first_norm: bool):
    options = {"norm_placement": placement, "architecture": architecture, "num_layers": 1}
    if not first_norm and placement == "post":
        pytest.skip("a norm after the sum is not before the first block")
    model = small_model(**options, first_norm=first_norm)
    block, layout = model.decoder.blocks[0], SequenceLayout.from_lengths([3])
    x = torch.randn(3, 32)
    branches = [("attention", lambda h: h @ seen[0]), ("feed_forward", block.feed_forward)]
    if architecture == "encoder_decoder":
        branches.insert(1, ("source", lambda h: h @ seen[1]))
    seen = torch.randn(2, 32, 32)
    expected = x
    for name, branch in branches:
        norm, end_norm = getattr(block, f"{name}_norm"), getattr(block, f"{name}_end_norm")
        if placement == "post":
            expected = norm(expected + branch(expected))
            continue
        given = expected if norm is None else norm(expected)
        added = branch(given)
        expected = expected + (end_norm(added) if placement == "sandwich" else added)
    assert (block.attention_norm is None) is not first_norm
    assert (block.attention_end_norm is not None) == (placement == "sandwich")
    found = block.run(x, layout, lambda _, h: h @ seen[0], lambda _, h: h @ seen[1])
    torch.testing.assert_close(found, expected)
    assert (model.decoder.final_norm is None) == (placement == "post")


def test_source_and_target_share_embeddings_unless_their_vocabularies_differ():
    shared = small_model(architecture="encoder_decoder")
    assert shared.source_embedding is None
    own = small_model(architecture="encoder_decoder", source_vocab_size=55)
    assert own.source_embedding.tokens.weight.shape == (55, 32)
    assert own.embedding.tokens.weight.shape == (VOCAB, 32)
    for model, wanted in ((shared, shared.embedding), (own, own.source_embedding)):
        source = pack(random_sequences([6]))
        x = wanted(source.token_ids)
        torch.testing.assert_close(model.encode(source), model.encoder(x, source))
