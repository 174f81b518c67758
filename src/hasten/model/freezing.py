"""Which of a model's weights are trained: patterns of names, and what always is.

names of weights, patterns --freeze--> requires_grad of each

    embedding.tokens.weight         embedding, embedding.*, *.tokens.weight
    encoder.blocks.0.norm.weight    encoder.blocks.0, encoder.blocks.[0-3], *norm*

A frozen weight gets no gradient, and so no state of an optimizer, no decay and no share in the norm
by which gradients are clipped; the backward pass ends at the lowest weight that is trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase

from torch import nn

from hasten.core.errors import UsageError, nearest
from hasten.model.heads import TokenHead
from hasten.model.transformer import Transformer


def freeze(model: Transformer, patterns: Sequence[str]) -> None:
    """Freezes the weights that patterns name, except those of a classifier or a scorer of spans.

    These are new where a model is fine-tuned, and of no use untrained.

    Args:
        model: plain, before processes share it.
        patterns: of names, or of their beginnings up to a dot; ``*`` is anything. The pattern
            ``none`` alone names nothing.

    Raises:
        UsageError: a pattern that names no weight, or nothing is left to train.
    """
    named = dict(model.named_parameters())
    kept = always_trained(model)
    for pattern in () if is_none(patterns) else patterns:
        found = [name for name in named if names_match(name, [pattern])]
        if not found:
            raise UsageError(
                f"finetune.freeze: '{pattern}' names no weight.{_near(pattern, named)}"
            )
        if kept.issuperset(found):
            raise UsageError(
                f"finetune.freeze: '{pattern}' names only the head, which is always trained."
            )
        for name in found:
            named[name].requires_grad_(name in kept)
    if not any(parameter.requires_grad for parameter in named.values()):
        raise UsageError("finetune.freeze leaves no weight to train.")


def is_none(patterns: Sequence[str]) -> bool:
    """Returns whether patterns name nothing."""
    return tuple(patterns) in ((), ("none",))


def always_trained(model: Transformer) -> frozenset[str]:
    """Returns the names of weights that stay trained whatever else is frozen."""
    if isinstance(model.head, TokenHead):  # it was pretrained like the rest
        return frozenset()
    return frozenset(f"head.{name}" for name, _ in model.head.named_parameters())


def names_match(name: str, patterns: Iterable[str]) -> bool:
    """Returns whether a pattern fits a dotted name or the beginning of one, up to a dot."""
    return any(fnmatchcase(part, pattern) for pattern in patterns for part in _beginnings(name))


def _beginnings(name: str) -> Iterator[str]:
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        yield ".".join(parts[:end])


def _near(pattern: str, names: Iterable[str]) -> str:
    """Says what there is that a pattern may have meant."""
    known = {part for name in names for part in _beginnings(name)}
    if said := nearest(pattern.strip("*."), known):
        return said
    tops = sorted({name.partition(".")[0] for name in known})
    return f" There are {', '.join(tops)} and what is in them, such as {max(known, key=len)}."


def count_trained(model: nn.Module) -> tuple[int, int]:
    """Returns how many numbers of a model are trained, and how many there are."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes)
