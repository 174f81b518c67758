"""Starts, resumes and plans runs; holds the run folder's lock while one is trained.

start_run  -> plan -> create folder -> loop -> finish -> result.json
resume_run -> check data -> plan from the saved configuration -> newest checkpoint -> the same
"""

from __future__ import annotations

import dataclasses
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from hasten.config.load import replace_values
from hasten.config.schema import RunConfig
from hasten.core.errors import OutOfMemoryError, UsageError
from hasten.core.files import machine_errors, remove_partials
from hasten.data.cache import cache_folder, clear_leftovers
from hasten.data.rows import spool_standard_input
from hasten.training.build import Plan, available_cores, build_loop, plan_run
from hasten.training.finish import finish_run
from hasten.training.folder import (
    check_data_unchanged,
    choose_folder,
    create_folder,
    library_errors,
    lock_folder,
    read_folder,
    write_result,
)
from hasten.training.loop import Interrupted, Loop
from hasten.training.machine import choose_device, keep_freed_memory
from hasten.training.observe import MetricsLog, Observer, Silent
from hasten.training.prepare import prepare_data, with_drawing
from hasten.training.saved import load_tokenizers
from hasten.training.sources import open_sources


def start_run(config: RunConfig, output: str | Path | None, observer: Observer) -> dict[str, Any]:
    """Trains a new run to its end; returns its result as JSON values.

    Raises:
        HastenError: see each subclass for what a person can do.
        Interrupted: a signal arrived; the run can be resumed.
    """
    with _computing(config), _spooled(config) as config:
        folder = choose_folder(output, config.data)
        plan = plan_run(config, observer)
        loop = build_loop(plan, folder, observer)  # settings that do not fit leave no folder
        config = create_folder(folder, plan.config, plan.choices, plan.data, plan.device)
        observer.note(f"run folder: {folder}")
        return _train(loop, dataclasses.replace(plan, config=config))


def resume_run(folder: Path, observer: Observer) -> dict[str, Any]:
    """Goes on with a run from its newest checkpoint; a finished one is only measured again.

    Raises:
        DataError: a data file has changed.
        DamagedError: a checkpoint is damaged.
    """
    config, data = read_folder(folder)
    lock_folder(folder).release()  # refuse early, before the work of preparing
    check_data_unchanged(data)
    with _computing(config):
        plan = _replan(config, load_tokenizers(folder))
        return _train(build_loop(plan, folder, observer), plan)


def plan_only(config: RunConfig, output: str | Path | None, observer: Observer) -> Plan:
    """Resolves a run and stops: nothing is written but the cache of prepared data.

    Raises:
        HastenError: whatever would keep the run from starting.
    """
    with _computing(config), _spooled(config) as config:
        folder = choose_folder(output, config.data)
        plan = plan_run(config, observer)
        build_loop(plan, folder, observer)
        return plan


def _train(loop: Loop, plan: Plan) -> dict[str, Any]:
    folder = loop.folder
    lock = lock_folder(folder)
    try:
        with machine_errors(f"writing to {folder}"), library_errors():
            remove_partials(folder)
            log = MetricsLog(folder / "metrics.jsonl", loop.resume())
            if loop.state.step:
                loop.observer.note(f"resumed at step {loop.state.step} of {plan.total_steps}")
            try:
                loop.run(log)
            finally:
                log.close()
            result = finish_run(loop, plan)
            write_result(folder, result)
        return result
    except BaseException as stop:
        # A signal outside the loop, which has its own way of stopping: before its first step, or
        # while the finished model is measured.
        if isinstance(stop, KeyboardInterrupt) or hasattr(stop, "signal_number"):
            raise Interrupted(getattr(stop, "signal_number", signal.SIGINT), folder) from None
        raise
    finally:
        lock.release()


def _replan(config: RunConfig, tokenizers: tuple[Tokenizer, ...]) -> Plan:
    """The plan of a run whose choices are already made."""
    device, _ = choose_device(config.train.device)
    sources = open_sources(config, Silent())
    data = prepare_data(config, sources, Silent(), tokenizers)
    return Plan(config, [], with_drawing(data, config), device)


@contextmanager
def _computing(config: RunConfig) -> Iterator[None]:
    """Sets threads and the allocator, keeps the caller's random state, names lack of memory."""
    keep_freed_memory()
    clear_leftovers()
    threads = config.train.num_threads
    before = torch.get_num_threads()
    torch.set_num_threads(available_cores() if threads == "auto" else threads)
    try:
        with torch.random.fork_rng():
            yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _out_of_memory(config) from error
    except RuntimeError as error:
        if "can't allocate memory" in str(error):
            raise _out_of_memory(config) from error
        raise
    finally:
        torch.set_num_threads(before)


def _out_of_memory(config: RunConfig) -> OutOfMemoryError:
    return OutOfMemoryError(
        "not enough memory for a micro-batch of "
        f"{config.train.micro_batch_tokens} tokens; try a smaller --train.micro_batch_tokens (the "
        "result stays the same) or a smaller model (--preset tiny)."
    )


@contextmanager
def _spooled(config: RunConfig) -> Iterator[RunConfig]:
    """Turns ``-`` into a file that can be read several times; it moves into the run folder."""
    if "-" not in (config.data.train or ()):
        yield config
        return
    if config.data.train != ("-",):
        raise UsageError("- (standard input) must be the only training file.")
    with standard_input_as_file() as path:
        yield replace_values(config, {"data.train": (str(path),)})


@contextmanager
def standard_input_as_file() -> Iterator[Path]:
    """Yields a file of the cache with what came by standard input; removes it afterwards.

    Raises:
        UsageError: nothing is piped into it.
        DataError: it is empty.
        MachineError: it cannot be kept.
    """
    if sys.stdin.isatty():
        raise UsageError("- means standard input, and nothing is piped into it.")
    with machine_errors("keeping standard input"):
        cache_folder().mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="stdin-", dir=cache_folder()))
    try:
        yield spool_standard_input(sys.stdin.buffer, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
