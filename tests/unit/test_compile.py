"""Compiled blocks compute what plain ones do, for streams of any length, compiled once.

model --apply_parallel(compiles=True)--> the same outputs, gradients and, after two streams, no
more graphs

A stream of one token is compiled apart: torch takes sizes of 1 for constants.
"""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from hasten.core.batch import PackedBatch, SequenceLayout
from hasten.core.errors import MachineError, UsageError
from hasten.core.ranks import ALONE
from hasten.model.transformer import Transformer
from hasten.parallel.apply import ParallelSettings, apply_parallel, check_layout
from hasten.parallel.layout import choose_layout

CPU = torch.device("cpu")
OPTIONS = {"vocab_size": 50, "num_layers": 2, "hidden_size": 32, "num_heads": 2, "norm": "rmsnorm"}
STREAMS = [[1], [3, 3, 3], [2, 9, 5, 17], [8, 4, 4, 40, 2], [12, 11], [1], [5, 5]]

needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="there is no C++ compiler"
)


def packed(lengths: list[int]) -> PackedBatch:
    layout = SequenceLayout.from_lengths(lengths)
    ids = torch.randint(0, OPTIONS["vocab_size"], (layout.num_tokens,))
    positions = torch.cat([torch.arange(n) for n in lengths]).int()
    return PackedBatch(ids, positions, layout, example_ids=torch.arange(len(lengths)))


def outputs_and_gradients(model: Transformer, batch: PackedBatch) -> list[torch.Tensor]:
    model.zero_grad()
    outputs = model(batch)
    outputs = outputs if isinstance(outputs, torch.Tensor) else outputs.hidden_ND
    outputs.square().sum().backward()
    return [outputs.detach(), *(w.grad.clone() for w in model.parameters() if w.grad is not None)]


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_blocks_equal_plain_ones_and_are_compiled_once(recompute: bool):
    torch._dynamo.reset()
    torch.manual_seed(1)
    model = Transformer(dropout=0.0, **OPTIONS)
    batches = [packed(lengths) for lengths in STREAMS]
    expected = [outputs_and_gradients(model, batch) for batch in batches]
    for stack in model.stacks:
        stack.recompute = recompute
    apply_parallel(model, ALONE, ParallelSettings(CPU, compiles=True))
    counters.clear()
    graphs = []
    for batch, wanted in zip(batches, expected, strict=True):
        torch.testing.assert_close(outputs_and_gradients(model, batch), wanted)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0 and graphs[2] == graphs[-1], graphs


@needs_compiler
def test_dropout_in_compiled_blocks_derives_from_the_seed(monkeypatch):
    plain = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda m, **kw: plain(m, backend="aot_eager", **kw))
    model, batch = Transformer(dropout=0.3, **OPTIONS), packed([4, 7])
    apply_parallel(model, ALONE, ParallelSettings(CPU, compiles=True))
    found = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        found.append(outputs_and_gradients(model, batch)[0])
    assert torch.equal(found[0], found[1]) and not torch.allclose(found[0], found[2])


def test_nothing_to_compile_with_is_an_error_before_the_first_step(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(MachineError, match=r"C\+\+ compiler .* leave it out"):
        apply_parallel(Transformer(**OPTIONS), ALONE, ParallelSettings(CPU, compiles=True))


def test_compiled_blocks_and_a_zero_bubble_schedule_are_refused():
    config, layout = Transformer(**OPTIONS).config, choose_layout("pipeline=2", 2)
    check_layout(config, layout, "1f1b", compiles=True)
    with pytest.raises(UsageError, match="zero-bubble"):
        check_layout(config, layout, "zero-bubble", compiles=True)
