"""Pipeline parallel: each process holds some blocks, and micro-batches pass from one to the next.

    micro-batches --> stage 0 --(R, D)--> stage 1 --> ... --> last stage --> loss
                             <-gradient--         <--

The engine is ``torch.distributed.pipelining``: it decides who works on which micro-batch when, and
sends. It wants hidden states of one shape, so that the micro-batches of a step are filled up to the
same number of tokens. Where a schedule takes only some numbers of micro-batches, empty ones are
added: they are all filler and count for nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from hasten.core.batch import PackedBatch
from hasten.core.shards import local_part
from hasten.model.stages import TIED_NAME
from hasten.model.transformer import Transformer
from hasten.parallel.pipeline_plan import PipelineSchedule, filled_tokens
from hasten.parallel.pipeline_stage import Stage, StageWork, empty_batch
from hasten.parallel.tensor import settle_gradients

# It logs the whole schedule where a stage fails, besides the error itself.
_TORCH_LOGGER = "torch.distributed.pipelining.schedules"


class Pipeline:
    """Runs the stages of this process together with those of the others.

    Args:
        model: what ``cut_model`` has left of the whole one.
        stages: that it returned, with their weights where they are to stay.
        schedule: in which order they work.
        group: the processes of this pipeline, as a ``ProcessGroup`` or a ``DeviceMesh`` of one
            axis; the n-th of them has the stages that ``cut_model`` gave to rank n.
        num_tokens: values of N that micro-batches are filled up to, see ``filled_tokens``.
        device: of this process.
        num_shares: among how many processes ``Stack.divide`` divides the rows of a stream.
        computing: surrounds each forward of ``step``, as ``torch.autocast`` does.

    Attributes:
        has_first: whether this process has the first stage.
        has_last: whether this process has the last stage.
    """

    def __init__(
        self,
        model: Transformer,
        stages: Sequence[Stage],
        schedule: PipelineSchedule,
        group: Any,
        *,
        num_tokens: Sequence[int],
        device: torch.device,
        num_shares: int = 1,
        computing: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        logging.getLogger(_TORCH_LOGGER).setLevel(logging.CRITICAL)
        self.model, self.stages, self.schedule = model, list(stages), schedule
        self._num_tokens, self._num_shares = num_tokens, num_shares
        self.has_first = self.stages[0].is_first
        self.has_last = self.stages[-1].is_last
        self._device = device
        self._group = group.get_group() if hasattr(group, "get_group") else group
        self._size = torch.distributed.get_world_size(self._group)
        self._dtype = next(model.parameters()).dtype
        self._computing = computing
        self._engines: dict[int, list[Any]] = {}
        self._schedules: dict[tuple[bool, int, int], Any] = {}
        self._tied = self._tied_weight()
        self._ends = self._group_of_ends() if self._tied is not None else None

    def step(
        self,
        batches: Sequence[PackedBatch],
        loss: Callable[[Any, PackedBatch], Tensor],
        before_each: Callable[[int, int], None] | None = None,
        *,
        at_least: int = 0,
    ) -> Tensor | None:
        """Runs forward and backward of all micro-batches; all processes of the pipeline must.

        The summed gradients are added to those that the parameters have; afterwards each
        parameter has one. A tied weight has the same on both processes that hold it.

        Args:
            batches: the micro-batches, without filler, the same on all processes, on the device;
                may be none.
            loss: maps outputs, from which filler is removed, and the micro-batch they are of to a
                scalar; called on the last stage only.
            before_each: is told the numbers of micro-batch and stage before each forward.
            at_least: how many micro-batches to run, empty ones included; pipelines among which
                weights are sharded have to run equally many.

        Returns:
            The sum of losses without a gradient on the process with the last stage, else None.
        """
        losses: list[Tensor] = []
        before = self._take_tied_gradient()
        count = max(len(batches), at_least)
        num_tokens = self.num_tokens_for(batches)
        engine, indices = self._engine_for(count, num_tokens, trains=True)
        work = self._work_for(batches, len(indices), num_tokens, loss)
        work.is_loss = True
        work.before_each, work.computing = before_each, self._computing
        with self._working(work, num_tokens):
            target = indices if self.has_last else None
            engine.step(index=indices, target=target, losses=losses, return_outputs=False)
        settle_gradients(self.model)
        self._sum_tied_gradient(before)
        if not self.has_last:
            return None
        zero = torch.zeros((), device=self._device)
        return sum((one.detach() for one in losses[: len(batches)]), zero)

    @torch.inference_mode(False)  # where what is received could not be used in training again
    @torch.no_grad()
    def forward(
        self,
        batches: Sequence[PackedBatch],
        use: Callable[[Any, PackedBatch], Any] | None = None,
        *,
        at_least: int = 0,
    ) -> list[Any] | None:
        """Runs all micro-batches without gradients; all processes of the pipeline must.

        Args:
            batches: the micro-batches, without filler, the same on all processes, on the device;
                may be none.
            use: maps outputs and the micro-batch they are of to what is returned for it; None for
                the outputs themselves. Those hold a weight of a head of tokens, which is there for
                ``use`` only where weights are sharded.
            at_least: as in ``step``.

        Returns:
            What came of each on the process with the last stage, else None.
        """
        num_tokens = self.num_tokens_for(batches)
        engine, indices = self._engine_for(max(len(batches), at_least), num_tokens, trains=False)
        work = self._work_for(batches, len(indices), num_tokens, use or _outputs)
        with self._working(work, num_tokens):
            engine.step(index=indices, return_outputs=False)
        return [work.results[i] for i in range(len(batches))] if self.has_last else None

    def num_tokens_for(self, batches: Sequence[PackedBatch]) -> int:
        """Returns N, which each of these micro-batches is filled up to."""
        wanted = max((batch.num_tokens for batch in batches), default=0)
        num_tokens = filled_tokens(wanted, self._num_tokens)
        return -(-num_tokens // self.model.row_multiple) * self.model.row_multiple

    def owned_names(self) -> list[str]:
        """Returns the names of the parameters that this process speaks for.

        The pipeline's processes together have each name of the whole model once: for a tied
        weight the process with the first stage speaks.
        """
        names = [name for name, _ in self.model.named_parameters()]
        is_second = self._tied is not None and not self.has_first
        return [name for name in names if not (is_second and name == TIED_NAME)]

    def _work_for(
        self,
        batches: Sequence[PackedBatch],
        count: int,
        num_tokens: int,
        use: Callable[[Any, PackedBatch], Any],
    ) -> StageWork:
        """Returns what the stages work on: the batches, and empty ones up to ``count``."""
        given = list(batches)
        assert not any(batch.num_filler for batch in given), "micro-batches are filled here"
        if missing := count - len(given):
            given += [empty_batch(self._device)] * missing
        filled = [batch.filled(self.model.row_multiple, num_tokens) for batch in given]
        return StageWork(given, filled, len(batches), use)

    @contextmanager
    def _working(self, work: StageWork, num_tokens: int) -> Iterator[None]:
        """Gives the stages their work for the time of a ``with`` block.

        Raises:
            Exception: that a stage has raised, which torch wraps.
        """
        engines = self._engines[num_tokens]
        for stage, own in zip(self.stages, engines, strict=True):
            stage.work = work
            # Torch sets it when a schedule begins; here schedules of several lengths share stages.
            own.chunks = len(work.batches)
        try:
            yield
        except Exception as error:
            self._schedules.clear()  # they hold losses of the step that has failed
            if error.__cause__ is None or not isinstance(error, RuntimeError):
                raise
            raise error.__cause__ from None
        finally:
            for stage, own in zip(self.stages, engines, strict=True):
                stage.work = None
                own.clear_runtime_states()

    def _engines_for(self, num_tokens: int) -> list[Any]:
        """Returns torch's stages for micro-batches of so many tokens."""
        # Loaded here: it takes a second, which a run without a pipeline need not pay.
        from torch.distributed.pipelining import PipelineStage

        if num_tokens not in self._engines:
            shape = (num_tokens // self._num_shares, self.model.config.hidden_size)
            hidden = torch.empty(shape, dtype=self._dtype, device="meta", requires_grad=True)
            self._engines[num_tokens] = [
                PipelineStage(
                    stage,
                    stage.number,
                    stage.num_stages,
                    self._device,
                    input_args=() if stage.is_first else hidden,
                    output_args=hidden,
                    group=self._group,
                )
                for stage in self.stages
            ]
        return self._engines[num_tokens]

    def _engine_for(self, count: int, num_tokens: int, *, trains: bool) -> tuple[Any, Tensor]:
        """Returns torch's schedule for at least so many micro-batches, and the numbers of all.

        One is made for each number, since torch fixes it; the stages, and with them the memory for
        what is received, are the same.
        """
        from torch.distributed.pipelining.schedules import get_schedule_class

        is_one = len(self.stages) == 1
        if trains:
            name, several = self.schedule.engine, self.schedule.takes_several
            count = self.schedule.num_fitting(count, self._size)
        else:
            # Without a loss nothing goes back, and stages run all micro-batches in turn. The
            # schedules that split the backward pass have no other way to run without.
            name, several, count = "GPipe" if is_one else "LoopedBFS", not is_one, max(count, 1)
        key = trains, count, num_tokens
        engines = self._engines_for(num_tokens)
        if key not in self._schedules:
            self._schedules[key] = get_schedule_class(name)(
                engines if several else engines[0],  # pyright: ignore
                count,
                loss_fn=_itself if trains else None,
                scale_grads=False,
            )
        return self._schedules[key], torch.arange(count)

    def _tied_weight(self) -> nn.Parameter | None:
        """Returns the weight that another process holds as well."""
        config = self.model.config
        is_tied = config.head == "language_modelling" and config.tie_embeddings
        if not is_tied or self.has_first == self.has_last:
            return None
        return self.model.get_parameter(TIED_NAME)

    def _group_of_ends(self) -> Any:
        """Returns the processes with the first and the last stage; only these two may ask."""
        ranks = torch.distributed.get_process_group_ranks(self._group)
        if len(ranks) == 2:
            return self._group
        return torch.distributed.new_group([ranks[0], ranks[-1]], use_local_synchronization=True)

    def _take_tied_gradient(self) -> Tensor | None:
        """Returns the gradient that the tied weight has, which is summed already."""
        if self._tied is None:
            return None
        gradient, self._tied.grad = self._tied.grad, None
        return gradient

    @torch.no_grad()
    def _sum_tied_gradient(self, before: Tensor | None) -> None:
        """Makes the tied weight's gradient the sum of both processes'.

        Args:
            before: gradient of earlier steps, summed already.
        """
        if self._tied is None:
            return
        assert self._tied.grad is not None
        torch.distributed.all_reduce(local_part(self._tied.grad), group=self._ends)
        if before is not None:
            self._tied.grad += before


def _outputs(outputs: Any, batch: PackedBatch) -> Any:
    """What is made of outputs where nothing else is asked for."""
    del batch
    return outputs


def _itself(loss: Tensor, target: Tensor) -> Tensor:
    """What torch takes for a loss: the last stage has computed it."""
    del target
    return loss
