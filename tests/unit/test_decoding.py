"""Continuing with a cache gives what reading everything anew would give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from builders import VOCAB, default_dtype, merged, pack, random_sequences, small_model
from hasten.core.errors import UsageError
from hasten.model.config import RotaryScaling
from hasten.model.decoding import CachedDecoder
from hasten.model.heads import TokenOutputs
from hasten.model.search import Decoded, DecodingSettings, Request, generate
from hasten.model.transformer import Transformer

END = 0
WINDOWS = st.sampled_from(
    [
        {},
        {"sliding_window": 1},
        {"sliding_window": 3, "global_layers": (0,)},
        {"sliding_window": 8},
    ]
)
POSITIONS = st.sampled_from(
    [
        {"positions": "rotary"},
        {"positions": "rotary", "rotary_scaling": RotaryScaling("llama3", 4.0, 20)},
        {"sliding_window": 3, "global_layers": (0,), "local_rotary_base": 50.0},
        {"positions": "learned", "position_offset": 2},
        {"positions": "sinusoidal", "sinusoids": "tensor2tensor", "position_offset": 1},
        {"positions": "relative", "relative_buckets": 8, "attention_scale": 1.0},
        {"positions": "none", "embedding_scale": 2.0},
    ]
)
SHARED = {
    "head": st.just("language_modelling"),
    "norm": st.sampled_from(["layernorm", "rmsnorm"]),
    "norm_placement": st.sampled_from(["pre", "post", "sandwich"]),
    "embedding_norm": st.sampled_from([None, True]),
    "qk_norm": st.booleans(),
    "num_kv_heads": st.sampled_from([None, 1, 2]),
    "head_dim": st.sampled_from([None, 6]),
    "bias": st.booleans(),
    "attention_softcap": st.sampled_from([0.0, 2.0]),
    "logit_softcap": st.sampled_from([0.0, 3.0]),
    "logit_scale": st.sampled_from([1.0, 0.3]),
    "logit_bias": st.booleans(),
    "tie_embeddings": st.booleans(),
}


OF_DECODERS = {"architecture": st.just("decoder"), **SHARED}
DECODER = merged(WINDOWS, POSITIONS, st.fixed_dictionaries(OF_DECODERS))
OF_TRANSLATORS = {
    "architecture": st.just("encoder_decoder"),
    **SHARED,
    "num_decoder_layers": st.sampled_from([None, 1]),
    "source_vocab_size": st.sampled_from([None, VOCAB + 3]),
}
TRANSLATOR = merged(WINDOWS, POSITIONS, st.fixed_dictionaries(OF_TRANSLATORS))
# Each prompt with its source; an encoder-decoder begins with one token or with several.
PROMPTS = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4)
# None appends a token; numbers say, modulo the number of rows, which rows are kept.
MOVES = st.lists(
    st.one_of(st.none(), st.none(), st.lists(st.integers(0, 7), min_size=1, max_size=5)),
    max_size=8,
)


class Uncached:
    """The same sequences, read from their beginning each time."""

    def __init__(
        self, model: Transformer, prompts: Sequence[Tensor], sources: Sequence[Tensor] | None
    ) -> None:
        self.model, self.rows = model, list(prompts)
        self.sources = None if sources is None else list(sources)

    @property
    def logits(self) -> Tensor:
        batch = pack(self.rows, sources=self.sources)
        with torch.inference_mode():
            outputs = self.model(batch)
        assert isinstance(outputs, TokenOutputs)
        return outputs.scores(batch.layout.offsets[1:].long() - 1)

    def advance(self, tokens_B: Tensor) -> None:
        self.rows = [torch.cat([row, t[None]]) for row, t in zip(self.rows, tokens_B, strict=True)]
        if self.sources is None:
            most = self.model.config.max_positions
            half = max(1, most // 2)
            self.rows = [row[-half:] if len(row) > most else row for row in self.rows]

    def select(self, rows: Tensor) -> None:
        self.rows = [self.rows[i] for i in rows.tolist()]
        if self.sources is not None:
            self.sources = [self.sources[i] for i in rows.tolist()]


def build(options: dict[str, Any], dtype: torch.dtype = torch.float64) -> Transformer:
    with default_dtype(dtype):
        return small_model(**options)


def inputs(
    model: Transformer, lengths: Sequence[tuple[int, int]]
) -> tuple[list[Tensor], list[Tensor] | None]:
    """Prompts and, for an encoder-decoder, sources of the given lengths."""
    prompts = random_sequences([prompt for prompt, _ in lengths])
    if model.config.architecture == "decoder":
        return prompts, None
    sources = random_sequences([source for _, source in lengths], seed=1)
    if model.config.source_vocab_size:
        sources = [source + 3 for source in sources]  # ids that only the source's vocabulary has
    return prompts, sources


def both(model: Transformer, lengths: Sequence[tuple[int, int]]) -> tuple[CachedDecoder, Uncached]:
    prompts, sources = inputs(model, lengths)
    return CachedDecoder(model, pack(prompts, sources=sources)), Uncached(model, prompts, sources)


def assert_same(cached: CachedDecoder, plain: Uncached) -> None:
    assert cached.logits.dtype == torch.float64
    torch.testing.assert_close(cached.logits, plain.logits, rtol=1e-10, atol=1e-10)


def check(
    options: dict[str, Any],
    lengths: Sequence[tuple[int, int]],
    moves: Sequence[Sequence[int] | None],
) -> None:
    cached, plain = both(build(options), lengths)
    assert_same(cached, plain)
    generator = torch.Generator().manual_seed(7)
    for move in moves:
        num_rows = len(plain.rows)
        if move is None:
            given_B = torch.randint(VOCAB, (num_rows,), generator=generator)
        else:
            given_B = torch.tensor([i % num_rows for i in move])
        for decoder in (cached, plain):
            decoder.advance(given_B) if move is None else decoder.select(given_B)
        assert_same(cached, plain)


# Cached and uncached


@settings(max_examples=60)
@given(DECODER, PROMPTS, MOVES)
def test_a_decoder_with_its_cache(options, lengths, moves):
    check(options, lengths, moves)


@settings(max_examples=60)
@given(TRANSLATOR, PROMPTS, MOVES)
def test_an_encoder_decoder_with_its_cache(options, lengths, moves):
    check(options, lengths, moves)


@pytest.mark.parametrize("architecture", ["decoder", "encoder_decoder"])
@pytest.mark.parametrize("sliding_window", [0, 5])
def test_a_cache_that_has_to_grow(architecture: str, sliding_window: int):
    options = {
        "architecture": architecture,
        "head": "language_modelling",
        "sliding_window": sliding_window,
        "num_kv_heads": 2,
    }
    moves = [None] * 34 + [[1, 1, 0]] + [None] * 45
    check(options, [(1, 4), (150, 200)], moves)  # too unlike to be padded to one rectangle


def test_scores_of_half_precision_are_widened():
    model = build({"architecture": "decoder", "head": "language_modelling"}, torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        decoder = CachedDecoder(model.to(dtype), pack(random_sequences([3])))
        assert decoder.logits.dtype == torch.float32


# A full context


@settings(max_examples=40)
@given(
    st.sampled_from(["rotary", "learned", "sinusoidal", "relative"]),
    st.sampled_from([0, 3]),
    st.integers(1, 9),
    st.data(),
)
def test_a_full_sequence_goes_on_from_its_second_half(positions, window, most, data):
    """Whatever fills up, all rows equal those that are read anew, and so each alone."""
    options = {
        "architecture": "decoder",
        "head": "language_modelling",
        "positions": positions,
        "sliding_window": window,
        "max_positions": most,
    }
    lengths = data.draw(st.lists(st.integers(1, most), min_size=1, max_size=4))
    moves = data.draw(
        st.lists(
            st.one_of(*[st.none()] * 4, st.lists(st.integers(0, 7), min_size=1, max_size=4)),
            max_size=2 * most + 2,
        )
    )
    check(options, [(n, 1) for n in lengths], moves)


def test_the_second_half_is_a_fresh_prompt_and_others_are_not_touched():
    options = {"architecture": "decoder", "head": "language_modelling", "max_positions": 8}
    model = build(options)
    full, short = random_sequences([8, 3])
    together = CachedDecoder(model, pack([full, short]))
    together.advance(torch.tensor([5, 6]))
    # Nine tokens do not fit: the last four are kept.
    kept = torch.cat([full[5:], torch.tensor([5])])
    grown = torch.cat([short, torch.tensor([6])])
    fresh = CachedDecoder(model, pack([kept]))
    alone = CachedDecoder(model, pack([short]))
    alone.advance(torch.tensor([6]))
    for _ in range(3):
        torch.testing.assert_close(together.logits[:1], fresh.logits, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(together.logits[1:], alone.logits, rtol=1e-10, atol=1e-10)
        tokens = together.logits.argmax(-1)
        together.advance(tokens)
        fresh.advance(tokens[:1])
        alone.advance(tokens[1:])
    assert len(kept) == len(grown) == 4  # both fill up again only later


def test_what_cannot_be_continued_is_refused():
    encoder = small_model()
    with pytest.raises(UsageError, match="only a decoder"):
        CachedDecoder(encoder, pack(random_sequences([3])))
    options = {"head": "language_modelling", "max_positions": 4}
    model = small_model(architecture="decoder", **options)
    with pytest.raises(UsageError, match=r"prompt of 5 tokens .* 4 positions; shorten it"):
        CachedDecoder(model, pack(random_sequences([2, 5])))
    translator = small_model(architecture="encoder_decoder", **options)
    with pytest.raises(UsageError, match="5 tokens"):
        CachedDecoder(translator, pack(random_sequences([1]), sources=random_sequences([5])))
    # A translation has no past that could be left out.
    decoder = CachedDecoder(translator, pack(random_sequences([4]), sources=random_sequences([4])))
    with pytest.raises(UsageError, match=r"4 positions.*--max-new-tokens"):
        decoder.advance(torch.tensor([1]))


# Whatever else is in the batch

SEARCHES = {
    "greedy": DecodingSettings(max_new_tokens=12),
    "beams": DecodingSettings(max_new_tokens=12, num_beams=3, num_return=2, length_penalty=0.7),
    "drawn": DecodingSettings(max_new_tokens=12, temperature=0.9, top_k=20, top_p=0.95),
    "drawn twice": DecodingSettings(max_new_tokens=12, temperature=1.5, num_return=2, seed=3),
    "without repetition": DecodingSettings(max_new_tokens=12, repetition_penalty=1.5),
}


def search(
    model: Transformer,
    prompts: Sequence[Tensor],
    sources: Sequence[Tensor] | None,
    search_settings: DecodingSettings,
    numbers: Sequence[int],
) -> list[list[Decoded]]:
    batch = pack(
        [prompts[i] for i in numbers],
        sources=None if sources is None else [sources[i] for i in numbers],
    )
    return generate(
        CachedDecoder(model, batch),
        search_settings,
        [Request(i, prompts[i].tolist()) for i in numbers],
        end_ids=frozenset({END}),
    )


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("architecture", ["decoder", "encoder_decoder"])
@settings(max_examples=10)
@given(lengths=PROMPTS, seed=st.integers(0, 1000), positions=st.sampled_from(["rotary", "learned"]))
def test_a_batch_finds_what_each_finds_alone(name, architecture, lengths, seed, positions):
    options = {
        "architecture": architecture,
        "head": "language_modelling",
        "positions": positions,
        "max_positions": 32 if architecture == "encoder_decoder" else 10,  # decoders fill up
        "initializer_std": 0.2,
        "seed": seed,
    }
    model = build(options)
    prompts, sources = inputs(model, lengths)
    numbers = range(len(prompts))
    together = search(model, prompts, sources, SEARCHES[name], numbers)
    for i in numbers:
        (alone,) = search(model, prompts, sources, SEARCHES[name], [i])
        assert [d.token_ids for d in together[i]] == [d.token_ids for d in alone]
        assert [d.finished for d in together[i]] == [d.finished for d in alone]
        scores = [d.score for d in alone]
        assert [d.score for d in together[i]] == pytest.approx(scores, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("architecture", ["decoder", "encoder_decoder"])
@settings(max_examples=15)
@given(lengths=PROMPTS, seed=st.integers(0, 1000))
def test_single_precision_agrees_but_for_rounding(architecture, lengths, seed):
    options = {
        "architecture": architecture,
        "head": "language_modelling",
        "initializer_std": 0.1,
        "seed": seed,
    }
    model = build(options, torch.float32)
    prompts, sources = inputs(model, lengths)
    together = CachedDecoder(model, pack(prompts, sources=sources))
    alone = [
        CachedDecoder(model, pack([prompts[i]], sources=None if sources is None else [sources[i]]))
        for i in range(len(prompts))
    ]
    for _ in range(10):
        expected = torch.cat([decoder.logits for decoder in alone])
        torch.testing.assert_close(together.logits, expected, rtol=0, atol=1e-4)
        best = expected.topk(2).values
        is_clear = best[:, 0] - best[:, 1] > 2e-4
        tokens_B = expected.argmax(-1)
        assert torch.equal(together.logits.argmax(-1)[is_clear], tokens_B[is_clear])
        together.advance(tokens_B)
        for i, decoder in enumerate(alone):
            decoder.advance(tokens_B[i : i + 1])
