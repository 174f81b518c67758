"""Starts the processes of a run as copies of this program.

    RunConfig --num_processes--> 4 --launch_training--> 4 times `hasten train --config ...`

Under torchrun, srun or Kubernetes they have been started already, and nothing is done here.
"""

from __future__ import annotations

import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from hasten.config.load import config_to_yaml
from hasten.config.schema import ParallelConfig, RunConfig
from hasten.core.errors import LostProcessError, UsageError
from hasten.parallel.heartbeat import SIGN_FIRST
from hasten.parallel.launch import launch
from hasten.parallel.layout import choose_layout
from hasten.parallel.place import find_place
from hasten.training.build import available_cores
from hasten.training.folder import choose_folder
from hasten.training.machine import choose_device


def num_processes(parallel: ParallelConfig) -> int:
    """Returns how many processes are to be started here; 1 where this one is all, or one of them.

    Raises:
        UsageError: the layout does not fit the number of processes.
    """
    wanted = None if parallel.processes == "auto" else parallel.processes
    layout = choose_layout(parallel.layout, wanted)
    return 1 if find_place() is not None else layout.size


def launch_training(
    config: RunConfig,
    output: str | Path | None,
    *,
    resumes: bool = False,
    flags: Sequence[str] = (),
    shows_output: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> int:
    """Trains in several processes; returns their exit code, of which they have told the reason.

    Args:
        config: of the run, as it was asked for; of a resumed run, as it goes on.
        output: its folder.
        resumes: whether it is resumed.
        flags: other flags of ``hasten train``.
        shows_output: whether the result is printed.
        say: told when all processes are started again because one was lost.

    Raises:
        UsageError: the folder exists already, or data come by standard input.
        LostProcessError: a process was killed.
        MachineError: the device is not there.
    """
    count = num_processes(config.parallel)
    if "-" in (config.data.train or ()):
        raise UsageError("- (standard input) can be read by one process only: name a file.")
    choose_device(config.train.device)  # what is not there is said once
    folder = Path(str(output)) if resumes else choose_folder(output, config.data)
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "config.yaml"
        file.write_text(config_to_yaml(config, only_given=True), encoding="utf-8")
        for restarts_left in range(config.parallel.max_restarts, -1, -1):
            begun = resumes or (folder / "config.yaml").is_file()
            what = ["--resume", str(folder)] if begun else ["--config", str(file)]
            if begun:
                what += ["--processes", str(count), "--parallel", config.parallel.layout]
            else:
                what += ["--output", str(folder)]
            try:
                return launch(
                    [*SIGN_FIRST, sys.executable, "-m", "hasten", "train", *what, *flags],
                    count,
                    num_threads=max(1, available_cores() // count),
                    timeout_seconds=config.parallel.timeout_seconds,
                    shows_output=shows_output,
                )
            except LostProcessError as error:
                if restarts_left:
                    say(f"{error} All are started again.")
                    continue
                if not (folder / "config.yaml").is_file():
                    raise
                raise LostProcessError(
                    f"{error} Go on with: hasten train --resume {shlex.quote(str(folder))}"
                ) from None
    raise AssertionError("the last start ends or raises")
