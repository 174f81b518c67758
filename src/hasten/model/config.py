"""The architecture as data: what a Transformer is made of, checked once when it is written down."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from hasten.core.errors import UsageError, nearest

Norm = Literal["layernorm", "rmsnorm"]
NormPlacement = Literal["pre", "post"]
Positions = Literal["rotary", "learned", "sinusoidal"]
Activation = Literal["gelu", "relu", "relu_squared", "swiglu"]
Pooling = Literal["first", "mean", "attention"]
Architecture = Literal["encoder", "decoder", "encoder_decoder"]
Head = Literal["classification", "language_modelling", "span"]


@dataclass(frozen=True)
class TransformerConfig:
    """A stack of blocks, or an encoder and a decoder, and the head on top.

    Attributes:
        vocab_size: number of token embeddings V.
        num_layers: number of blocks; of the encoder, where there is a decoder too.
        hidden_size: width D of the residual stream.
        num_heads: attention heads H; each has ``hidden_size / num_heads`` dimensions.
        num_kv_heads: key and value heads, each shared by ``num_heads / num_kv_heads`` query
            heads (grouped-query attention, Ainslie et al. 2023); None for as many as heads.
        feed_forward_size: inner width of the feed-forward; None for 4 D, or 8/3 D rounded up to
            a multiple of 16 with swiglu, whose third matrix then costs nothing extra.
        activation: of the feed-forward. relu_squared is So et al. 2021, swiglu Shazeer 2020.
        norm: layernorm, or rmsnorm (Zhang and Sennrich 2019).
        norm_placement: pre (inside the residual branch) or post (after the sum, as in 2017).
        norm_epsilon: added to the variance.
        positions: rotary (Su et al. 2021), learned or sinusoidal (Vaswani et al. 2017).
        rotary_base: base of the rotary frequencies.
        max_positions: longest sequence the model takes.
        num_token_types: number of segment embeddings; 0 for none.
        qk_norm: RMS-normalise queries and keys per head (Henry et al. 2020).
        bias: whether linear layers and norms have biases.
        dropout: rate on the embeddings' sum and on the output of every residual branch.
        attention_dropout: rate on the attention weights.
        token_dropout: rate at which a token's whole embedding is zeroed in training.
        architecture: encoder (a token sees its whole sequence), decoder (it sees what comes before
            it), or encoder_decoder (a decoder that also looks at an encoded source).
        num_decoder_layers: blocks of the decoder of an encoder_decoder; None for ``num_layers``.
        source_vocab_size: token embeddings of the encoder of an encoder_decoder; None where source
            and target share theirs.
        sliding_window: how many tokens one token of a decoder sees, itself included (Beltagy et al.
            2020); 0 for all before it.
        attention_softcap: attention scores are bounded by ``cap * tanh(score / cap)`` (Gemma 2);
            0 for none.
        logit_softcap: the same for the scores of tokens.
        tie_embeddings: score tokens with their own embeddings (Press and Wolf 2017).
        stochastic_depth: rate at which a sequence skips the last block's branches; it grows
            linearly from 0 at the first block (Huang et al. 2016).
        initializer_std: standard deviation of the initial weights; embeddings included.
        zero_init_residual: start the last matrix of every residual branch at zero, so that the
            model starts as a sum of embeddings (Zhang et al. 2019, "Fixup").
        head: classification of sequences, language_modelling (a score for each token of the
            vocabulary), or span (a score for each token to begin and to end an answer).
        num_labels: classes of the classification head.
        pooling: how a sequence becomes one vector: its first token, the mean, or a learned
            attention over its tokens.
        head_dropout: rate before the head; None for the value of ``dropout``.
    """

    vocab_size: int
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int | None = None
    feed_forward_size: int | None = None
    activation: Activation = "gelu"
    norm: Norm = "layernorm"
    norm_placement: NormPlacement = "pre"
    norm_epsilon: float = 1e-5
    architecture: Architecture = "encoder"
    num_decoder_layers: int | None = None
    source_vocab_size: int | None = None
    sliding_window: int = 0
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    tie_embeddings: bool = True
    positions: Positions = "rotary"
    rotary_base: float = 10000.0
    max_positions: int = 512
    num_token_types: int = 0
    qk_norm: bool = False
    bias: bool = True
    dropout: float = 0.1
    attention_dropout: float = 0.0
    token_dropout: float = 0.0
    stochastic_depth: float = 0.0
    initializer_std: float = 0.02
    zero_init_residual: bool = False
    head: Head = "classification"
    num_labels: int = 2
    pooling: Pooling = "mean"
    head_dropout: float | None = None

    def __post_init__(self) -> None:
        """Checks the values against each other.

        Raises:
            UsageError: naming the field that does not fit and what would.
        """
        for name, least in _SIZES.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"model.{name} must be at least {least}, not {value}.")
        if self.hidden_size % self.num_heads:
            fits = [h for h in range(1, self.hidden_size + 1) if self.hidden_size % h == 0]
            closest = min(fits, key=lambda h: abs(h - self.num_heads))
            raise UsageError(
                f"model.hidden_size {self.hidden_size} is not a multiple of model.num_heads "
                f"{self.num_heads}; {closest} heads would fit."
            )
        if self.num_heads % self.kv_heads:
            raise UsageError(
                f"model.num_heads {self.num_heads} is not a multiple of model.num_kv_heads "
                f"{self.kv_heads}."
            )
        if self.positions == "rotary" and self.head_size % 2:
            raise UsageError(
                f"rotary positions need an even head size, not {self.head_size} "
                f"(model.hidden_size {self.hidden_size} / model.num_heads {self.num_heads})."
            )
        for name in ("attention_softcap", "logit_softcap", "sliding_window"):
            if getattr(self, name) < 0:
                raise UsageError(f"model.{name} must not be negative (0 is off).")
        for name in _RATES:
            value = getattr(self, name)
            if value is not None and not 0.0 <= value < 1.0:
                raise UsageError(f"model.{name} must lie in [0, 1), not {value}.")
        for name, kind in _CHOICES.items():
            if getattr(self, name) not in get_args(kind):
                value, choices = getattr(self, name), get_args(kind)
                raise UsageError(
                    f"model.{name} is '{value}'; choose one of {', '.join(choices)}."
                    f"{nearest(str(value), choices)}"
                )
        for name, (field, fitting) in _ONLY_WITH.items():
            if getattr(self, name) and getattr(self, field) not in fitting:
                raise UsageError(
                    f"model.{name} has no effect with {field} '{getattr(self, field)}'; leave it "
                    "out."
                )

    @property
    def head_size(self) -> int:
        """Dimensions of one attention head."""
        return self.hidden_size // self.num_heads

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
    def inner_size(self) -> int:
        """Inner width of the feed-forward."""
        if self.feed_forward_size is not None:
            return self.feed_forward_size
        if self.activation == "swiglu":
            return -(-8 * self.hidden_size // 3 // 16) * 16
        return 4 * self.hidden_size


_SIZES = {
    "vocab_size": 1,
    "num_layers": 1,
    "hidden_size": 1,
    "num_heads": 1,
    "num_kv_heads": 1,
    "feed_forward_size": 1,
    "max_positions": 1,
    "num_token_types": 0,
    "num_labels": 1,
    "num_decoder_layers": 1,
    "source_vocab_size": 1,
}
_RATES = ("dropout", "attention_dropout", "token_dropout", "stochastic_depth", "head_dropout")
_CHOICES = {
    "activation": Activation,
    "norm": Norm,
    "norm_placement": NormPlacement,
    "positions": Positions,
    "pooling": Pooling,
    "architecture": Architecture,
    "head": Head,
}
# Options that mean nothing elsewhere: a person who sets one expects something of it.
_ONLY_WITH = {
    "num_decoder_layers": ("architecture", ("encoder_decoder",)),
    "source_vocab_size": ("architecture", ("encoder_decoder",)),
    "sliding_window": ("architecture", ("decoder", "encoder_decoder")),
    "logit_softcap": ("head", ("language_modelling",)),
}
