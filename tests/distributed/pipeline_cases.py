"""Models, micro-batches and steps that a pipeline and one process alone both run.

Everything derives from the case, so that all processes have the same without telling each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from builders import VOCAB, default_dtype, small_model
from hasten.core.batch import PackedBatch, SequenceLayout, positions_from_lengths
from hasten.core.seeds import derive_seed
from hasten.model.heads import TokenOutputs
from hasten.model.token_loss import linear_cross_entropy_sum
from hasten.model.transformer import Transformer

# No micro-batch has more tokens, most have fewer.
NUM_TOKENS = 61
LEARNING_RATE = 0.05
# Six heads with two key heads between them, and rows of the vocabulary that nothing divides.
DECODER = {
    "architecture": "decoder",
    "head": "language_modelling",
    "vocab_size": VOCAB + 3,
    "hidden_size": 36,
    "num_heads": 6,
    "num_kv_heads": 2,
    "activation": "swiglu",
}
MODELS: dict[str, dict[str, Any]] = {
    "classifier": {"pooling": "attention"},
    "post-norm": {
        "norm_placement": "post",
        "positions": "learned",
        "num_token_types": 2,
        "pooling": "first",
    },
    "span": {"head": "span", "positions": "sinusoidal", "norm": "rmsnorm"},
    "tied": DECODER,
    "untied": {**DECODER, "tie_embeddings": False, "logit_softcap": 5.0},
}


@dataclass(frozen=True)
class PipelineCase:
    """A model, and how it is trained for a few steps.

    Attributes:
        schedule: of the pipeline.
        model: a key of ``MODELS``.
        num_layers: its blocks.
        counts: micro-batches of each step.
        axes: of the mesh, which may give a pipeline any processes: besides ``pipeline``, one among
            which whole stages are replicated, or their weights sharded.
        degrees: of ``axes``.
        stages_per_rank: as for ``cut_model``.
        dropout: rate.
        recompute: whether activations are computed again.
        is_poisoned: whether the losses of the last step are not numbers.
        accumulates: whether each step adds to the gradients of those before.
    """

    schedule: str
    model: str
    num_layers: int = 3
    counts: tuple[int, ...] = (3, 1, 2, 5, 3)
    axes: tuple[str, ...] = ("pipeline",)
    degrees: tuple[int, ...] = (2,)
    stages_per_rank: int | None = None
    dropout: float = 0.0
    recompute: bool = False
    is_poisoned: bool = False
    accumulates: bool = False

    def build_model(self) -> Transformer:
        """Returns the whole model."""
        with default_dtype(torch.float64):
            model = small_model(
                num_layers=self.num_layers,
                dropout=self.dropout,
                **{"max_positions": 40, **MODELS[self.model]},
            )
        for stack in (model.encoder, model.decoder):
            if stack is not None:
                stack.recompute = self.recompute
        return model.train()

    def build_batches(self, step: int) -> list[PackedBatch]:
        """Returns the micro-batches of a step."""
        return [self._build_batch(step, number) for number in range(self.counts[step])]

    def _build_batch(self, step: int, number: int) -> PackedBatch:
        draw = torch.Generator().manual_seed(derive_seed("batch", step, number))
        lengths, room = [], NUM_TOKENS if number == 1 else 40
        while room > 0:
            lengths.append(min(room, int(torch.randint(1, 30, (), generator=draw))))
            room -= lengths[-1]
        count, size = len(lengths), sum(lengths)
        shapes = {"language_modelling": (size,), "span": (2,), "classification": (count,)}
        head = MODELS[self.model].get("head", "classification")
        return PackedBatch(
            token_ids=torch.randint(VOCAB, (size,), generator=draw),
            positions=torch.from_numpy(positions_from_lengths(lengths)),
            layout=SequenceLayout.from_lengths(lengths),
            example_ids=torch.arange(count),
            token_types=torch.randint(2, (size,), generator=draw),
            targets=torch.randint(3, shapes[head], generator=draw),
            weight=17.0,
        )

    def loss(self, step: int) -> Callable[[Any, PackedBatch], Tensor]:
        """Returns the loss of a step's micro-batches."""
        is_poisoned = self.is_poisoned and step == len(self.counts) - 1

        def loss(outputs: Any, batch: PackedBatch) -> Tensor:
            assert batch.targets is not None and not batch.num_filler
            if isinstance(outputs, TokenOutputs):
                # Chunks take another way through autograd than few rows do.
                total = linear_cross_entropy_sum(
                    *outputs[:2], batch.targets, softcap=outputs.softcap, chunk_rows=7
                )
            elif self.model == "span":
                total = F.cross_entropy(outputs.T, batch.targets, reduction="sum")
            else:
                total = F.cross_entropy(outputs, batch.targets, reduction="sum")
            return total / batch.weight * (float("nan") if is_poisoned else 1.0)

        return loss


@dataclass
class PipelineFound:
    """What came of a case.

    Attributes:
        losses: of each step.
        tensors: gradients of each step, outputs without gradients, final weights.
        problems: what is wrong whatever the numbers are.
    """

    losses: list[float] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def run_alone(case: PipelineCase) -> PipelineFound:
    """Runs a case in one process."""
    model, found = case.build_model(), PipelineFound()
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
    for step in range(len(case.counts)):
        batches = case.build_batches(step)
        note_outputs(found, step, outputs_of(model, batches))
        losses = [case.loss(step)(model(batch), batch) for batch in batches]
        for loss in losses:
            loss.backward()
        found.losses.append(sum(loss.item() for loss in losses))
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            found.tensors[f"{step}/{name}"] = parameter.grad.clone()
        optimizer.step()
        if not case.accumulates:
            optimizer.zero_grad()
    found.tensors |= {f"last/{name}": p.detach() for name, p in model.named_parameters()}
    return found


@torch.no_grad()
def outputs_of(model: Transformer, batches: Sequence[PackedBatch]) -> list[Tensor]:
    """Returns scores as for evaluation."""
    model.eval()
    outputs = [scores_of(model(batch)) for batch in batches]
    model.train()
    return outputs


def scores_of(outputs: Any) -> Tensor:
    """Returns all scores of a head."""
    return outputs.scores() if isinstance(outputs, TokenOutputs) else outputs


def note_outputs(found: PipelineFound, step: int, outputs: Sequence[Tensor]) -> None:
    """Notes outputs among the tensors."""
    assert not any(scores.requires_grad for scores in outputs)
    found.tensors |= {f"{step}/outputs/{number}": one for number, one in enumerate(outputs)}


TWO = [
    *(
        PipelineCase(schedule, model, num_layers=5 if schedule == "interleaved" else 3)
        for schedule in ("gpipe", "1f1b", "interleaved", "zero-bubble")
        for model in ("classifier", "tied")
    ),
    PipelineCase("gpipe", "post-norm"),
    PipelineCase("1f1b", "untied"),
    PipelineCase("1f1b", "span"),
    PipelineCase("1f1b", "tied", counts=(2, 3, 1), accumulates=True),
    PipelineCase("interleaved", "span", num_layers=4),
    PipelineCase("zero-bubble", "untied"),
    PipelineCase("zero-bubble", "post-norm"),
    PipelineCase("zero-bubble", "tied", num_layers=6, stages_per_rank=3),
    *(
        PipelineCase(schedule, "tied", num_layers=4, recompute=True, counts=(1, 3))
        for schedule in ("1f1b", "interleaved", "zero-bubble")
    ),
    *(
        PipelineCase(schedule, "tied", num_layers=4, is_poisoned=True, counts=(2, 3))
        for schedule in ("gpipe", "interleaved", "zero-bubble")
    ),
    *(
        PipelineCase(schedule, "tied", num_layers=4, dropout=0.3, counts=(1, 3))
        for schedule in ("1f1b", "interleaved")
        for _ in range(2)
    ),
]
FOUR = [
    PipelineCase("1f1b", "tied", num_layers=5, degrees=(4,)),
    PipelineCase("interleaved", "tied", num_layers=9, degrees=(4,), counts=(2, 5, 10, 1)),
    PipelineCase("zero-bubble", "untied", num_layers=5, degrees=(4,), counts=(3, 9, 1)),
    PipelineCase("1f1b", "tied", axes=("replicate", "pipeline"), degrees=(2, 2)),
    PipelineCase(
        "interleaved", "classifier", num_layers=4, axes=("pipeline", "replicate"), degrees=(2, 2)
    ),
    *(
        PipelineCase(
            schedule, model, num_layers=4, axes=("pipeline", "shard"), degrees=(2, 2), counts=(3, 1)
        )
        for schedule, model in (
            ("gpipe", "span"),
            ("interleaved", "tied"),
            ("zero-bubble", "classifier"),
        )
    ),
]
CASES = {2: TWO, 4: FOUR}
