"""What is trained alone and in several processes: cases as data, which can be handed on as JSON.

task x layout x optimizer x settings     a covering subset, each pair of the first three once
"""

from __future__ import annotations

import importlib.util
import random
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from builders import COMMON, STILL, TINY, WORDS, write_rows
from hasten.parallel.layout import AXES

CLASSIFIER, GENERATOR, TRANSLATOR, ANSWERER = "classifier", "generator", "translator", "answerer"

_SETTINGS: dict[str, Any] = {
    **{key: value for key, value in TINY.items() if key != "model.pooling"},
    **STILL,
    "tokenizer.kind": "char",
    "data.validation_fraction": 0.25,
    "model.zero_init_residual": False,
    "model.initializer_std": 0.1,
    "optim.schedule": "constant",
    "optim.warmup_fraction": 0.0,
    "train.epochs": 100,
    "train.tokens_per_step": 200,
    "train.ema_decay": 0.0,
    "train.gradient_clip": 0.0,
    "train.micro_batch_tokens": 100_000,
    "train.precision": "float32",
    "train.matrix_library": "default",
    "eval.patience": 0,
    "eval.num_beams": 1,
}
_OF_TASK: dict[str, dict[str, Any]] = {
    CLASSIFIER: {},
    GENERATOR: {"task": "text-generation"},
    TRANSLATOR: {},
    ANSWERER: {
        "tokenizer.kind": "bpe",
        "tokenizer.max_length": 32,
        "tokenizer.vocab_size": 299,
        "data.stride": 12,
    },
}
_OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"train.learning_rate": 3e-3, "optim.weight_decay": 0.1},
    # Adam's steps do not change where all gradients are wrong by one factor; these do.
    "sgd": {"train.learning_rate": 0.1, "optim.momentum": 0.0, "optim.weight_decay": 0.0},
    "muon": {"train.learning_rate": 5e-3, "optim.weight_decay": 0.1},
    "momentum": {"train.learning_rate": 0.05, "optim.optimizer": "sgd"},
}
_OTHER_OPTIMIZER = {"train.learning_rate": 1e-2, "optim.weight_decay": 0.1}


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        name: for messages.
        task: one of the four above.
        layout: as a person writes it; ``alone`` for one process.
        optimizer: a name of ours above, or an optimizer's.
        settings: what else is set.
        dtype: of the weights.
        num_steps: to train.
        poisoned_step: step in which the loss of one example is NaN, or in fp16 its gradient
            overflows.
        goes_on_with: layout from the middle on, by way of a checkpoint.
        weights: file of weights to begin with.
        has_dropout: whether masks are noted; then nothing is compared with a run alone.
        options: of the model that no setting has, as ``TransformerConfig`` takes them.
    """

    name: str
    task: str
    layout: str
    optimizer: str = "sgd"
    settings: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float64"
    num_steps: int = 10
    poisoned_step: int | None = None
    goes_on_with: str | None = None
    weights: str | None = None
    has_dropout: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        layout = self.layout + f" then {self.goes_on_with}" * bool(self.goes_on_with)
        return f"{self.name} ({self.task}, {layout}, {self.optimizer}, {self.dtype})"

    @property
    def alone(self) -> Case:
        """The same in one process, plain: equal for cases that differ in no more than this."""
        without = ("train.compile", "train.precision")
        settings = {n: value for n, value in self.settings.items() if n not in without}
        return replace(self, layout="alone", goes_on_with=None, settings=settings)

    @property
    def precision(self) -> str:
        """In which matrices are multiplied."""
        return self.settings.get("train.precision", "float32")

    @property
    def overrides(self) -> dict[str, Any]:
        """Its configuration, but for the data."""
        optimizer = _OPTIMIZERS.get(self.optimizer, _OTHER_OPTIMIZER)
        optimizer = {"optim.optimizer": self.optimizer, **optimizer}
        values = {**_SETTINGS, **_OF_TASK[self.task], **optimizer, **self.settings}
        if "pipeline" in self.layout + str(self.goes_on_with):  # every micro-batch is filled up
            values["train.micro_batch_tokens"] = min(96, values["train.micro_batch_tokens"])
            # Each process plans here, and what each measured might cut the blocks elsewhere.
            values["parallel.stage_costs"] = "0.1,1,0.3"
        return values


_ROUNDS = {"train.micro_batch_tokens": 48}
_AVERAGED = {"train.ema_decay": 0.9}
_UNTIED = {"model.tie_embeddings": False}
_ALL = {
    **_ROUNDS,
    **_AVERAGED,
    "model.hidden_size": 36,
    "model.num_heads": 6,
    "model.num_kv_heads": 2,
    "model.feed_forward_size": 74,  # which 4 processes cannot share evenly
    "train.gradient_clip": 0.05,
    "train.l1": 1e-4,
    "train.l2": 1e-3,
    "train.label_smoothing": 0.1,
}
_OWN_VOCABULARIES = {
    **_UNTIED,
    **_AVERAGED,
    "tokenizer.shared": False,
    "model.num_decoder_layers": 1,
}
_OTHER_MODEL = {
    **_ROUNDS,
    "model.num_layers": 1,
    "model.positions": "learned",
    "model.bias": True,
    "model.norm": "layernorm",
    "model.norm_placement": "post",
}
_BALANCED = {**_ALL, "train.class_weights": "balanced", "model.pooling": "mean"}
_ONE_EXAMPLE = {**_AVERAGED, "train.tokens_per_step": 1}
_AUGMENTED = {**_ROUNDS, "data.augment": "word_swap=0.3,char_noise=0.1"}
_DROPOUT = {
    "model.num_heads": 4,
    "model.dropout": 0.5,
    "data.train": "even.csv",
    "train.tokens_per_step": 160,
}
MEASURED = {CLASSIFIER: 12, GENERATOR: 20, TRANSLATOR: 50, ANSWERER: 30}
"""For each task the steps that teach a part of the training examples, on which it is measured."""


def _everywhere(layout: str) -> list[Case]:
    """What every kind of layout has to stand."""
    return [*_trained(layout), *_measured(layout, 50)]


def _trained(layout: str) -> list[Case]:
    poisoned = {**_ROUNDS, **_AVERAGED}
    return [
        Case("everything", CLASSIFIER, layout, "sgd", _BALANCED),
        Case("one example a step", CLASSIFIER, layout, "adamw", _ONE_EXAMPLE),
        Case("single precision", CLASSIFIER, layout, "sgd", _ROUNDS, dtype="float32"),
        Case("not finite", CLASSIFIER, layout, "adamw", poisoned, num_steps=5, poisoned_step=2),
        Case("everything", GENERATOR, layout, "muon", _ALL),
        *_dropping(layout),
    ]


def _dropping(layout: str) -> list[Case]:
    return [
        Case(name, CLASSIFIER, layout, "sgd", _DROPOUT, num_steps=2, has_dropout=True)
        for name in ("dropout", "dropout again")
    ]


def learning(task: str) -> Case:
    """The training after which a task is measured."""
    return Case("learning", task, "alone", "muon", _of_measuring(task), num_steps=MEASURED[task])


def _measured(layout: str, tokens: int) -> list[Case]:
    """Every task, measured in pieces of so many tokens: in one, most processes have nothing."""
    return [
        Case(
            f"measured with {tokens} tokens",
            task,
            layout,
            settings={**_of_measuring(task), "train.micro_batch_tokens": tokens},
            num_steps=0,
            weights=f"{task}.safetensors",
        )
        for task in MEASURED
    ]


def _of_measuring(task: str) -> dict[str, Any]:
    return {"data.validation": f"{task}.csv"}


_UNLIKE = {
    "untied": (GENERATOR, "sgd", {**_UNTIED, "train.gradient_clip": 0.05}),
    "rounds": (GENERATOR, "adamw", _ROUNDS),
    "augmented": (CLASSIFIER, "muon", _AUGMENTED),
    "other model": (TRANSLATOR, "sgd", _OTHER_MODEL),
    "own vocabularies": (TRANSLATOR, "muon", _OWN_VOCABULARIES),
    "one vocabulary": (TRANSLATOR, "adamw", _ALL),
    "windows": (ANSWERER, "adamw", _ROUNDS),
    "narrow windows": (ANSWERER, "muon", _ALL),
    "momentum": (CLASSIFIER, "momentum", {"train.recompute": True}),
    "soft-cap": (GENERATOR, "sgd", {**_ROUNDS, "model.logit_softcap": 3.0}),
    "compiled": (CLASSIFIER, "sgd", {**_ROUNDS, "train.compile": True, "train.recompute": True}),
    "compiled, too": (TRANSLATOR, "adamw", {**_ALL, "train.compile": True}),
}
_NOT_COMPILED = [name for name in _UNLIKE if not name.startswith("compiled")]


def _unlike(layout: str, *names: str) -> list[Case]:
    found = []
    for name in names:
        task, optimizer, settings = _UNLIKE[name]
        steps = 4 if "train.compile" in settings else 10  # it takes its time
        found.append(Case(name, task, layout, optimizer, settings, num_steps=steps))
    return found


_NARROW_AND_NEAR: dict[str, Any] = {
    "embedding_size": 20,
    "embedding_norm": True,
    "positions": "rotary",
    "head_dim": 12,
    "first_norm": False,
    "norm_placement": "pre",
    "sliding_window": 4,
    "global_layers": [1],
    "local_rotary_base": 50.0,
    "rotary_scaling": {"kind": "linear", "factor": 2.0},
    "activation": "geglu",
    "qkv_bias": True,
    "output_bias": False,
    "pooling": "last",
    "head_activation": "tanh",
    "head_norm": True,
}
_SANDWICH: dict[str, Any] = {
    "norm_placement": "sandwich",
    "qk_norm": True,
    "positions": "learned",
    "position_offset": 2,
    "embedding_scale": 2.0,
    "attention_scale": 0.3,
    "activation": "geglu_tanh",
    "logit_scale": 0.5,
    "logit_bias": True,
}
_RELATIVE: dict[str, Any] = {"positions": "relative", "relative_buckets": 8, "attention_scale": 1.0}


def _of_options(layout: str) -> list[Case]:
    """Models that none of the settings above make."""
    heads = {"model.num_heads": 4, "model.num_kv_heads": 2}
    smooth = {"train.label_smoothing": 0.1, **_ROUNDS}
    return [
        Case("near", CLASSIFIER, layout, "sgd", _ROUNDS, num_steps=4, options=_NARROW_AND_NEAR),
        Case("sandwich", GENERATOR, layout, "adamw", {**heads, **smooth}, options=_SANDWICH),
    ]


_PRECISIONS = {"bf16": GENERATOR, "fp16": CLASSIFIER}
if importlib.util.find_spec("torchao") is not None:
    _PRECISIONS["fp8"] = GENERATOR


def _in_precisions(layout: str) -> list[Case]:
    """Matrices multiplied in fewer bits, and fp16 with a gradient that overflows on one rank."""
    sizes = {"model.hidden_size": 32, "model.feed_forward_size": 64, **_ROUNDS}
    cases = [
        Case(name, task, layout, "sgd", {**sizes, "train.precision": name}, "float32", num_steps=4)
        for name, task in _PRECISIONS.items()
    ]
    overflow = replace(cases[1], name="overflow", optimizer="adamw", poisoned_step=1)
    return [*cases, overflow]


def _of_schedules() -> list[Case]:
    """The schedules of a pipeline besides the default: 3 blocks on 2 stages, 4 on 4."""
    blocks = {"gpipe": 3, "interleaved": 4, "zero-bubble": 3}
    return [
        Case(
            name,
            task,
            "pipeline=2",
            "adamw",
            {**_ALL, "parallel.schedule": name, "model.num_layers": num_blocks},
        )
        for name, num_blocks in blocks.items()
        for task in (CLASSIFIER, GENERATOR)
    ]


def _of_pair(layout: str) -> list[Case]:
    """What a pair of axes has to stand: each architecture once."""
    settings = {**_ALL, "train.recompute": True, "model.hidden_size": 40, "model.num_heads": 4}
    cases = [
        Case("everything", CLASSIFIER, layout, "sgd", settings),
        Case("not finite", CLASSIFIER, layout, "adamw", _ROUNDS, num_steps=4, poisoned_step=2),
        Case("everything", GENERATOR, layout, "muon", {**settings, **_UNTIED}),
        Case("other model", TRANSLATOR, layout, "sgd", _OTHER_MODEL),
        Case("windows", ANSWERER, layout, "adamw", _ROUNDS),
    ]
    cases = [replace(case, settings={"model.num_heads": 4, **case.settings}) for case in cases]
    return _that_fit(layout, cases)


def _that_fit(layout: str, cases: list[Case]) -> list[Case]:
    """Leaves out what a layout refuses: an encoder-decoder cannot be cut into stages."""
    return [case for case in cases if "pipeline" not in layout or case.task != TRANSLATOR]


_ADAPTIVE = ("adam", "adagrad", "adadelta", "rmsprop", "nadam", "radam")
_OF_TWO = [
    *(c for axis in AXES for c in _that_fit(axis, _everywhere(f"{axis}=2"))),
    *(c for axis in AXES for c in _unlike(f"{axis}=2", "compiled")),
    *(c for axis in AXES if axis != "replicate" for c in _of_options(f"{axis}=2")),
    *(c for axis in AXES for c in _in_precisions(f"{axis}=2")),
    Case("relative", TRANSLATOR, "shard=2", "sgd", _ROUNDS, num_steps=4, options=_RELATIVE),
    Case("goes on", GENERATOR, "pipeline=2", options=_SANDWICH, goes_on_with="tensor=2"),
    *_unlike("pipeline=2", "untied", "rounds", "augmented", "windows", "momentum", "soft-cap"),
    *_of_schedules(),
    *_measured("replicate=2", 100_000),
    *_measured("shard=2", 100_000),
    *_unlike("replicate=2", "untied", "augmented", "other model", "one vocabulary"),
    *_unlike("replicate=2", "narrow windows"),
    *_unlike("shard=2", *_NOT_COMPILED),
    *_unlike("context=2", "untied", "own vocabularies", "one vocabulary", "windows", "soft-cap"),
    *_unlike("tensor=2", *_NOT_COMPILED, "compiled, too"),
    *(Case("optimizer", CLASSIFIER, "shard=2", name, num_steps=3) for name in _ADAPTIVE),
    Case("optimizer", CLASSIFIER, "tensor=2", "adam", num_steps=3),
    Case("optimizer", CLASSIFIER, "tensor=2", "rmsprop", num_steps=3),
    Case("optimizer", CLASSIFIER, "replicate=2", "adafactor", num_steps=3),
    Case("goes on", CLASSIFIER, "shard=2", "adamw", _BALANCED, goes_on_with="tensor=2"),
    Case("goes on", CLASSIFIER, "replicate=2", "adamw", _BALANCED, goes_on_with="shard=2"),
    Case("goes on", CLASSIFIER, "tensor=2", "adamw", _BALANCED, goes_on_with="context=2"),
    Case("goes on", GENERATOR, "context=2", "muon", _ALL, goes_on_with="pipeline=2"),
    Case("goes on", CLASSIFIER, "pipeline=2", "adamw", _BALANCED, goes_on_with="alone"),
    Case("goes on", TRANSLATOR, "alone", "adamw", _ALL, goes_on_with="tensor=2"),
]
_STAGES_OF_COPIES = "pipeline=2,replicate=2"
_OF_FOUR = [
    *_trained("replicate=4"),
    *_trained("shard=4"),
    *_everywhere("replicate=2,shard=2"),
    *_unlike("replicate=4", "own vocabularies", "windows"),
    *_unlike("shard=4", "rounds", "other model", "narrow windows"),
    *_unlike("replicate=2,shard=2", "untied", "augmented", "one vocabulary"),
    *_of_pair("replicate=2,tensor=2"),
    *_of_pair("shard=2,tensor=2"),
    *_of_pair("replicate=2,context=2"),
    *_of_pair("shard=2,context=2"),
    *_of_pair("context=2,tensor=2"),
    *_of_pair("pipeline=2,replicate=2"),
    *_of_pair("pipeline=2,shard=2"),
    *_of_pair("pipeline=2,context=2"),
    *_of_pair("pipeline=2,tensor=2"),
    *_dropping("shard=2,tensor=2"),
    *_dropping("context=2,tensor=2"),
    Case("goes on", GENERATOR, "shard=4", "muon", _ALL, goes_on_with="shard=2,tensor=2"),
    Case(
        "goes on",
        GENERATOR,
        "shard=2,tensor=2",
        "muon",
        _ALL,
        goes_on_with="pipeline=2,replicate=2",
    ),
    Case("goes on", GENERATOR, "pipeline=2,tensor=2", "muon", _ALL, goes_on_with="alone"),
    Case("goes on", CLASSIFIER, "alone", "adamw", _ALL, goes_on_with="pipeline=2,shard=2"),
    Case(
        "goes on",
        GENERATOR,
        "pipeline=2,shard=2",
        "adamw",
        {**_ALL, "model.hidden_size": 40, "model.num_heads": 4},
        goes_on_with="context=2,tensor=2",
    ),
    Case(
        "goes on",
        CLASSIFIER,
        "shard=2,context=2",
        "adamw",
        _ALL,
        goes_on_with="replicate=2,shard=2",
    ),
]
_FULL_LENGTH = ("everything", "other model", "one vocabulary")
"""Of each pair of axes the cases of each architecture."""


def _shortened(case: Case) -> Case:
    """Four processes on a few cores are slow, and but for each pair a few steps show as much."""
    is_full = case.layout.count("=2") == 2 and case.name in _FULL_LENGTH
    return case if is_full else replace(case, num_steps=min(case.num_steps, 6))


CASES: dict[int, list[Case]] = {2: _OF_TWO, 4: [_shortened(case) for case in _OF_FOUR]}
"""By number of processes."""


def write_data(folder: Path) -> None:
    """Writes the file of each task: few examples of very different lengths."""
    draw = random.Random(5)
    words = COMMON + [word for kind in WORDS.values() for word in kind]

    def text(most: int) -> str:
        return " ".join(draw.choice(words) for _ in range(draw.randint(1, most)))

    kinds = [draw.choice(list(WORDS)) for _ in range(36)]
    labelled = [(f"{text(6)} {draw.choice(WORDS[kind])}", kind) for kind in kinds]
    write_rows(folder / f"{CLASSIFIER}.csv", labelled, ("text", "label"))
    even = [("".join(draw.sample("abcdefgh", 8)), draw.choice(["a", "b"])) for _ in range(64)]
    write_rows(folder / "even.csv", even, ("text", "label"))
    write_rows(folder / f"{GENERATOR}.csv", [(text(12),) for _ in range(28)], ("text",))
    pairs = [(source, f"ä{source[::-1]}") for source in (text(4) for _ in range(20))]
    write_rows(folder / f"{TRANSLATOR}.csv", pairs, ("en", "de"))
    rows = []
    for _ in range(14):
        context = text(40)
        rows.append((context, f"what {text(2)}?", draw.choice(context.split())))
    write_rows(folder / f"{ANSWERER}.csv", rows, ("context", "question", "answer"))
