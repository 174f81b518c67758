"""Measures how long the parts of a model take, by which a pipeline is cut.

    TransformerConfig, Load, device --forward and backward of one block, embedding, head--> seconds
        --> StageCosts, a block being 1

Counted products and sums (``stage_costs``) leave out what only moves memory: a softmax over a large
vocabulary, norms, dropout, gradients of a table. Blocks are alike, so that one stands for all.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from hasten.core.batch import PackedBatch, SequenceLayout, positions_from_lengths
from hasten.model.config import TransformerConfig
from hasten.model.heads import TokenOutputs
from hasten.model.stages import StageCosts, own_stack, stage_costs
from hasten.model.transformer import Transformer
from hasten.plan.memory import Load
from hasten.task.generating import token_loss_sum
from hasten.training.precision import computing_in, convert_matrices

_FLOP = {"cpu": 1e10, "cuda": 1e12}
"""Products and sums of one round, so that it is short, and long beside the start of a kernel."""
_LEAST_ROWS = 128  # fewer would be little beside gradients of weights, which any number writes
_SECONDS = 0.3
_ROUNDS = 2
_MULTIPLE = 16  # of rows, in the units that multiply 8 bits


def measure_stage_costs(config: TransformerConfig, load: Load, device: torch.device) -> StageCosts:
    """Returns what the parts of a model cost, in forward and backward passes of one block.

    Args:
        config: of the model, which can be cut.
        load: what the run asks of its processes.
        device: where to compute.
    """
    length = min(round(sum(load.lengths) / len(load.lengths)), config.max_positions)
    counted = stage_costs(config, length)
    flop = 3 * (counted.embedding + counted.block + counted.head)
    # An embedding takes no products, and at full size as long as its gradient, a whole table.
    all_rows = -(-min(load.micro_batch_tokens, load.tokens_per_step) // _MULTIPLE) * _MULTIPLE
    wanted = max(_LEAST_ROWS, int(_FLOP[device.type] / flop) // _MULTIPLE * _MULTIPLE)
    rows = min(all_rows, wanted)
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(0)
        model = _one_block(config, load, device)
        all_tokens, some = (_batch(config, length, n).to(device) for n in (all_rows, rows))
        embedding, block, head = _least_seconds(
            _parts(model, all_tokens, some, load, device), device
        )
    return StageCosts(round(embedding * rows / all_rows / block, 3), 1.0, round(head / block, 3))


def _one_block(config: TransformerConfig, load: Load, device: torch.device) -> Transformer:
    """Returns the model with a single block, as it would be trained."""
    config = dataclasses.replace(config, num_layers=1, global_layers=())
    model = Transformer.from_config(config).to(device).train()
    own_stack(model).recompute = load.recompute
    convert_matrices(model, load.precision)
    return model


def _batch(config: TransformerConfig, length: int, rows: int) -> PackedBatch:
    """Returns random sequences of one length, the last of them shorter."""
    lengths = [length] * (rows // length) + [rows % length] * (rows % length > 0)
    return PackedBatch(
        token_ids=torch.randint(config.vocab_size, (rows,)),
        positions=torch.from_numpy(positions_from_lengths(lengths)),
        layout=SequenceLayout.from_lengths(lengths),
        example_ids=torch.arange(len(lengths)),
        targets=torch.randint(config.vocab_size, (rows,)),
    )


def _parts(
    model: Transformer,
    all_tokens: PackedBatch,
    batch: PackedBatch,
    load: Load,
    device: torch.device,
) -> list[Callable[[], None]]:
    """Returns what runs the embedding of all tokens, and block and head of a batch, both ways."""
    stack = own_stack(model)
    x_ND = torch.randn(batch.num_tokens, model.config.hidden_size, device=device)
    x_ND = x_ND.to(next(model.parameters()).dtype).requires_grad_()

    def embedding() -> Tensor:
        return stack.enter(model.embed(all_tokens), all_tokens.positions).sum()

    def block() -> Tensor:
        return stack.advance(x_ND, batch).sum()

    def head() -> Tensor:
        outputs = model.score(stack.leave(x_ND), batch.layout)
        if isinstance(outputs, TokenOutputs):
            return token_loss_sum(outputs, batch, load.label_smoothing)
        return outputs.float().square().sum()

    def both_ways(part: Callable[[], Tensor]) -> None:
        with computing_in(load.precision, device):
            result = part()
        result.backward()
        x_ND.grad = None
        model.zero_grad()

    return [lambda part=part: both_ways(part) for part in (embedding, block, head)]


def _least_seconds(parts: list[Callable[[], None]], device: torch.device) -> list[float]:
    """Returns the shortest time of each: whatever else the machine does only makes one longer."""
    for run in parts:
        run()  # the first one chooses kernels
    least, number, end = [math.inf] * len(parts), 0, time.perf_counter() + _SECONDS
    while number < _ROUNDS or time.perf_counter() < end:
        for i, run in enumerate(parts):  # in turn, so that a busy moment meets all
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            least[i] = min(least[i], time.perf_counter() - start)
        number += 1
    return least
