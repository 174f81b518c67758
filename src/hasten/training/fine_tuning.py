"""What of a model a run trains: all of it, some of it, or adapters beside it.

Transformer, FinetuneConfig --prepare_fine_tuning--> the same with frozen weights or adapters
"""

from __future__ import annotations

from hasten.config.schema import FinetuneConfig
from hasten.core.errors import UsageError
from hasten.model.adapters import AdapterSettings, TrainedPart
from hasten.model.config import TransformerConfig
from hasten.model.freezing import count_trained, is_none
from hasten.model.transformer import Transformer
from hasten.parallel.layout import Layout
from hasten.training.observe import Observer
from hasten.training.saved import writable_as

NO_CLASS = "no transformers class has this model's options, and model/ has it merged alone"


def adapter_settings(config: FinetuneConfig) -> AdapterSettings | None:
    """Returns what the adapters of a run are like; None where it has none."""
    if config.adapter == "none":
        return None
    return AdapterSettings(
        config.adapter, config.rank, config.alpha, config.adapter_dropout, config.targets
    )


def check_fine_tuning(
    config: FinetuneConfig, layout: Layout, precision: str, *, adds_tokens: bool
) -> None:
    """Refuses what does not go together.

    Args:
        config: what is to be trained.
        layout: of the processes.
        precision: of matrix products.
        adds_tokens: whether the embedding has new rows.

    Raises:
        UsageError: saying what to leave out.
    """
    is_whole = config.adapter == "none" and is_none(config.freeze)
    if layout.pipeline > 1 and not (is_whole and config.layer_decay == 1):
        raise UsageError("the section finetune does not go with pipeline above 1.")
    if layout.tensor > 1 and not is_whole:
        raise UsageError(
            "finetune.freeze and finetune.adapter do not go with tensor above 1: shard or "
            "replicate would."
        )
    if config.adapter == "none":
        return
    if precision == "fp8":
        raise UsageError("finetune.adapter does not go with train.precision fp8: bf16 would.")
    if adds_tokens:
        raise UsageError(
            "finetune.adapter freezes the embedding, so that new tokens would not be learned: "
            "leave out tokenizer.add_tokens, or the adapter."
        )
    if not is_none(config.freeze):
        raise UsageError(
            "finetune.adapter freezes all weights of the model: leave out finetune.freeze."
        )


def warn_without_class(
    config: FinetuneConfig, architecture: TransformerConfig, observer: Observer
) -> None:
    """Warns before training that adapters cannot be kept by themselves."""
    if config.adapter != "none" and writable_as(architecture) is None:
        fitting = "last" if architecture.architecture == "decoder" else "first"
        observer.warn(
            f"adapter/ will not be written: {NO_CLASS}; with --model.pooling {fitting} one may "
            "have them."
        )


def trained_part(config: FinetuneConfig) -> TrainedPart:
    """Returns which weights are trained."""
    return TrainedPart(tuple(config.freeze), adapter_settings(config))


def prepare_fine_tuning(model: Transformer, config: FinetuneConfig) -> str:
    """Freezes what is not to be trained, and adds adapters, in place; says how much is left.

    Raises:
        UsageError: see ``freeze`` and ``add_adapters``.
    """
    trained_part(config).apply(model)
    trained, total = count_trained(model)
    return f"trained: {trained:,} of {total:,} weights, {trained / total:.2%}"
