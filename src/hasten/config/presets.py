"""Named sets of settings, as plain nested mappings that a file or a flag can override."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"model": {"num_layers": 1, "hidden_size": 64, "num_heads": 2}},
    "small": {"model": {"num_layers": 4, "hidden_size": 256, "num_heads": 4}},
    "base": {"model": {"num_layers": 12, "hidden_size": 768, "num_heads": 12}},
    # Loadable by transformers whatever the task: the options of its nearest class.
    "portable": {"model": {"portable": True}},
    # Answers written, where question-answering finds them in the context.
    "generative-qa": {"task": "text-generation", "tokenizer": {"max_length": 512}},
    # The article's program: the Transformer of 2017, trained with Adam. Its rate of 1e-3 is too
    # high for post-norm at this size: a third of it is as accurate after half as many epochs.
    "article": {
        "tokenizer": {"kind": "word"},
        "model": {
            "num_layers": 6,
            "hidden_size": 512,
            "num_heads": 8,
            "dropout": 0.1,
            "head_dropout": 0.1,
            "pooling": "mean",
            "token_dropout": 0.0,
            "activation": "relu",
            "norm": "layernorm",
            "norm_placement": "post",
            "positions": "learned",
            "bias": True,
            "zero_init_residual": False,
        },
        "train": {
            "learning_rate": 3e-4,
            "tokens_per_step": 1280,
            "epochs": 10,
            "ema_decay": 0.0,
        },
        "optim": {"optimizer": "adam", "betas": (0.9, 0.999), "weight_decay": 0.0},
        "eval": {"patience": 0},
    },
}
