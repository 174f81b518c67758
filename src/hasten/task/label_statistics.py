"""Labels and how often they occur: their order, their weights, how sure an accuracy is."""

from __future__ import annotations


def balanced_class_weights(counts: tuple[int, ...]) -> tuple[float, ...]:
    """Returns (K,) weights ``total / (K * count)``, so that every class weighs the same."""
    total = sum(counts)
    return tuple(total / (len(counts) * max(count, 1)) for count in counts)


def sort_labels(names: tuple[str, ...]) -> tuple[str, ...]:
    """Returns label names in a fixed order: whole numbers by value, else by text."""
    try:
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    except ValueError:
        return tuple(sorted(names))


def accuracy_interval(accuracy: float, num_examples: int) -> tuple[float, float]:
    """Returns the 95% Wilson score interval of a fraction (Wilson 1927)."""
    if num_examples == 0:
        return 0.0, 1.0
    z = 1.959963984540054
    centre = accuracy + z * z / (2 * num_examples)
    spread = accuracy * (1 - accuracy) / num_examples + z * z / (4 * num_examples**2)
    half = z * spread**0.5
    scale = 1 + z * z / num_examples
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)
