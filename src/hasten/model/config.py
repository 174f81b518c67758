"""The architecture as data: what a Transformer is made of, checked once when it is written down."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from hasten.core.errors import UsageError, nearest

Norm = Literal["layernorm", "rmsnorm"]
NormPlacement = Literal["pre", "post", "sandwich"]
Positions = Literal["rotary", "learned", "sinusoidal", "relative", "none"]
Sinusoids = Literal["interleaved", "halves", "tensor2tensor"]
ScalingKind = Literal["linear", "llama3", "yarn"]
Activation = Literal[
    "gelu", "gelu_tanh", "relu", "relu_squared", "silu", "swiglu", "geglu", "geglu_tanh"
]
HeadActivation = Literal["none", "tanh", "relu", "gelu"]
Pooling = Literal["first", "last", "mean", "attention"]
Architecture = Literal["encoder", "decoder", "encoder_decoder"]
Head = Literal["classification", "language_modelling", "span"]


@dataclass(frozen=True)
class RotaryScaling:
    """How rotary frequencies are stretched for sequences longer than those of pretraining.

    Attributes:
        kind: linear divides all of them by ``factor`` (Chen et al. 2023); llama3 only the low
            ones, with a smooth passage (Llama 3.1, 2024); yarn by a ramp over dimensions, with
            attention scaled (Peng et al. 2023).
        factor: by which sequences grow.
        original_positions: longest sequence of pretraining.
        low_frequency_factor: llama3: turns over ``original_positions`` up to which frequencies are
            stretched.
        high_frequency_factor: llama3: turns from which on they stay.
        beta_fast: yarn: turns over ``original_positions`` from which on frequencies stay.
        beta_slow: yarn: turns up to which they are stretched.
        attention_factor: yarn: factor on cosines and sines; None for ``0.1 ln(factor) + 1``.
    """

    kind: ScalingKind
    factor: float
    original_positions: int = 0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None


@dataclass(frozen=True)
class TransformerConfig:
    """A stack of blocks, or an encoder and a decoder, and the head on top.

    Attributes:
        vocab_size: number of token embeddings V.
        num_layers: number of blocks; of the encoder, where there is a decoder too.
        hidden_size: width D of the residual stream.
        num_heads: attention heads H.
        head_dim: dimensions C of each head; None for ``hidden_size / num_heads``.
        num_kv_heads: key and value heads, each shared by ``num_heads / num_kv_heads`` query
            heads (grouped-query attention, Ainslie et al. 2023); None for as many as heads.
        feed_forward_size: inner width of the feed-forward; None for 4 D, or 8/3 D rounded up to
            a multiple of 16 with a gate, whose third matrix then costs nothing extra.
        activation: of the feed-forward. relu_squared is So et al. 2021, swiglu and geglu (a product
            of two matrices, one through SiLU or GELU) Shazeer 2020; gelu is exact, gelu_tanh its
            approximation (Hendrycks and Gimpel 2016).
        norm: layernorm, or rmsnorm (Zhang and Sennrich 2019).
        norm_placement: pre (inside the residual branch), post (after the sum, as in 2017), or
            sandwich (before the branch and after it, Ding et al. 2021).
        norm_epsilon: added to the variance.
        first_norm: whether the first block's attention has a norm before it, which an
            ``embedding_norm`` makes needless (ModernBERT).
        embedding_norm: whether the embeddings' sum is normalised; None for where norms are post.
        embedding_size: width E of the embeddings, mapped to D by a matrix; None for D.
        embedding_scale: factor on the embeddings of tokens; None for the square root of their
            width with sinusoidal positions, and 1 otherwise.
        positions: rotary (Su et al. 2021), learned, sinusoidal (Vaswani et al. 2017), relative (a
            learned bias of each head for distances in buckets, Raffel et al. 2020), or none.
        sinusoids: how the table of sinusoidal positions is laid out: sines and cosines interleaved,
            in two halves, or halves whose frequencies end at 1/10000 (tensor2tensor).
        position_offset: rows of the table of positions before that of position 0 (RoBERTa, BART).
        relative_buckets: buckets of relative positions.
        relative_max_distance: distance from which on all share the last bucket.
        rotary_base: base of the rotary frequencies.
        local_rotary_base: that of blocks with a sliding window; None for ``rotary_base``.
        rotary_scaling: how frequencies are stretched for long sequences, in blocks without a
            window where ``local_rotary_base`` is set; None for not at all.
        max_positions: longest sequence the model takes.
        num_token_types: number of segment embeddings; 0 for none.
        qk_norm: RMS-normalise queries and keys per head (Henry et al. 2020).
        bias: whether linear layers and norms have biases.
        qkv_bias: whether queries, keys and values have; None for ``bias``.
        output_bias: whether the matrix after attention has; None for ``bias``.
        dropout: rate on the embeddings' sum and on the output of every residual branch.
        attention_dropout: rate on the attention weights.
        token_dropout: rate at which a token's whole embedding is zeroed in training.
        architecture: encoder (a token sees its whole sequence), decoder (it sees what comes before
            it), or encoder_decoder (a decoder that also looks at an encoded source).
        num_decoder_layers: blocks of the decoder of an encoder_decoder; None for ``num_layers``.
        source_vocab_size: token embeddings of the encoder of an encoder_decoder; None where source
            and target share theirs.
        sliding_window: how many tokens one token of a decoder sees, itself included (Beltagy et al.
            2020); a token of an encoder sees half as many on either side, rounded down. 0 for all.
            The encoder of an encoder_decoder has no window.
        global_layers: numbers of the blocks that see everything in spite of ``sliding_window``.
        attention_scale: factor on attention scores; None for ``C ** -0.5``.
        attention_softcap: attention scores are bounded by ``cap * tanh(score / cap)`` (Gemma 2);
            0 for none.
        logit_softcap: the same for the scores of tokens.
        logit_scale: factor on the scores of tokens.
        logit_bias: whether a fixed bias is added to the scores of tokens (Marian).
        tie_embeddings: score tokens with their own embeddings (Press and Wolf 2017).
        stochastic_depth: rate at which a sequence skips the last block's branches; it grows
            linearly from 0 at the first block (Huang et al. 2016).
        initializer_std: standard deviation of the initial weights; embeddings included.
        zero_init_residual: start the last matrix of every residual branch at zero, so that the
            model starts as a sum of embeddings (Zhang et al. 2019, "Fixup").
        head: classification of sequences, language_modelling (a score for each token of the
            vocabulary), or span (a score for each token to begin and to end an answer).
        num_labels: classes of the classification head.
        pooling: how a sequence becomes one vector: its first or last token, the mean, or a learned
            attention over its tokens.
        head_activation: what follows a D x D matrix between the vector and the classifier (and of
            span heads, between token and scorer); none for no such matrix.
        head_norm: whether a norm follows that.
        head_bias: whether the classifier, or the scorer of spans, has a bias.
        head_dropout: rate before the head; None for the value of ``dropout``.
        unused: rates of a pretrained model that act in training alone and that no module has, by
            their names there; kept so that what is written back is what was read.
    """

    vocab_size: int
    num_layers: int
    hidden_size: int
    num_heads: int
    head_dim: int | None = None
    num_kv_heads: int | None = None
    feed_forward_size: int | None = None
    activation: Activation = "gelu"
    norm: Norm = "layernorm"
    norm_placement: NormPlacement = "pre"
    norm_epsilon: float = 1e-5
    first_norm: bool = True
    embedding_norm: bool | None = None
    embedding_size: int | None = None
    embedding_scale: float | None = None
    architecture: Architecture = "encoder"
    num_decoder_layers: int | None = None
    source_vocab_size: int | None = None
    sliding_window: int = 0
    global_layers: tuple[int, ...] = ()
    attention_scale: float | None = None
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    logit_scale: float = 1.0
    logit_bias: bool = False
    tie_embeddings: bool = True
    positions: Positions = "rotary"
    sinusoids: Sinusoids = "interleaved"
    position_offset: int = 0
    relative_buckets: int = 32
    relative_max_distance: int = 128
    rotary_base: float = 10000.0
    local_rotary_base: float | None = None
    rotary_scaling: RotaryScaling | None = None
    max_positions: int = 512
    num_token_types: int = 0
    qk_norm: bool = False
    bias: bool = True
    qkv_bias: bool | None = None
    output_bias: bool | None = None
    dropout: float = 0.1
    attention_dropout: float = 0.0
    token_dropout: float = 0.0
    stochastic_depth: float = 0.0
    initializer_std: float = 0.02
    zero_init_residual: bool = False
    head: Head = "classification"
    num_labels: int = 2
    pooling: Pooling = "mean"
    head_activation: HeadActivation = "none"
    head_norm: bool = False
    head_bias: bool = True
    head_dropout: float | None = None
    unused: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        """Checks the values against each other.

        Raises:
            UsageError: naming the field that does not fit and what would.
        """
        # As JSON has them, which knows neither tuples nor classes.
        object.__setattr__(self, "global_layers", tuple(self.global_layers))
        object.__setattr__(self, "unused", tuple((name, rate) for name, rate in self.unused))
        if isinstance(self.rotary_scaling, Mapping):
            object.__setattr__(self, "rotary_scaling", RotaryScaling(**self.rotary_scaling))
        _check_ranges(self)
        _check_choices(self)
        _check_heads(self)
        _check_embeddings(self)
        if self.rotary_scaling is not None:
            _check_scaling(self.rotary_scaling)
        layers = self.decoder_layers or self.num_layers
        for number in self.global_layers:
            if not 0 <= number < layers:
                raise UsageError(
                    f"model.global_layers names block {number}, but there are {layers}, "
                    "counted from 0."
                )

    @property
    def head_size(self) -> int:
        """Dimensions of one attention head."""
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def decoder_layers(self) -> int:
        """Number of blocks of the decoder; 0 without one."""
        if self.architecture == "encoder":
            return 0
        return self.num_decoder_layers or self.num_layers

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads."""
        return self.num_kv_heads or self.num_heads

    @property
    def is_gated(self) -> bool:
        """Whether the feed-forward has a third matrix."""
        return self.activation in ("swiglu", "geglu", "geglu_tanh")

    @property
    def inner_size(self) -> int:
        """Inner width of the feed-forward."""
        if self.feed_forward_size is not None:
            return self.feed_forward_size
        if self.is_gated:
            return -(-8 * self.hidden_size // 3 // 16) * 16
        return 4 * self.hidden_size

    @property
    def embedding_width(self) -> int:
        """Width E of the embeddings."""
        return self.embedding_size or self.hidden_size

    @property
    def has_embedding_norm(self) -> bool:
        """Whether the embeddings' sum is normalised."""
        # Post-norm leaves it unnormalised otherwise.
        return self.norm_placement == "post" if self.embedding_norm is None else self.embedding_norm

    @property
    def embedding_factor(self) -> float:
        """Factor on the embeddings of tokens."""
        if self.embedding_scale is not None:
            return self.embedding_scale
        # It keeps the tokens from drowning in the table (Vaswani et al. 2017, section 3.4).
        return math.sqrt(self.embedding_width) if self.positions == "sinusoidal" else 1.0


def _check_ranges(config: TransformerConfig) -> None:
    for name, least in _SIZES.items():
        value = getattr(config, name)
        if value is not None and value < least:
            raise UsageError(f"model.{name} must be at least {least}, not {value}.")
    for name in ("attention_softcap", "logit_softcap", "sliding_window"):
        if getattr(config, name) < 0:
            raise UsageError(f"model.{name} must not be negative (0 is off).")
    for name in _POSITIVE:
        value = getattr(config, name)
        if value is not None and value <= 0:
            raise UsageError(f"model.{name} must be above 0, not {value}.")
    for name in _RATES:
        value = getattr(config, name)
        if value is not None and not 0.0 <= value < 1.0:
            raise UsageError(f"model.{name} must lie in [0, 1), not {value}.")


def _check_choices(config: TransformerConfig) -> None:
    for name, kind in _CHOICES.items():
        value, choices = getattr(config, name), get_args(kind)
        if value not in choices:
            raise UsageError(
                f"model.{name} is '{value}'; choose one of {', '.join(choices)}."
                f"{nearest(str(value), choices)}"
            )
    for name, (field, fitting) in _ONLY_WITH.items():
        is_set = getattr(config, name) not in (getattr(TransformerConfig, name), None)
        if is_set and getattr(config, field) not in fitting:
            raise UsageError(
                f"model.{name} has no effect with {field} '{getattr(config, field)}'; leave it out."
            )
    for name, field in _NEEDS.items():
        if getattr(config, name) and not getattr(config, field):
            raise UsageError(f"model.{name} has no effect without model.{field}; leave it out.")


def _check_heads(config: TransformerConfig) -> None:
    size, heads = config.hidden_size, config.num_heads
    if config.head_dim is None and size % heads:
        fits = [h for h in range(1, size + 1) if size % h == 0]
        closest = min(fits, key=lambda h: abs(h - heads))
        raise UsageError(
            f"model.hidden_size {size} is not a multiple of model.num_heads {heads}; {closest} "
            "heads would fit."
        )
    if heads % config.kv_heads:
        raise UsageError(
            f"model.num_heads {heads} is not a multiple of model.num_kv_heads {config.kv_heads}."
        )
    if config.positions == "rotary" and config.head_size % 2:
        origin = f"model.hidden_size {size} / model.num_heads {heads}"
        raise UsageError(
            f"rotary positions need an even head size, not {config.head_size} "
            f"({origin if config.head_dim is None else 'model.head_dim'})."
        )


def _check_embeddings(config: TransformerConfig) -> None:
    width = config.embedding_width
    scores_tokens = config.head == "language_modelling"
    if scores_tokens and config.tie_embeddings and width != config.hidden_size:
        raise UsageError(
            f"embeddings of width {width} cannot score hidden states of width "
            f"{config.hidden_size}: set model.tie_embeddings to false or leave out "
            "model.embedding_size."
        )
    if config.sinusoids == "tensor2tensor" and (width % 2 or width < 4):
        raise UsageError(
            f"the sinusoids of tensor2tensor need an even width from 4 on, not {width}."
        )
    # The first half of one direction's buckets hold a distance each; the last of all is shared.
    if config.positions == "relative" and config.relative_max_distance <= (
        config.relative_buckets // 2
    ):
        raise UsageError(
            f"model.relative_max_distance must be above half of model.relative_buckets "
            f"({config.relative_buckets}), not {config.relative_max_distance}."
        )


def _check_scaling(scaling: RotaryScaling) -> None:
    kinds = get_args(ScalingKind)
    if scaling.kind not in kinds:
        raise UsageError(
            f"model.rotary_scaling is '{scaling.kind}'; choose one of {', '.join(kinds)}."
            f"{nearest(str(scaling.kind), kinds)}"
        )
    if scaling.factor < 1:
        raise UsageError(
            f"model.rotary_scaling.factor must be at least 1, not {scaling.factor}: sequences grow."
        )
    if scaling.kind == "linear":
        return
    if scaling.original_positions < 1:
        raise UsageError(
            f"model.rotary_scaling '{scaling.kind}' needs original_positions, the longest sequence "
            "of pretraining."
        )
    low, high = {
        "llama3": (scaling.low_frequency_factor, scaling.high_frequency_factor),
        "yarn": (scaling.beta_slow, scaling.beta_fast),
    }[scaling.kind]
    if not 0 < low < high:
        raise UsageError(
            f"model.rotary_scaling '{scaling.kind}' needs bounds above 0 in ascending order, not "
            f"{low} and {high}."
        )


_SIZES = {
    "vocab_size": 1,
    "num_layers": 1,
    "hidden_size": 1,
    "num_heads": 1,
    "head_dim": 1,
    "num_kv_heads": 1,
    "feed_forward_size": 1,
    "embedding_size": 1,
    "max_positions": 1,
    "position_offset": 0,
    "relative_buckets": 4,
    "relative_max_distance": 1,
    "num_token_types": 0,
    "num_labels": 1,
    "num_decoder_layers": 1,
    "source_vocab_size": 1,
}
_POSITIVE = (
    "rotary_base",
    "local_rotary_base",
    "attention_scale",
    "embedding_scale",
    "logit_scale",
)
_RATES = ("dropout", "attention_dropout", "token_dropout", "stochastic_depth", "head_dropout")
_CHOICES = {
    "activation": Activation,
    "norm": Norm,
    "norm_placement": NormPlacement,
    "positions": Positions,
    "sinusoids": Sinusoids,
    "pooling": Pooling,
    "head_activation": HeadActivation,
    "architecture": Architecture,
    "head": Head,
}
# Options that mean nothing elsewhere: a person who sets one expects something of it.
_ONLY_WITH = {
    "num_decoder_layers": ("architecture", ("encoder_decoder",)),
    "source_vocab_size": ("architecture", ("encoder_decoder",)),
    "first_norm": ("norm_placement", ("pre", "sandwich")),
    "sinusoids": ("positions", ("sinusoidal",)),
    "position_offset": ("positions", ("learned", "sinusoidal")),
    "relative_buckets": ("positions", ("relative",)),
    "relative_max_distance": ("positions", ("relative",)),
    "local_rotary_base": ("positions", ("rotary",)),
    "rotary_scaling": ("positions", ("rotary",)),
    "logit_softcap": ("head", ("language_modelling",)),
    "logit_scale": ("head", ("language_modelling",)),
    "logit_bias": ("head", ("language_modelling",)),
    "head_activation": ("head", ("classification", "span")),
    "head_norm": ("head_activation", ("tanh", "relu", "gelu")),
    "head_bias": ("head", ("classification", "span")),
}
_NEEDS = {"global_layers": "sliding_window", "local_rotary_base": "sliding_window"}
