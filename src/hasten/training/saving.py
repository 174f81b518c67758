"""How a checkpoint comes about while training goes on.

    loop     snapshot --------> step --> step --> step --> commit
               |                                             |
    thread     '--> write, flush, hash, read back ---> none writes any more

A *snapshot* is taken at the end of a step: the processes agree which of them writes what, so that
nothing is written twice, and each copies its parts to the host. A thread of each *writes* them and
talks to no other process. At the end of the first step at which no process writes any more, rank 0
*commits*: manifest, one rename. So a process that dies, whenever that is, leaves the checkpoints
that were there, and no thread ever waits for another process.

At most one is on its way. The planner is that of ``torch.distributed.checkpoint``, whose own
``async_save`` plans and commits from its thread, by collectives: where a process dies, those of the
others would wait for it, and none could say when a checkpoint was committed.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from hasten.core.errors import HastenError, MachineError
from hasten.core.files import machine_errors
from hasten.core.ranks import Ranks
from hasten.core.shards import local_part
from hasten.training.checkpoint import FileFacts, Part, commit_checkpoint, write_parts
from hasten.training.folder import library_errors

_POLL_SECONDS = 0.05
# How long a run that has failed waits for the thread, so that its files can be removed. A process
# that does not end soon is killed by who watches it.
_PATIENCE_SECONDS = 5.0

Groups = Mapping[str, Mapping[str, Tensor]]


@dataclass
class _Save:
    """One that is on its way.

    Attributes:
        path: of the checkpoint to be.
        partial: folder in which it comes about.
        scalars: JSON values, of now.
        parts: what this process writes, until it is written.
        files: what this process has written.
        error: why it could not.
    """

    path: Path
    partial: Path
    scalars: dict[str, Any]
    parts: dict[str, dict[str, Part]]
    files: FileFacts = field(default_factory=dict)
    error: BaseException | None = None
    thread: threading.Thread = field(default_factory=threading.Thread)


class CheckpointSaver:
    """Saves checkpoints of a run, at most one at a time.

    What the processes call has to be called by all of them at once. As a context manager it
    finishes at the end of a block, unless that ends in an error: then nothing more is committed.

    Args:
        folder: of all checkpoints.
        ranks: the processes that save.
    """

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        self._folder, self._ranks = folder, ranks
        self._save: _Save | None = None

    def __enter__(self) -> CheckpointSaver:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.finish()
        elif self._save is not None:
            save, self._save = self._save, None
            save.thread.join(_PATIENCE_SECONDS)
            shutil.rmtree(save.partial, ignore_errors=True)

    @property
    def is_writing(self) -> bool:
        """Whether this process's thread is at work; it need not be when others' are."""
        return self._save is not None and self._save.thread.is_alive()

    def begin(self, step: int, tensors: Groups, scalars: Mapping[str, Any]) -> None:
        """Takes a snapshot and lets it be written; an earlier one is finished first.

        Args:
            step: of which it is.
            tensors: by group and name, whole or in parts; they may change as soon as this returns.
            scalars: JSON values, likewise; those of rank 0 are kept.

        Raises:
            MachineError: the earlier one cannot be written.
        """
        self.finish()
        path = self._folder / f"step-{step:08d}"
        parts, main_process = _own_parts(tensors, self._ranks)
        partial = path.with_name(f"{path.name}.partial-{main_process}")
        save = _Save(path, partial, json.loads(json.dumps(scalars)), parts)
        save.thread = threading.Thread(target=self._write, args=(save,), daemon=True)
        self._save = save
        save.thread.start()

    def commit(self) -> None:
        """Commits what has been written, if anything; called when no process is writing.

        Raises:
            MachineError: a process's disk is full or cannot be written, or did not keep what was
                written.
        """
        save, self._save = self._save, None
        if save is None:
            return
        save.thread.join()
        told = self._ranks.gather((save.files, _described(save.error)))
        failures = [(rank, problem) for rank, (_, problem) in enumerate(told) if problem]

        def commit() -> None:
            if failures:
                shutil.rmtree(save.partial, ignore_errors=True)
                raise save.error or MachineError("rank {}: {}".format(*failures[0]))
            files = {name: facts for written, _ in told for name, facts in written.items()}
            with machine_errors("writing a checkpoint"):
                commit_checkpoint(save.partial, save.path, files, save.scalars)

        self._ranks.on_main(commit)

    def finish(self) -> None:
        """Waits until all processes have written what is on its way, and commits it.

        Raises:
            MachineError: see ``commit``.
        """
        # Asked again and again, because a collective that waits for a slow disk would give up.
        while self._save is not None and self._ranks.any([self.is_writing])[0]:
            self._save.thread.join(_POLL_SECONDS)
        self.commit()

    def _write(self, save: _Save) -> None:
        rank, size = self._ranks.rank, self._ranks.size
        suffix = f"-{rank + 1:05d}-of-{size:05d}" if size > 1 else ""
        try:
            with machine_errors("writing a checkpoint"), library_errors():
                save.partial.mkdir(parents=True, exist_ok=True)
                save.files = write_parts(save.partial, save.parts, suffix)
        except BaseException as error:  # the loop raises it
            save.error = error
        save.parts = {}


def _own_parts(tensors: Groups, ranks: Ranks) -> tuple[dict[str, dict[str, Part]], int]:
    """Returns copies of what this process is to write, and the number of rank 0's process.

    What several processes hold alike is written by one of them, the one with the least to write.
    """
    # Loaded here: it takes a second, which a process that only predicts need not pay.
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

    state = {f"{group}/{name}": t for group, some in tensors.items() for name, t in some.items()}
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(state, is_coordinator=ranks.is_main)
    told = ranks.gather((planner.create_local_plan(), os.getpid()))
    plans, _ = planner.create_global_plan([plan for plan, _ in told])
    parts: dict[str, dict[str, Part]] = {}
    for item in plans[ranks.rank].items:
        assert item.tensor_data is not None
        group, _, name = item.index.fqn.partition("/")
        chunk, own = item.tensor_data.chunk, local_part(state[item.index.fqn]).detach()
        assert own.shape == chunk.sizes, f"{name}: {own.shape} is held, {chunk.sizes} planned"
        copy = own.to("cpu", copy=True, memory_format=torch.contiguous_format)
        parts.setdefault(group, {})[name] = Part(copy, tuple(chunk.offsets))
    return parts, told[0][1]


def _described(error: BaseException | None) -> str:
    """Returns an error in words for another process to tell; nothing where there is none."""
    if error is None or isinstance(error, HastenError):
        return str(error or "")
    return f"{type(error).__name__}: {error}"
