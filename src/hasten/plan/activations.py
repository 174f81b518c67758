"""What a step holds while it computes, read off the model itself, which runs without memory.

    TransformerConfig, MicroBatch --forward and backward on fake tensors--> bytes held at once

Fake tensors have shapes and no numbers (torch's FakeTensorMode), so that nothing here can differ
from the model: kernels of attention, chunks of the loss, copies in 16 bits are those of a real run
on a CPU. A GPU takes less, since it remembers in a byte what dropout has dropped. Two depths are
run, whose difference is a block. Weights and their gradients are not counted.
"""

# pyright: reportPrivateImportUsage=false
# torch 2.13 has no other public name for FakeTensorMode and TorchDispatchMode.

from __future__ import annotations

import dataclasses
import weakref
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hasten.core.batch import PackedBatch, SequenceLayout, positions_from_lengths
from hasten.model.attention import near_mask
from hasten.model.config import TransformerConfig
from hasten.model.heads import TokenOutputs
from hasten.model.token_loss import linear_cross_entropy_sum
from hasten.model.transformer import Transformer
from hasten.plan.probe import PRECISIONS

_FEW, _MORE = 2, 3


@dataclass(frozen=True)
class MicroBatch:
    """What the model is run on at once.

    Attributes:
        lengths: of the sequences, in the order of the stream; of an encoder-decoder's target.
        source_lengths: of what an encoder-decoder reads.
        precision: a key of ``PRECISIONS``.
        label_smoothing: of the loss of token scores.
        recompute: whether blocks are computed again in the backward pass.
    """

    lengths: tuple[int, ...]
    source_lengths: tuple[int, ...] = ()
    precision: str = "float32"
    label_smoothing: float = 0.0
    recompute: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of both streams."""
        return sum(self.lengths) + sum(self.source_lengths)


@dataclass(frozen=True)
class Activations:
    """Bytes that a micro-batch takes, besides weights and their gradients.

    Attributes:
        blocks: what the blocks keep for the backward pass, of the encoder and the decoder.
        elsewhere: embeddings, head and loss, and what is held for a moment; less what the last
            block need not keep where the head looks at few of its rows.
    """

    blocks: int
    elsewhere: int


def measure_activations(config: TransformerConfig, batch: MicroBatch) -> Activations:
    """Returns what a micro-batch takes in a process that has the whole model.

    The last block of a stack stays the last one, since a head may want few of its rows.
    """
    is_pair = config.architecture == "encoder_decoder"
    depth = config.decoder_layers if is_pair else config.num_layers
    num_global = len(set(config.global_layers))
    ends_global = depth - 1 in config.global_layers
    shallow = _held(_with_layers(config, _FEW, 0, ends_global), batch)
    local = _held(_with_layers(config, _MORE, 0, ends_global), batch) - shallow
    everywhere = local
    if num_global:
        everywhere = _held(_with_layers(config, _MORE, 1, ends_global), batch) - shallow
    blocks = (depth - num_global) * local + num_global * everywhere
    measured = (_FEW - 1) * local + (everywhere if ends_global else local)
    if is_pair:
        deeper = dataclasses.replace(_with_layers(config, _FEW, 0, ends_global), num_layers=_MORE)
        encoder = _held(deeper, batch) - shallow
        blocks, measured = blocks + config.num_layers * encoder, measured + _FEW * encoder
    return Activations(blocks=blocks, elsewhere=shallow - measured)


def _with_layers(
    config: TransformerConfig, depth: int, num_global: int, ends_global: bool
) -> TransformerConfig:
    """Returns the model with fewer blocks; of a pair the decoder has ``depth`` of them.

    Args:
        config: of the model.
        depth: blocks of the stack that may have a window.
        num_global: of its first blocks have none.
        ends_global: whether its last block has none.
    """
    is_pair = config.architecture == "encoder_decoder"
    return dataclasses.replace(
        config,
        num_layers=_FEW if is_pair else depth,
        num_decoder_layers=depth if is_pair else None,
        global_layers=(*range(num_global), *[depth - 1] * ends_global),
    )


@lru_cache(maxsize=64)
def _held(config: TransformerConfig, batch: MicroBatch) -> int:
    """Returns the peak of a forward and backward pass."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cpu"):
        model = Transformer.from_config(config).train()
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(_forget)
        for stack in model.stacks:
            stack.recompute = batch.recompute
        given = _pack(batch.lengths)
        if batch.source_lengths:
            given = dataclasses.replace(given, source=_pack(batch.source_lengths))
        known = {id(t.untyped_storage()) for t in (*model.parameters(), *model.buffers())}
        dtype, is_low = PRECISIONS[batch.precision], batch.precision != "float32"
        with _Held(known) as held:
            with torch.autocast("cpu", dtype=dtype, enabled=is_low):
                loss = _loss(model(given), batch.label_smoothing)
            loss.backward()
    near_mask.cache_clear()  # a fake one must not be met again
    return held.peak


def _forget(parameter: Tensor) -> None:
    parameter.grad = None


def _pack(lengths: tuple[int, ...]) -> PackedBatch:
    return PackedBatch(
        token_ids=torch.zeros(sum(lengths), dtype=torch.int64),
        positions=torch.from_numpy(positions_from_lengths(lengths)),
        layout=SequenceLayout.from_lengths(lengths),
        example_ids=torch.arange(len(lengths)),
    )


def _loss(outputs: Any, label_smoothing: float) -> Tensor:
    """Returns a loss that holds what the task's does."""
    if isinstance(outputs, TokenOutputs):
        return linear_cross_entropy_sum(
            outputs.hidden_ND,
            outputs.weight_VD,
            torch.zeros(len(outputs.hidden_ND), dtype=torch.int64),
            label_smoothing=label_smoothing,
            bias_V=outputs.bias_V,
            softcap=outputs.softcap,
        )
    targets = torch.zeros(len(outputs), dtype=torch.int64)
    return F.cross_entropy(outputs.float(), targets, reduction="sum")


class _Held(TorchDispatchMode):
    """Counts the bytes of all tensors that live at the same time.

    Args:
        known: ids of storages that do not count.

    Attributes:
        peak: the most so far.
    """

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self._known, self._sizes = known, {}
        self._alive = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation and looks at what it put out."""
        del types
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return out

    def _see(self, storage: Any) -> None:
        key = id(storage)
        if key in self._known or key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self._alive += self._sizes[key]
        self.peak = max(self.peak, self._alive)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self._alive -= self._sizes.pop(key)
