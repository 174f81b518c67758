"""Which layout is chosen, from a model's size, memory and connections."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.model.config import TransformerConfig
from hasten.parallel.apply import check_layout
from hasten.parallel.layout import Layout
from hasten.parallel.resources import Link, Resources
from hasten.plan.memory import Load, memory_use
from hasten.plan.spread import USABLE, Candidate, choose_spread, layouts, weigh

MB = 10**6
GPT: dict[str, Any] = {"architecture": "decoder", "head": "language_modelling", "dropout": 0.0}
SMALL = TransformerConfig(2000, 2, 128, 4, **GPT)
MIDDLE = TransformerConfig(20000, 8, 512, 8, **GPT)
PAIR = TransformerConfig(500, 2, 64, 4, architecture="encoder_decoder", head="language_modelling")
ODD = TransformerConfig(500, 3, 60, 6, num_kv_heads=2, stochastic_depth=0.1)
# Shares of every size below come to whole micro-batches, so that few are looked at.
LOAD = Load(tokens_per_step=512 * 48, micro_batch_tokens=512, lengths=(128,))
FAST, SLOW = Link(1e10, 1e-5), Link(1e9, 1e-4)


@pytest.mark.parametrize(
    ("config", "size", "local", "memory", "across", "wanted"),
    [
        # A whole copy needs 804 MB, a half 722, a quarter 580, an eighth 509.
        (SMALL, 8, 8, 1000 * MB, FAST, "replicate=8"),
        (MIDDLE, 8, 8, 1000 * MB, FAST, "replicate=8"),
        (MIDDLE, 8, 4, 1000 * MB, SLOW, "replicate=8"),
        (MIDDLE, 2, 2, 850 * MB, FAST, "shard=2"),
        # Groups of shards within hosts, copies among hosts, where that fits ...
        (MIDDLE, 8, 4, 660 * MB, SLOW, "replicate=2,shard=4"),
        # ... else shards among all, slow as connections are.
        (MIDDLE, 8, 4, 580 * MB, SLOW, "shard=8"),
        # Matrices are split, within a host, only where no shards fit.
        (MIDDLE, 8, 4, 560 * MB, SLOW, "replicate=2,shard=2,tensor=2"),
        # and where a host has one process, the least that there is.
        (MIDDLE, 8, 1, 560 * MB, SLOW, "shard=8"),
    ],
)
def test_the_layout_of_a_case(
    config: TransformerConfig, size: int, local: int, memory: int, across: Link, wanted: str
):
    found = choose_spread(config, size, LOAD, Resources(memory, local, FAST, across))
    assert str(found.layout) == wanted


def test_the_reason_has_the_figures():
    fits = choose_spread(SMALL, 2, LOAD, Resources(1000 * MB, 2, FAST, FAST))
    assert fits.reason.endswith("of 1.0 GB a process")
    fits = choose_spread(MIDDLE, 2, LOAD, Resources(850 * MB, 2, FAST, SLOW, is_measured=False))
    assert "803.6 MB of 850.0 MB a process" in fits.reason
    assert "assumed at 1.0 GB/s" in fits.reason


def test_where_nothing_fits_it_says_by_how_much_and_what_would():
    load = dataclasses.replace(LOAD, micro_batch_tokens=2048)
    resources = Resources(20 * MB, 2, FAST, FAST)
    need = choose_spread(SMALL, 2, load, resources)
    assert need.warning is not None
    assert "of 20.0 MB a process" in need.warning
    assert str(need.layout) in need.warning
    # What is advised fits, and is enough for the choice made anew.
    tokens = int(need.warning.split("--train.micro_batch_tokens ")[1].split()[0])
    advised = dataclasses.replace(
        load, micro_batch_tokens=tokens, recompute="recompute true" in need.warning
    )
    assert choose_spread(SMALL, 2, advised, resources).warning is None
    hopeless = choose_spread(SMALL, 2, LOAD, Resources(MB, 2, FAST, FAST))
    assert hopeless.warning is not None
    assert "smaller model" in hopeless.warning


CASES = st.tuples(
    st.sampled_from([SMALL, PAIR, ODD]),
    st.sampled_from([2, 3, 4, 6, 8]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from(["adamw", "muon", "adafactor"]),
    st.sampled_from([Link(1e7, 1e-3), SLOW, FAST]),
)


def everything(
    config: TransformerConfig, size: int, load: Load, resources: Resources
) -> dict[Layout, Candidate]:
    """All that may be chosen."""
    names = config, size, load.optimizer, resources.local_size
    return {
        layout: weigh(config, layout, load, resources)
        for kind in range(3)
        for layout in layouts(*names, kind)
    }


@settings(max_examples=20, deadline=None)
@given(case=CASES, memory=st.floats(0.3, 1.5), more=st.floats(1.0, 3.0))
def test_what_is_chosen_can_be_built_fits_and_gets_no_slower_with_memory(
    case: tuple[TransformerConfig, int, int, str, Link], memory: float, more: float
):
    config, size, local, optimizer, across = case
    local = local if size % local == 0 else 1
    load = dataclasses.replace(LOAD, optimizer=optimizer)
    whole = memory_use(config, Layout(replicate=size), load).total
    resources = Resources(int(memory * whole), local, FAST, across)
    known = everything(config, size, load, resources)
    found = choose_spread(config, size, load, resources)
    assert found.layout.size == size
    assert found.layout.pipeline == found.layout.context == 1
    check_layout(config, found.layout, "1f1b")
    chosen, usable = known[found.layout], USABLE * resources.memory_bytes
    fitting = [one for one in known.values() if one.memory_bytes <= usable]
    assert (found.warning is None) == bool(fitting)
    if not fitting:
        assert chosen.memory_bytes == min(one.memory_bytes for one in known.values())
        return
    assert chosen in fitting
    assert chosen.kind == min(one.kind for one in fitting)
    roomier = dataclasses.replace(resources, memory_bytes=int(more * resources.memory_bytes))
    better = known[choose_spread(config, size, load, roomier).layout]
    assert (better.kind, better.sending_seconds) <= (chosen.kind, chosen.sending_seconds)
