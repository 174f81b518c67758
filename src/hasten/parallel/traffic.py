"""How much the processes of a run send each other in a step, by formulas.

    TransformerConfig, Layout, StepShape --step_traffic--> Traffic: messages --> bytes by kind

Two quantities are told apart. The **payload** of a collective is the bytes of the tensor that it is
about: what is summed (all-reduce), the whole that is put together (all-gather) or summed and dealt
out (reduce-scatter), what a process hands over (all-to-all, send). It is what tests compare with
the collectives that a step issues. What a process then **sends** follows from it, with b bytes of
payload among n processes, by ring algorithms, which gloo and NCCL use for long messages (Patarasuk
and Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations"):

    all-reduce                                  2 b (n - 1) / n
    all-gather, reduce-scatter, all-to-all        b (n - 1) / n
    send                                          b

Payloads of one process, with P elements of weights of w bytes, m micro-batches, N rows of a stream
of D elements (W of embeddings), and the degrees R (replicate), S (shard), C (context), T (tensor):

    replicate, context  all-reduce of gradients     P w, once a step
    shard (S C > 1)     all-gather of weights       m w (2 P of blocks + P of the rest) / T
                        reduce-scatter of gradients w P / T, once a step
      with replicate    all-reduce of its part      w P / (T S C), once a step
    tensor, a block     all-gather, reduce-scatter  m N / C D for each input, and for each output
                                                    of attention and feed-forward, either way
            elsewhere   all-reduce of embeddings    m N W; all-gather backward N / C D
                        all-gather of hidden states m N / C D
                        all-reduce of the loss      m N (D + 3), of token scores
                        all-reduce of gradients     of norms, once a step
    context, a block    all-to-all                  m N / C E (2 H + 2 K) / T, either way; for H
                                                    heads of E elements, K of keys and values
            at the end  all-gather, reduce-scatter  m N D
    pipeline            sends                       m N / (C T) D for each border, either way

In a pipeline m counts the empty micro-batches that a schedule adds, but for the loss, and N is what
each is filled up to: see ``StepShape``. Its processes send unlike much: ``largest_traffic``.

FSDP2 gathers a block's weights for the forward of each micro-batch and again for its backward, what
is outside blocks once for both (in a pipeline all once a step), and scatters gradients with the
last micro-batch only. Blocks that are computed again in the backward pass send again what their
forward sent. Muon orthogonalises whole matrices and gathers their gradients once a step. Label
smoothing sums m N D more where the vocabulary is split, and a pipeline the gradient of a tied
weight. Sharding pads the first dimension of each weight to a multiple. Two sums of scalars close a
step. Frozen weights are gathered and have no gradients; the lowest blocks, where all of their
weights are frozen, are not needed in the backward pass and gathered less often than counted here.

Left out: what the first two steps settle (DistributedDataParallel's buckets, a pipeline's way);
evaluations, checkpoints and the loop's own agreements, which do not happen in each step.

Shapes: N rows of the stream, D hidden size, H heads, K key/value heads, E head size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from hasten.model.adapters import WHOLE, TrainedPart
from hasten.model.config import TransformerConfig
from hasten.model.stages import TIED_NAME, StageCosts
from hasten.parallel.layout import Layout
from hasten.parallel.traffic_weights import HeldModel, held_model, padded_size

Kind = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all", "send_recv"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class StepShape:
    """What a step works on in each process.

    Attributes:
        tokens: of a micro-batch, without filler.
        num_micro_batches: of each process, without empty ones.
        filled_tokens: rows that a pipeline fills a micro-batch up to, where that is more.
        num_empty: micro-batches that a pipeline adds, of nothing but filler.
        source_tokens: of a micro-batch of an encoder-decoder's source.
        weight_bytes: an element of weights, gradients, norms and the residual stream takes.
        product_bytes: an element takes that a matrix has put out; 2 in bf16 and fp16.
        recompute: whether blocks are computed again in the backward pass.
        smooths_labels: whether the loss of token scores has label smoothing.
        optimizer: its name.
        schedule: of a pipeline.
        costs: by which a pipeline is cut; None for those of sequences without a length.
        part: which weights are trained.
    """

    tokens: int
    num_micro_batches: int = 1
    filled_tokens: int = 0
    num_empty: int = 0
    source_tokens: int = 0
    weight_bytes: int = 4
    product_bytes: int = 4
    recompute: bool = False
    smooths_labels: bool = False
    optimizer: str = "adamw"
    schedule: str = "1f1b"
    costs: StageCosts | None = None
    part: TrainedPart = WHOLE

    @property
    def num_rounds(self) -> int:
        """Micro-batches that run, empty ones included."""
        return self.num_micro_batches + self.num_empty


@dataclass(frozen=True)
class Message:
    """Collectives that are alike.

    Attributes:
        kind: of collective.
        axis: of the layout, whose processes take part; ``all`` for every process.
        what: is sent, in words.
        num_processes: that take part.
        payload: bytes of one of them.
        count: how many a step issues.
    """

    kind: Kind
    axis: str
    what: str
    num_processes: int
    payload: int
    count: int

    @property
    def sent_bytes(self) -> float:
        """Bytes that a process sends in a step for all of them, by ring algorithms."""
        whole, others = self.payload * self.count, self.num_processes - 1
        if self.kind == "send_recv":
            return float(whole)
        return (2 if self.kind == "all_reduce" else 1) * whole * others / self.num_processes


@dataclass(frozen=True)
class Traffic:
    """What a process tells others in a step.

    Attributes:
        messages: that are issued, like ones together.
    """

    messages: tuple[Message, ...]

    def payload_bytes(self, kind: Kind) -> int:
        """Returns the payload of a step's collectives of one kind."""
        return sum(m.payload * m.count for m in self.messages if m.kind == kind)

    def sent_bytes(self, kind: Kind | None = None) -> float:
        """Returns the bytes that a process sends in a step, for one kind or in all."""
        return sum(m.sent_bytes for m in self.messages if kind in (None, m.kind))


def step_traffic(
    config: TransformerConfig, layout: Layout, shape: StepShape, stage_rank: int = 0
) -> Traffic:
    """Returns what a process sends in a step; the formulas stand above.

    Processes of a tensor axis hold unlike parts of a vocabulary that they cannot divide: this is
    the first, which has most. A stream's tokens all count as having a target.

    Args:
        config: of the model.
        layout: of the processes.
        shape: of the step.
        stage_rank: place of the process in its pipeline.
    """
    if layout.size == 1:
        return Traffic(())
    held = held_model(config, layout, shape.schedule, stage_rank, shape.part, shape.costs)
    found = _Step(config, layout, shape, held)
    parts = (
        _of_weights(found),
        _of_tensor(found),
        _of_context(found),
        _of_pipeline(found, stage_rank),
        _of_optimizer(found),
        _of_scalars(found),
    )
    messages = (message for part in parts for message in part)
    return Traffic(tuple(m for m in messages if m.num_processes > 1 and m.payload and m.count))


def largest_traffic(config: TransformerConfig, layout: Layout, shape: StepShape) -> Traffic:
    """Returns what the process sends that sends most: stages of a pipeline are unlike."""
    stages = (step_traffic(config, layout, shape, rank) for rank in range(layout.pipeline))
    return max(stages, key=Traffic.sent_bytes)


def describe_traffic(traffic: Traffic, who: str = "each process") -> str:
    """Returns in a line what a process sends in a step, the largest kind first."""
    if not traffic.messages:
        return "nothing is sent"
    ordered = sorted(KINDS, key=traffic.sent_bytes, reverse=True)
    amounts = [(_NAMES[kind], traffic.sent_bytes(kind)) for kind in ordered]
    shown = ", ".join(f"{amount(n)} {name}" for name, n in amounts if n >= _SMALL)
    shown = shown or f"mostly {amounts[0][0]}"
    return f"{who} sends about {amount(traffic.sent_bytes())} a step: {shown}"


_SMALL = 50_000
"""Bytes of a kind that need no mention."""
_NAMES: Mapping[Kind, str] = {
    "all_gather": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "all_reduce": "all-reduce",
    "all_to_all": "all-to-all",
    "send_recv": "send/recv",
}


def amount(num_bytes: float) -> str:
    """Returns bytes as a person writes them: 1.2 GB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= size:
            return f"{num_bytes / size:,.1f} {unit}"
    return f"{num_bytes / 1e3:,.1f} kB"


@dataclass(frozen=True)
class _Step:
    """What the formulas need to know."""

    config: TransformerConfig
    layout: Layout
    shape: StepShape
    held: HeldModel

    @property
    def shard(self) -> int:
        """Processes that share weights."""
        return self.layout.shard * self.layout.context

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP2 has the weights; DistributedDataParallel takes none that are split."""
        layout = self.layout
        if layout.pipeline > 1:
            return layout.shard > 1
        return not layout.has_whole_weights and self.shard * layout.replicate > 1

    @property
    def rows(self) -> tuple[int, int]:
        """Rows of the source and of the main stream, filler included."""
        shape = self.shape
        given = [shape.source_tokens, max(shape.tokens, shape.filled_tokens)]
        multiple = self.layout.context * self.layout.tensor
        missing = [-n % multiple for n in given]
        if self.config.architecture == "encoder_decoder":
            # Streams are read sequence for sequence, so that both get filler or none.
            missing = [n or multiple for n in missing] if any(missing) else missing
            return given[0] + missing[0], given[1] + missing[1]
        return 0, given[1] + missing[1]

    def streams(self) -> Iterator[tuple[int, int, bool]]:
        """Yields rows, blocks and whether they look at a source, of each stack."""
        (source, main), (encoders, decoders) = self.rows, self.held.num_blocks
        if self.config.architecture == "encoder_decoder":
            yield source, encoders, False
            yield main, decoders, True
        else:
            yield main, encoders + decoders, False


def _of_weights(step: _Step) -> Iterator[Message]:
    """Weights that are gathered, and gradients that are summed."""
    layout, shape, weights = step.layout, step.shape, step.held.weights
    num_copies = layout.replicate * step.shard
    if not step.is_sharded:
        size = sum(math.prod(w.shape) for w in weights if w.is_trained) * shape.weight_bytes
        if layout.pipeline > 1:
            for axis, n in (("replicate", layout.replicate), ("shard", step.shard)):
                yield Message("all_reduce", axis, "gradients", n, size, 1)
            return
        yield Message("all_reduce", "replicate", "gradients", num_copies, size, 1)
        return
    for block in dict.fromkeys(w.block for w in weights):
        own = [w for w in weights if w.block == block]
        size = sum(padded_size(w.shape, step.shard) for w in own) * shape.weight_bytes
        trained = [w for w in own if w.is_trained]
        summed = sum(padded_size(w.shape, step.shard) for w in trained) * shape.weight_bytes
        times = shape.num_micro_batches * (2 if block else 1) if layout.pipeline == 1 else 1
        yield Message("all_gather", "shard", "weights", step.shard, size, times)
        yield Message("reduce_scatter", "shard", "gradients", step.shard, summed, 1)
        part = summed // step.shard
        yield Message("all_reduce", "replicate", "gradients", layout.replicate, part, 1)


def _of_tensor(step: _Step) -> Iterator[Message]:
    """Rows that are gathered before split matrices and scattered behind; the split vocabulary."""
    num, context, shape = step.layout.tensor, step.layout.context, step.shape
    rounds, width, config = shape.num_rounds, step.config.hidden_size, step.config
    stream, product = width * shape.weight_bytes, width * shape.product_bytes

    def message(kind: Kind, what: str, payload: int, count: int, times: int = rounds) -> Message:
        return Message(kind, "tensor", what, num, payload, count * times)

    for rows, blocks, reads_source in step.streams():
        own = rows // context
        again = shape.recompute * blocks
        branches = 3 if reads_source else 2
        inputs, outputs = branches * blocks, branches * blocks
        yield message("all_gather", "rows", own * stream, inputs + branches * again)
        scattered = outputs + branches * again
        yield message("reduce_scatter", "rows", own * product, scattered)
        yield message("reduce_scatter", "gradients of rows", own * stream, inputs)
        yield message("all_gather", "gradients of rows", own * product, outputs)
        if reads_source:
            source = step.rows[0] // context * stream
            yield message("all_gather", "the source's rows", source, blocks + again)
            yield message("reduce_scatter", "gradients of the source's rows", source, blocks)
        if step.held.has_embedding:
            embedded = rows * config.embedding_width * shape.weight_bytes
            yield message("all_reduce", "embeddings", embedded, 1)
            yield message("all_gather", "gradients of rows", own * stream, 1)
    if step.held.has_head:
        yield message("all_gather", "hidden states", step.rows[1] // context * stream, 1)
    if step.held.has_head and config.head == "language_modelling":
        targets, real = -(-shape.tokens // context), shape.num_micro_batches
        yield message("all_reduce", "terms of the loss", targets * 4, 3, real)
        yield message("all_reduce", "gradients of hidden states", targets * product, 1, real)
        if shape.smooths_labels:
            yield message("all_reduce", "embeddings of targets", targets * product, 1, real)
            yield message("all_reduce", "sum of scores", 4, 1, real)
    for weight in step.held.weights:
        if weight.is_norm:
            size = math.prod(weight.shape) * shape.weight_bytes
            yield Message("all_reduce", "tensor", "gradients of norms", num, size, 1)


def _of_context(step: _Step) -> Iterator[Message]:
    """Heads for rows around attention, and all rows at the end."""
    layout, shape, config = step.layout, step.shape, step.config
    num, rounds = layout.context, shape.num_rounds
    heads, keys = config.num_heads // layout.tensor, config.kv_heads // layout.tensor
    keys *= num // math.gcd(num, keys)  # fewer than processes: several have the same
    ways = 3 if shape.recompute else 2
    for rows, blocks, reads_source in step.streams():
        own = rows // num * config.head_size * shape.product_bytes
        others = step.rows[0] // num * config.head_size * shape.product_bytes
        for seen in (own, others) if reads_source else (own,):
            for what, size in (("queries, outputs", own * heads), ("keys, values", seen * keys)):
                yield Message("all_to_all", "context", what, num, size, 2 * ways * blocks * rounds)
    if step.held.has_head:
        size = step.rows[1] * config.hidden_size * shape.weight_bytes
        yield Message("all_gather", "context", "hidden states", num, size, rounds)
        yield Message("reduce_scatter", "context", "gradients of hidden states", num, size, rounds)


def _of_pipeline(step: _Step, stage_rank: int) -> Iterator[Message]:
    """Hidden states to the next stage, their gradients to the one before, and a tied weight."""
    layout, shape, config, held = step.layout, step.shape, step.config, step.held
    num = layout.pipeline
    rows = step.rows[1] // (layout.context * layout.tensor)
    size = rows * config.hidden_size * shape.weight_bytes
    borders = 2 * held.num_stages - held.has_head - held.has_embedding
    count = shape.num_rounds * borders
    yield Message("send_recv", "pipeline", "hidden states", num, size, count)
    is_tied = config.head == "language_modelling" and config.tie_embeddings
    if num > 1 and is_tied and held.has_head != held.has_embedding:
        weight = next(w for w in held.weights if w.name == TIED_NAME)
        size = padded_size(weight.shape, step.shard) // step.shard if step.is_sharded else 0
        size = (size or math.prod(weight.shape)) * shape.weight_bytes
        yield Message("all_reduce", "pipeline", "gradient of a tied weight", 2, size, 1)


def _of_optimizer(step: _Step) -> Iterator[Message]:
    """Muon's whole gradients."""
    if step.shape.optimizer != "muon":
        return
    tensor, shard = step.layout.tensor, step.shard if step.is_sharded else 1
    for weight in step.held.weights:
        if not weight.is_matrix_of_block:
            continue
        size = padded_size(weight.shape, shard) * step.shape.weight_bytes
        yield Message("all_gather", "shard", "gradients for Muon", shard, size, 1)
        if weight.split_dim is not None:
            size = padded_size(weight.whole_shape, tensor, weight.split_dim)
            size *= step.shape.weight_bytes
            yield Message("all_gather", "tensor", "gradients for Muon", tensor, size, 1)


def _of_scalars(step: _Step) -> Iterator[Message]:
    """Loss and counts, and the square of the gradients' norm."""
    size, layout = step.layout.size, step.layout
    yield Message("all_reduce", "all", "loss and counts", size, 3 * 8, 1)
    if step.is_sharded or layout.tensor * layout.pipeline > 1:
        square = step.shape.weight_bytes
        yield Message("all_reduce", "all", "norm of the gradients", size, square, 1)
