"""Whether the classes of a checkpoint's classifier are those of a run, and which row is which.

    id2label of config.json --label_names--> POSITIVE NEGATIVE
    POSITIVE NEGATIVE, labels of the run: NEGATIVE POSITIVE --row_order--> (1, 0)

A classifier of other classes is no better than one drawn at random, and looks as if it were.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def label_names(content: Mapping[str, Any], num_rows: int) -> tuple[str, ...]:
    """Returns what the rows of a classifier stand for.

    Args:
        content: of config.json.
        num_rows: of the classifier.

    Returns:
        A name for each row, LABEL_0 and so on where config.json has none; empty where it names
        others than the rows that there are.
    """
    named = content.get("id2label")
    if named is None:  # transformers leaves these out
        return _generic(num_rows)
    keys = [str(number) for number in range(num_rows)]
    if not isinstance(named, Mapping) or {*named} != {*keys}:
        return ()
    return tuple(str(named[key]) for key in keys)


def row_order(names: Sequence[str], labels: Sequence[str]) -> tuple[int, ...] | None:
    """Returns for each label of a run the row of a classifier; None where they are not the same.

    Args:
        names: of the rows, as ``label_names`` gives them.
        labels: of the run, in its order.
    """
    numbers = [str(number) for number in range(len(names))]
    if is_generic(names) and {*labels} == {*numbers}:
        names = numbers  # what LABEL_0 and so on are made of
    if len(names) != len(labels) or {*names} != {*labels}:
        return None
    return tuple(map([*names].index, labels))


def is_generic(names: Sequence[str]) -> bool:
    """Returns whether names say nothing: those that transformers gives where nobody has."""
    return tuple(names) == _generic(len(names))


def _generic(count: int) -> tuple[str, ...]:
    return tuple(f"LABEL_{number}" for number in range(count))
