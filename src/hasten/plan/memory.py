"""How much memory a process of a layout needs, before anything is built.

    TransformerConfig, Layout, Load --memory_use--> MemoryUse: bytes by what they are for

With P elements of weights in all, of w bytes, R of them outside blocks and B in the largest block,
T the degree of tensor and S that of shard; P, R and B are those that a process holds at T:

    weights, gradients    P w / S each
    optimizer             P w / S for each moment that it keeps; see ``_moments``
    copies                P w / S for averaged weights, and for the best model
    gathered (S > 1)      4 R w + 3 B w: weights outside blocks and their gradients stay whole
                          while a micro-batch is computed, reduce-scatter copies both; of one block
                          weights, gradients and a copy
    working               the most of: activations of a micro-batch (``activations``), what the
                          optimizer holds while it steps, and P w while DistributedDataParallel
                          orders its buckets anew

and at least all P w of the undivided model, which each process builds before it is spread. A table
of split rows is padded to a multiple. Where matrices are split, blocks hold a T-th of their
activations, but whole rows of what attention and feed-forward read; scores of tokens are held for
all rows at once, since no chunks are made of a split vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from dataclasses import dataclass

import numpy as np

from hasten.data.order import cut_micro_batches
from hasten.model.adapters import WHOLE, TrainedPart
from hasten.model.config import TransformerConfig
from hasten.model.stages import StageCosts
from hasten.optim.optimizers import default_settings
from hasten.parallel.layout import Layout
from hasten.parallel.pipeline_plan import filled_tokens, find_schedule
from hasten.parallel.traffic import StepShape
from hasten.parallel.traffic_weights import HeldWeight, held_model, padded_size
from hasten.plan.activations import MicroBatch, measure_activations

_BYTES = 4  # of a weight, whatever the precision
_GATHERED_REST, _GATHERED_BLOCK = 4, 3
_SCORE_COPIES = 3
_LARGER = 1.25  # from one size of a pipeline's micro-batches to the next
_MUON_COPIES = 5  # of the matrices of one shape: gradients, iterates and Gram matrices


@dataclass(frozen=True)
class Load:
    """What a run asks of its processes.

    Attributes:
        tokens_per_step: of all processes, on average; of an encoder-decoder both streams.
        micro_batch_tokens: most tokens at once, but for a long example alone.
        lengths: of some training examples, in ascending order; they stand for all.
        precision: in which matrices are multiplied.
        device_type: cpu or cuda.
        recompute: whether blocks are computed again in the backward pass.
        label_smoothing: of the loss.
        optimizer: its name.
        momentum: of the optimizer; None for its default.
        averages: whether averaged weights are kept.
        keeps_best: whether the best model so far is.
        schedule: of a pipeline.
        costs: by which a pipeline is cut.
        part: which weights are trained.
    """

    tokens_per_step: int
    micro_batch_tokens: int
    lengths: tuple[int, ...]
    precision: str = "float32"
    device_type: str = "cpu"
    recompute: bool = False
    label_smoothing: float = 0.0
    optimizer: str = "adamw"
    momentum: float | None = None
    averages: bool = False
    keeps_best: bool = False
    schedule: str = "1f1b"
    costs: StageCosts | None = None
    part: TrainedPart = WHOLE

    def step_shape(self, config: TransformerConfig, layout: Layout) -> StepShape:
        """Returns what a step of average size is in one process."""
        own_tokens = self.tokens_per_step / layout.num_batch_shares
        pieces, filled, num_empty = math.ceil(own_tokens / self.micro_batch_tokens), 0, 0
        if layout.pipeline > 1:
            sizes = self._sizes_of_pieces(own_tokens)
            pieces = len(sizes)
            filled = filled_tokens(max(sizes), self.num_tokens(layout))
            fitting = find_schedule(self.schedule).num_fitting(pieces, layout.pipeline)
            num_empty = fitting - pieces
        has_source = config.architecture == "encoder_decoder"
        tokens = math.ceil(own_tokens / pieces / (1 + has_source))
        return StepShape(
            tokens=tokens,
            num_micro_batches=pieces,
            filled_tokens=filled,
            num_empty=num_empty,
            source_tokens=tokens * has_source,
            product_bytes=4 if self.precision == "float32" else 2,
            recompute=self.recompute,
            smooths_labels=bool(self.label_smoothing),
            optimizer=self.optimizer,
            schedule=self.schedule,
            costs=self.costs,
            part=self.part,
        )

    def num_tokens(self, layout: Layout) -> tuple[int, ...]:
        """Returns values of N that a pipeline fills micro-batches up to, see ``filled_tokens``.

        The first is enough for whole steps, where those are short: a step exceeds its quota by less
        than an example, and so does a share of it the others. The rest is for texts that are drawn
        anew, which may be longer, and for evaluations.
        """
        longest, shares = self.lengths[-1], layout.num_batch_shares
        most = math.ceil((self.tokens_per_step + longest) / shares) + longest * (shares > 1)
        sizes = [min(self.micro_batch_tokens, most)]
        while sizes[-1] < self.micro_batch_tokens:
            larger = math.ceil(sizes[-1] * _LARGER)
            sizes.append(min(self.micro_batch_tokens, larger))
        return tuple(sizes)

    def _sizes_of_pieces(self, num_tokens: float) -> list[int]:
        """Returns the tokens of each micro-batch of a share with typical examples."""
        count = max(1, round(num_tokens * len(self.lengths) / sum(self.lengths)))
        lengths = self._typical(count)
        pieces = cut_micro_batches(np.arange(count), lengths, self.micro_batch_tokens)
        return [int(lengths[piece].sum()) for piece in pieces]

    def _typical(self, count: int) -> np.ndarray:
        """Returns (count,) lengths that stand for those of so many examples."""
        at = (np.arange(count) + 0.5) / count * len(self.lengths)
        return np.array(self.lengths)[at.astype(int)]

    def micro_batch(self, config: TransformerConfig, layout: Layout) -> MicroBatch:
        """Returns a large micro-batch of one process: typical examples, or the longest alone."""
        shape = self.step_shape(config, layout)
        tokens = shape.tokens + shape.source_tokens
        mean = sum(self.lengths) / len(self.lengths)
        count = max(1, math.ceil(tokens / mean))
        lengths = self._typical(count).tolist()
        if self.lengths[-1] > sum(lengths):
            lengths = [self.lengths[-1]]
        sources: list[int] = []
        if shape.source_tokens:
            sources = [max(1, n // 2) for n in lengths]
            lengths = [max(1, n - n // 2) for n in lengths]
        most = config.max_positions
        return MicroBatch(
            lengths=tuple(min(n, most) for n in lengths),
            source_lengths=tuple(min(n, most) for n in sources),
            precision=self.precision,
            label_smoothing=self.label_smoothing,
            recompute=self.recompute,
        )


@dataclass(frozen=True)
class MemoryUse:
    """Bytes of one process.

    Attributes:
        weights: its part of them.
        gradients: of its part.
        optimizer: what the optimizer remembers of it.
        copies: averaged weights and the best model.
        gathered: parts of others, while they are needed.
        working: activations, or what the optimizer holds while it steps.
        built: the whole model, before it is spread.
    """

    weights: int
    gradients: int
    optimizer: int
    copies: int
    gathered: int
    working: int
    built: int

    @property
    def total(self) -> int:
        """The most that is held at one time."""
        kept = self.weights + self.gradients + self.optimizer + self.copies
        return max(self.built, kept + self.gathered + self.working)


def memory_use(config: TransformerConfig, layout: Layout, load: Load) -> MemoryUse:
    """Returns what one process of a layout without pipeline needs.

    Args:
        config: of the model.
        layout: of the processes.
        load: what the run asks of them.
    """
    assert layout.pipeline == 1, layout
    weights, num_shards = (
        held_model(config, layout, part=load.part).weights,
        layout.shard * layout.context,
    )
    shapes = {w: padded_size(w.shape, num_shards) // num_shards for w in weights}
    own = sum(shapes.values()) * _BYTES
    moved = tuple(w for w in weights if w.is_trained)
    trained = sum(shapes[w] for w in moved) * _BYTES
    in_blocks = Counter[str]()
    for weight in weights:
        in_blocks[weight.block] += math.prod(weight.shape) * _BYTES
    rest, block = in_blocks.pop("", 0), max(in_blocks.values(), default=0)
    is_gathered = num_shards > 1
    buckets = trained if layout.has_whole_weights and layout.replicate * layout.context > 1 else 0
    on_device = load.device_type == "cpu" or not layout.has_whole_weights
    built = sum(math.prod(w.whole_shape) for w in weights) * _BYTES
    return MemoryUse(
        weights=own,
        gradients=trained,
        optimizer=sum(int(_moments(load, w) * shapes[w] * _BYTES) for w in moved),
        copies=trained * load.averages + own * (load.keeps_best and on_device),
        gathered=is_gathered * (_GATHERED_REST * rest + _GATHERED_BLOCK * block),
        working=max(_activations(config, layout, load), _stepping(load, moved, trained), buckets),
        built=built,
    )


def _moments(load: Load, weight: HeldWeight) -> float:
    """Returns how many numbers an optimizer keeps for each of a weight."""
    name = load.optimizer
    if name == "adafactor":  # whole weights only: a number for each row and each column
        shape = weight.shape
        return 1 / shape[-1] + 1 / shape[-2] if len(shape) > 1 else 1.0
    if name == "muon":
        return 1.0 if weight.is_matrix_of_block else 2.0
    momentum = load.momentum
    if momentum is None:
        momentum = default_settings(name).get("momentum", 0.0)
    return {"sgd": 0, "adagrad": 1, "rmsprop": 1}.get(name, 2) + bool(momentum)


def _stepping(load: Load, weights: tuple[HeldWeight, ...], own: int) -> int:
    """Returns what an optimizer holds while it steps; fused ones nothing."""
    if load.optimizer == "adafactor":  # weight by weight
        return max(math.prod(w.shape) for w in weights) * _BYTES
    if load.optimizer == "muon":
        # All matrices of one shape are orthogonalised together, whole; the others as one.
        alike, others = Counter[tuple[int, ...]](), 0
        for weight in weights:
            size = math.prod(weight.whole_shape) * _BYTES
            if weight.is_matrix_of_block:
                alike[weight.whole_shape] += size
            else:
                others += size
        return max(_MUON_COPIES * max(alike.values(), default=0), others)
    copies = {"adam": 0, "adamw": 0, "sgd": 0, "adagrad": 2, "adadelta": 2}
    return own * copies.get(load.optimizer, 1)


def _activations(config: TransformerConfig, layout: Layout, load: Load) -> int:
    batch = load.micro_batch(config, layout)
    if load.device_type == "cuda":  # whose kernels of attention do not keep what is dropped
        config = dataclasses.replace(config, attention_dropout=0.0)
    found = measure_activations(config, batch)
    num_parts = layout.tensor * layout.context
    kept, elsewhere = found.blocks // num_parts, found.elsewhere
    if num_parts > 1:  # where the last block computes all rows
        elsewhere = max(0, elsewhere)
    if layout.tensor == 1:
        return kept + elsewhere
    is_pair = config.architecture == "encoder_decoder"
    num_blocks = config.num_layers + (config.decoder_layers if is_pair else 0)
    rows = max(sum(batch.lengths), sum(batch.source_lengths)) // layout.context
    if not load.recompute:
        read = (3 if is_pair else 2) * rows * config.hidden_size * _BYTES
        kept += num_blocks * read * (layout.tensor - 1) // layout.tensor
    if config.head == "language_modelling":
        scores = sum(batch.lengths) * config.vocab_size * _BYTES // num_parts
        elsewhere += _SCORE_COPIES * scores
    return kept + elsewhere
