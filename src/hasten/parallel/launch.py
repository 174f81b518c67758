"""Starts the processes of a run on this machine, watches them, and says which one failed.

    launch(command, 4) -> torch.distributed.elastic agent -> 4 processes with RANK, WORLD_SIZE ...
                                                          -> all end -> exit code of the run

The agent ends the others as soon as one has failed; those that do not end are killed.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hasten.core.errors import LostProcessError, MachineError
from hasten.parallel.heartbeat import FOLDER_VARIABLE, Watched, watching

# For a signal from outside, after which the processes save. Where one has failed, those that cannot
# end are killed sooner: see heartbeat.watching.
_SHUTDOWN_SECONDS = 120
_TOLD_ALREADY = frozenset({2, 3, 4, 5, 6, 8})
"""Exit codes with which a process has said itself what was wrong."""
_SIGNALLED = (128 + signal.SIGINT, 128 + signal.SIGTERM)


def launch(
    command: Sequence[str],
    num_processes: int,
    *,
    num_threads: int,
    timeout_seconds: float = 20.0,
    shows_output: bool = True,
) -> int:
    """Runs a command in several processes that find each other; returns their exit code.

    Args:
        command: of each process.
        num_processes: on this machine.
        num_threads: of each process, unless OMP_NUM_THREADS says otherwise.
        timeout_seconds: a process without a sign of life for so long is killed.
        shows_output: whether their standard output is this process's.

    Raises:
        LostProcessError: a process was killed or ended without a word.
        MachineError: they cannot be started.
    """
    # Loaded here: it takes a second, and only the launching process needs it.
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # Its messages are about itself; ours name the process and the cause. Each of its loggers has a
    # level of its own.
    for name in [n for n in logging.root.manager.loggerDict if n.startswith("torch.distributed")]:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with (
        tempfile.TemporaryDirectory() as folder,
        tempfile.TemporaryDirectory() as signs,
        watching(Path(signs), timeout_seconds) as watched,
        _environment({"OMP_NUM_THREADS": str(num_threads), FOLDER_VARIABLE: signs}),
    ):
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=num_processes,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,  # ours begin with a resumed run
            logs_specs=DefaultLogsSpecs(
                log_dir=folder, redirects=Std.NONE if shows_output else Std.OUT
            ),
            shutdown_timeout=_SHUTDOWN_SECONDS,
        )
        try:
            elastic_launch(config, command[0])(*command[1:])
        except ChildFailedError as error:
            failures = error.failures
        except SignalException as stop:
            return 128 + int(stop.sigval)
        except (RuntimeError, OSError) as error:
            raise MachineError(
                f"{num_processes} processes cannot be started: {str(error).splitlines()[0]}"
            ) from error
        else:
            return 0
    return _exit_code(failures, watched)


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Sets variables that are not set, for processes started in a ``with`` block."""
    own = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(own)
    try:
        yield
    finally:
        for name in own:
            os.environ.pop(name, None)


def _exit_code(failures: Mapping[int, Any], watched: Watched) -> int:
    """Returns the exit code of the process that failed first, which has told why.

    Args:
        failures: of the last start of the processes, by rank.
        watched: what the watcher has done and seen.

    Raises:
        LostProcessError: a process was lost, or failed for no reason that a person could help.
    """
    for failure in failures.values():
        if failure.exitcode in _TOLD_ALREADY:
            return failure.exitcode

    def order(item: tuple[int, Any]) -> tuple[int, float]:
        rank, code = item[0], item[1].exitcode
        # Those that lost others end as well; the agent sends SIGTERM to the rest, and those that do
        # not end then are killed.
        if rank in watched.stopped:
            return 3, item[1].timestamp
        if code == LostProcessError.exit_code:
            return 2, item[1].timestamp
        return int(code in (-signal.SIGTERM, *_SIGNALLED)), item[1].timestamp

    rank, failure = min(failures.items(), key=order)
    if failure.exitcode in _SIGNALLED:
        return failure.exitcode
    if rank in watched.hung:
        how = f"gave no sign of life for {watched.hung[rank]:.0f} s and was killed"
    elif failure.exitcode < 0:
        how = f"was killed by {signal.Signals(-failure.exitcode).name}"
    elif rank in watched.causes:
        how = f"failed with {watched.causes[rank]}"
    else:
        how = f"ended with exit code {failure.exitcode}"
    raise LostProcessError(
        f"rank {rank} (process {failure.pid} on {socket.gethostname()}) {how}; the others were "
        "stopped."
    )
