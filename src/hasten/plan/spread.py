"""Chooses the layout of a run's processes, by a model of memory and measured connections.

    candidates --memory_use--> those that fit --seconds of sending--> the first of the best kind

Kinds in the order in which they are taken, whatever they would send: whole copies; weights in
shards, in as many groups as pays; matrices split within a host as well. Arithmetic takes equally
long in all of them, so that within a kind only what is sent decides: for each of the messages of
``traffic`` its bytes by the rate of the connection that it takes, and the latency of each. Groups
of processes that lie across hosts share the connection of their host. Context and pipeline are
never chosen: they need no less memory than shards among all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hasten.core.errors import UsageError
from hasten.model.config import TransformerConfig
from hasten.parallel.apply import check_layout
from hasten.parallel.layout import Layout
from hasten.parallel.resources import Resources
from hasten.parallel.traffic import Message, amount, step_traffic
from hasten.plan.memory import Load, memory_use

USABLE = 0.9
"""Share of free memory to plan with; the rest is for what the model of memory does not know."""
_FEW_TOKENS = 256


@dataclass(frozen=True)
class Candidate:
    """A layout and what it would take.

    Attributes:
        layout: that the model can be spread by.
        kind: 0 for whole copies, 1 for shards, 2 for split matrices.
        memory_bytes: of a process.
        sending_seconds: of a step, without any of it hidden behind arithmetic.
    """

    layout: Layout
    kind: int
    memory_bytes: int
    sending_seconds: float

    @property
    def order(self) -> tuple[int, float, int]:
        """By what the first that fits is chosen."""
        return self.kind, self.sending_seconds, self.layout.shard


@dataclass(frozen=True)
class Spread:
    """A chosen layout.

    Attributes:
        layout: of all processes.
        reason: why it was chosen.
        warning: what is wrong with it; None where it fits.
    """

    layout: Layout
    reason: str
    warning: str | None = None


def choose_spread(config: TransformerConfig, size: int, load: Load, resources: Resources) -> Spread:
    """Returns the layout of ``size`` processes.

    Args:
        config: of the model.
        size: how many processes there are.
        load: what the run asks of them.
        resources: what they have.
    """
    usable = resources.memory_bytes * USABLE
    seen: list[Candidate] = []
    for kind in range(3):
        found = [
            weigh(config, layout, load, resources)
            for layout in layouts(config, size, load.optimizer, resources.local_size, kind)
        ]
        seen += found
        fitting = [one for one in found if one.memory_bytes <= usable]
        if fitting:
            best = min(fitting, key=lambda one: one.order)
            return Spread(best.layout, _reason(best, seen[0], resources))
    least = min(seen, key=lambda one: (one.memory_bytes, one.order))
    return Spread(
        least.layout,
        f"needs least, about {amount(least.memory_bytes)} a process",
        _warning(config, least, [one.layout for one in seen], load, resources),
    )


def layouts(
    config: TransformerConfig, size: int, optimizer: str, local_size: int, kind: int
) -> Iterator[Layout]:
    """Yields the layouts of a kind that a model can be spread by."""
    if kind == 0:
        yield Layout(replicate=size)
        return
    if optimizer == "adafactor":
        return  # it needs whole weights
    degrees = [1] if kind == 1 else [n for n in _divisors(local_size) if n > 1]
    for tensor in degrees:
        for shard in _divisors(size // tensor):
            layout = Layout(replicate=size // tensor // shard, shard=shard, tensor=tensor)
            if not layout.has_whole_weights and _is_possible(config, layout):
                yield layout


def weigh(config: TransformerConfig, layout: Layout, load: Load, resources: Resources) -> Candidate:
    """Returns what a layout takes."""
    traffic = step_traffic(config, layout, load.step_shape(config, layout))
    seconds = sum(_seconds(message, layout, resources) for message in traffic.messages)
    kind = 2 if layout.tensor > 1 else 0 if layout.has_whole_weights else 1
    return Candidate(layout, kind, memory_use(config, layout, load).total, seconds)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _is_possible(config: TransformerConfig, layout: Layout) -> bool:
    try:
        check_layout(config, layout, "1f1b")
    except UsageError:
        return False
    return True


def _seconds(message: Message, layout: Layout, resources: Resources) -> float:
    """Returns how long messages take; neighbours share matrices, then shards, then copies."""
    strides = {
        "tensor": 1,
        "shard": layout.tensor,
        "replicate": layout.size // message.num_processes,
        "all": 1,
    }
    stride = strides[message.axis]
    local = resources.local_size
    reach = stride * message.num_processes
    if reach <= local and local % reach == 0:
        link, sharing = resources.within, 1
    else:
        link, sharing = resources.across, min(stride, local)
    seconds = message.sent_bytes * sharing / link.bytes_per_second
    return seconds + message.count * link.latency_seconds


def _reason(best: Candidate, first: Candidate, resources: Resources) -> str:
    have = f"{amount(resources.memory_bytes)} a process"
    if best.kind == 0:
        return f"a whole copy needs about {amount(best.memory_bytes)} of {have}"
    rate = amount(min(resources.within.bytes_per_second, resources.across.bytes_per_second))
    how = "measured" if resources.is_measured else "assumed"
    return (
        f"a whole copy would need about {amount(first.memory_bytes)} of {have}, a share "
        f"{amount(best.memory_bytes)}; all-reduce {how} at {rate}/s, sending takes about "
        f"{best.sending_seconds:.2g} s a step"
    )


def _warning(
    config: TransformerConfig,
    least: Candidate,
    known: Sequence[Layout],
    load: Load,
    resources: Resources,
) -> str:
    """Returns by how much nothing fits, and what would."""
    usable = resources.memory_bytes * USABLE
    said = (
        f"no layout of {least.layout.size} processes is sure to fit: {least.layout} needs least, "
        f"about {amount(least.memory_bytes)} of {amount(resources.memory_bytes)} a process"
    )
    shape = load.step_shape(config, least.layout)
    largest = min(load.micro_batch_tokens, shape.tokens + shape.source_tokens)
    for recompute in dict.fromkeys((load.recompute, True)):
        tokens = largest
        while tokens >= min(_FEW_TOKENS, largest):
            changed = dataclasses.replace(load, recompute=recompute, micro_batch_tokens=tokens)
            need = min(memory_use(config, layout, changed).total for layout in known)
            if need <= usable:
                what = ["--train.recompute true"] * (recompute and not load.recompute)
                what += [f"--train.micro_batch_tokens {tokens}"] * (tokens < largest)
                return f"{said}; {' '.join(what)} needs {amount(need)}, with the same result"
            tokens //= 2
    return f"{said}; take a smaller model, or more processes on other hosts"
