"""Every setting of a run, with its default, its range and its help text.

    RunConfig
      data       which files and columns, what is held out, what is rejected
      tokenizer  how text becomes tokens
      model      the architecture
      train      what one run does: epochs, steps, loss, regularisation of the targets
      optim      optimizer, schedule, penalties
      finetune   what of a pretrained model is trained, and how
      parallel   how many processes, and what each of them is for
      eval       when the model is measured, and on what it is judged

A field's description is its ``--help``. ``auto`` is a value a person may write: the resolved
value and its reason are printed and saved with the run. Nothing is mutated afterwards.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Auto = Literal["auto"]


def _split(value: object) -> object:
    if isinstance(value, int):  # a column's number
        return [value]
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def _as_files(value: object) -> object:
    return (value,) if isinstance(value, str) else value


def _split_pair(value: object) -> object:
    return value if value == "auto" else _split(value)


Names = Annotated[tuple[str, ...], BeforeValidator(_split)]
Files = Annotated[tuple[str, ...], BeforeValidator(_as_files)]
Positive = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(ge=0, lt=1)]
NotNegative = Annotated[float, Field(ge=0)]


T = TypeVar("T")


def settled(value: T | Auto) -> T:
    """Returns a value of a configuration from which every ``auto`` has been resolved."""
    assert value != "auto"
    return value  # pyright: ignore[reportReturnType]


class Section(BaseModel):
    """Base of all sections: immutable, no unknown keys."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", coerce_numbers_to_str=True, allow_inf_nan=False
    )


class DataConfig(Section):
    """Which files, which columns, and which rows may be left out."""

    train: Files | None = Field(
        default=None,
        description="training file(s): CSV, TSV, JSONL, Parquet, text, SQuAD JSON; .gz; - is stdin",
    )
    validation: Files | None = Field(
        default=None, description="validation file(s); without them, see validation_fraction"
    )
    test: Files | None = Field(
        default=None, description="test file(s), measured once after training"
    )
    source: str | None = Field(
        default=None,
        description="column to translate from, or a file of source lines",
    )
    target: str | None = Field(
        default=None,
        description="column to translate to, or a file of target lines",
    )
    validation_source: str | None = Field(default=None, description="file of source lines")
    validation_target: str | None = Field(default=None, description="file of target lines")
    test_source: str | None = Field(default=None, description="file of source lines")
    test_target: str | None = Field(default=None, description="file of target lines")
    text_columns: Names | None = Field(
        default=None, description="text column(s), by name or number"
    )
    label_column: str | None = Field(default=None, description="label column, by name or number")
    validation_fraction: Rate = Field(
        default=0.1, description="share of each class held out where there is no validation file"
    )
    max_rejected_fraction: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.1, description="more rejected rows than this share is an error"
    )
    segments: Literal["separate", "join"] = Field(
        default="separate",
        description="several text columns: separate segments, or joined into one text",
    )
    augment: Names = Field(
        default=("auto",),
        description="changes to training texts, anew each epoch: none, or word_dropout, word_swap, "
        "word_deletion, word_mask, char_noise, bpe_dropout, each with =RATE",
    )
    stride: Positive = Field(
        default=128, description="question answering: tokens that windows of a context overlap"
    )
    delimiter: str | None = Field(
        default=None, description="cell separator; detected where not given"
    )
    header: bool | None = Field(
        default=None, description="whether the first row names the columns; detected"
    )
    encoding: str | None = Field(
        default=None, description="text encoding; UTF-8 (or its BOM's) where not given"
    )


class TokenizerConfig(Section):
    """How text becomes tokens."""

    kind: Literal["bpe", "wordpiece", "unigram", "word", "char", "byte", "pretrained"] = Field(
        default="bpe",
        description="trained on the data: byte-level bpe, wordpiece, unigram, word, char, byte; "
        "of a pretrained model its own",
    )
    path: str | None = Field(default=None, description="a tokenizer.json to use instead")
    vocab_size: Positive | Auto = Field(
        default="auto", description="number of tokens; auto: from the amount of text"
    )
    shared: bool = Field(
        default=True, description="translation: one vocabulary for source and target"
    )
    lowercase: bool = Field(default=False, description="fold case before tokenizing")
    max_length: Positive | Auto = Field(
        default="auto",
        description="longest sequence in tokens; longer ones are cut and counted, or make windows",
    )
    add_tokens: Names = Field(
        default=(),
        description="words that a pretrained model gets as tokens of their own, by commas",
    )
    source_language: str | None = Field(
        default=None,
        description="code of the language that a pretrained model of many languages reads",
    )
    target_language: str | None = Field(
        default=None, description="code of the language that it writes"
    )


class ModelConfig(Section):
    """The architecture; see hasten.model.config for each option's source."""

    pretrained: str | None = Field(
        default=None,
        description="folder or hub id (owner/name) of a model to begin with, which decides the "
        "architecture; dropout rates and pooling may be set beside it",
    )
    portable: bool = Field(
        default=False,
        description="made of options that a transformers class has, to be exported to it",
    )
    num_layers: Positive | Auto = Field(default="auto", description="number of blocks")
    hidden_size: Positive | Auto = Field(default="auto", description="width of the residual stream")
    num_decoder_layers: Positive | None = Field(
        default=None, description="blocks of the decoder of a translation model; as num_layers"
    )
    num_heads: Positive | Auto = Field(default="auto", description="attention heads")
    num_kv_heads: Positive | None = Field(
        default=None, description="key/value heads (grouped-query attention)"
    )
    feed_forward_size: Positive | None = Field(
        default=None, description="inner width of the feed-forward"
    )
    activation: Literal[
        "gelu", "gelu_tanh", "relu", "relu_squared", "silu", "swiglu", "geglu", "geglu_tanh"
    ] = Field(default="gelu", description="nonlinearity")
    norm: Literal["layernorm", "rmsnorm"] = Field(default="rmsnorm", description="normalisation")
    norm_placement: Literal["pre", "post", "sandwich"] = Field(
        default="pre", description="norm inside or after the residual sum, or both"
    )
    positions: Literal["rotary", "learned", "sinusoidal", "relative", "none"] = Field(
        default="rotary", description="how order is encoded"
    )
    sliding_window: Annotated[int, Field(ge=0)] = Field(
        default=0, description="tokens that a token of a decoder sees, itself included; 0: all"
    )
    logit_softcap: NotNegative = Field(
        default=0.0, description="bound of the scores of tokens; 0: none"
    )
    tie_embeddings: bool = Field(
        default=True, description="tokens are scored by their own embeddings"
    )
    qk_norm: bool = Field(default=False, description="normalise queries and keys per head")
    bias: bool = Field(default=False, description="biases in linear layers and norms")
    dropout: Rate | Auto = Field(
        default="auto", description="rate on embeddings and residual branches"
    )
    attention_dropout: Rate = Field(default=0.0, description="rate on attention weights")
    token_dropout: Rate | Auto = Field(
        default="auto", description="rate at which whole token embeddings are zeroed"
    )
    head_dropout: Rate | Auto = Field(default="auto", description="rate before the classifier")
    stochastic_depth: Rate = Field(
        default=0.0, description="rate at which the last block is skipped"
    )
    initializer_std: NotNegative = Field(
        default=0.02, description="standard deviation of initial weights"
    )
    zero_init_residual: bool = Field(default=True, description="residual branches start at zero")
    pooling: Literal["first", "last", "mean", "attention"] = Field(
        default="attention", description="how tokens become one vector"
    )


class TrainConfig(Section):
    """What one run does."""

    seed: int = Field(default=0, ge=0, description="every random choice derives from it")
    epochs: Annotated[float, Field(gt=0)] | Auto = Field(
        default="auto", description="passes over the training data"
    )
    learning_rate: Annotated[float, Field(gt=0)] | Auto = Field(
        default="auto", description="peak learning rate"
    )
    tokens_per_step: Positive | Auto = Field(
        default="auto", description="token budget of one optimizer step"
    )
    micro_batch_tokens: Positive | Auto = Field(
        default="auto",
        description="token budget of one forward and backward; changes memory and speed only",
    )
    loss: Literal["cross_entropy", "focal"] = Field(
        default="cross_entropy", description="loss function"
    )
    focal_gamma: NotNegative = Field(default=2.0, description="focusing exponent of the focal loss")
    label_smoothing: Rate | Auto = Field(
        default="auto", description="share of the target spread over all classes, or all tokens"
    )
    class_weights: Literal["none", "balanced"] = Field(
        default="none", description="balanced: rare classes count more"
    )
    gradient_clip: NotNegative = Field(
        default=1.0, description="largest global gradient norm; 0 for none"
    )
    l1: NotNegative = Field(
        default=0.0, description="L1 penalty on the weights, added to the loss once a step"
    )
    l2: NotNegative = Field(
        default=0.0, description="L2 penalty on the weights, added to the loss once a step"
    )
    ema_decay: Rate | Auto = Field(
        default="auto", description="decay of the averaged weights that are evaluated; 0 for none"
    )
    max_skipped_steps: Positive = Field(
        default=5, description="non-finite steps in a row before the run stops"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="where to compute")
    precision: Literal["auto", "float32", "bf16", "fp16", "fp8"] = Field(
        default="auto",
        description="of matrix products; auto: the faster of float32 and bf16, measured",
    )
    matrix_library: Literal["auto", "default", "onednn"] = Field(
        default="auto",
        description="what multiplies float32 matrices on a CPU: torch's own choice or oneDNN, "
        "equally exact; auto: the faster, measured",
    )
    recompute: bool = Field(
        default=False,
        description="compute what is inside a block again for its backward: less memory, more time",
    )
    compile: bool = Field(
        default=False,
        description="compile the blocks by torch.compile: takes up to a minute at first, then "
        "faster steps on a GPU",
    )
    deterministic: bool = Field(
        default=False, description="bit-exact kernels on CUDA, slower; the CPU is always exact"
    )
    num_threads: Positive | Auto = Field(default="auto", description="CPU threads")
    log_every: Positive = Field(default=10, description="steps between progress lines and metrics")
    checkpoint_minutes: Annotated[float, Field(gt=0)] = Field(
        default=5.0,
        description="longest time between checkpoints; one is also written at each evaluation",
    )


class OptimConfig(Section):
    """Optimizer and schedule."""

    optimizer: Literal[
        "adamw",
        "adam",
        "sgd",
        "adagrad",
        "adadelta",
        "rmsprop",
        "nadam",
        "radam",
        "adafactor",
        "muon",
        "auto",
    ] = Field(default="auto", description="optimizer")
    weight_decay: NotNegative | Auto = Field(
        default="auto", description="decoupled weight decay; biases and norms exempt"
    )
    betas: Annotated[tuple[Rate, Rate] | Auto | None, BeforeValidator(_split_pair)] = Field(
        default="auto", description="first and second moment decay, where used"
    )
    momentum: Rate | None = Field(default=None, description="momentum, where used")
    epsilon: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="added to the denominator"
    )
    schedule: Literal["linear", "cosine", "wsd", "inverse_sqrt", "constant", "plateau"] = Field(
        default="constant", description="learning rate over time, after the warm-up"
    )
    warmup_fraction: Rate = Field(default=0.1, description="share of the steps that warm up")
    min_factor: Rate = Field(
        default=0.0, description="cosine: last learning rate as a share of the peak"
    )
    plateau_patience: Positive = Field(
        default=2, description="plateau: evaluations without progress before a cut"
    )
    plateau_factor: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.5, description="plateau: size of the cut"
    )


class FinetuneConfig(Section):
    """What of a pretrained model is trained, and how."""

    freeze: Names = Field(
        default=(),
        description="parts that stay as they are, by the names of their weights; * is anything, "
        "as in embedding,encoder.blocks.[0-2]; left out, an embedding that is seen too seldom; "
        "none for nothing",
    )
    layer_decay: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0, description="factor on the learning rate from each block to the one below it"
    )
    adapter: Literal["none", "lora", "dora"] = Field(
        default="none",
        description="train small matrices beside those of the model, which stay as they are",
    )
    rank: Positive = Field(default=8, description="adapter: rows of its matrices")
    alpha: Annotated[float, Field(gt=0)] = Field(
        default=16.0, description="adapter: its share of a product is alpha / rank"
    )
    adapter_dropout: Rate = Field(default=0.0, description="adapter: rate on what goes into it")
    targets: Names = Field(
        default=("query", "key", "value", "output", "up", "gate", "down"),
        description="adapter: the matrices of the blocks that get one, by name",
    )


class ParallelConfig(Section):
    """How many processes share a run, and how."""

    processes: Positive | Auto = Field(
        default="auto", description="processes started on this machine; auto: as the layout says"
    )
    layout: str = Field(
        default="auto",
        description="degrees of pipeline, replicate, shard, context, tensor, as in "
        "shard=2,tensor=2; auto: by memory and connections",
    )
    schedule: Literal["gpipe", "1f1b", "interleaved", "zero-bubble"] = Field(
        default="1f1b", description="in which order the stages of a pipeline work"
    )
    stage_costs: (
        Annotated[tuple[NotNegative, NotNegative, NotNegative], BeforeValidator(_split)] | None
    ) = Field(
        default=None,
        description="what embedding, each block and head take, by which a pipeline is cut; by "
        "default measured",
    )
    max_restarts: Annotated[int, Field(ge=0)] = Field(
        default=0, description="times that a run goes on by itself after it lost a process"
    )
    timeout_seconds: Annotated[float, Field(gt=0)] = Field(
        default=20.0, description="a process that gives no sign of life for so long is lost"
    )


class EvalConfig(Section):
    """When the model is measured and on what it is judged."""

    per_epoch: Positive = Field(default=1, description="evaluations per epoch")
    metric: str = Field(
        default="auto", description="the best model by this validation metric is kept"
    )
    decode_examples: Annotated[int, Field(ge=0)] = Field(
        default=100, description="examples decoded at each evaluation; the end decodes all"
    )
    num_beams: Positive | Auto = Field(
        default="auto", description="beams that the last evaluation and predict decode with"
    )
    length_penalty: NotNegative = Field(
        default=1.0, description="exponent of the length that a beam's score is divided by"
    )
    patience: Annotated[int, Field(ge=0)] | Auto = Field(
        default="auto", description="evaluations without progress before stopping; 0: never"
    )
    baseline: bool = Field(
        default=True,
        description="compare with simpler ways: the largest class, and TF-IDF + logistic "
        "regression where scikit-learn is there; the first sentence of a context",
    )


class RunConfig(Section):
    """A whole run."""

    task: str = Field(
        default="auto",
        description="text-classification, text-generation, translation or question-answering",
    )
    preset: str | None = Field(default=None, description="a named set of settings")
    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    optim: OptimConfig = OptimConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    parallel: ParallelConfig = ParallelConfig()
    eval: EvalConfig = EvalConfig()


SECTIONS: dict[str, type[Section]] = {
    "data": DataConfig,
    "tokenizer": TokenizerConfig,
    "model": ModelConfig,
    "train": TrainConfig,
    "optim": OptimConfig,
    "finetune": FinetuneConfig,
    "parallel": ParallelConfig,
    "eval": EvalConfig,
}
