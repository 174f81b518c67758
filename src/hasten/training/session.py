"""Starts, resumes and plans runs; holds the run folder's lock while one is trained.

start_run  -> plan -> create folder -> loop -> finish -> result.json
resume_run -> check data -> plan from the saved configuration -> newest checkpoint -> the same
"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from hasten.config.load import replace_values
from hasten.config.schema import ParallelConfig, RunConfig
from hasten.core.errors import DataError, OutOfMemoryError, UsageError
from hasten.core.files import FileLock, file_hash, machine_errors, remove_partials
from hasten.core.products import using_library
from hasten.core.ranks import Ranks
from hasten.data.cache import clear_leftovers, folder_for_stdin
from hasten.data.rows import spool_standard_input
from hasten.parallel.agreement import unequal_files
from hasten.parallel.layout import Layout, choose_layout
from hasten.parallel.place import find_place
from hasten.parallel.resources import Resources, measure_resources
from hasten.parallel.world import World, joined
from hasten.training.architecture import read_architecture
from hasten.training.build import (
    available_cores,
    build_loop,
    choose_layout_of,
    plan_run,
)
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
from hasten.training.inherited import read_inherited
from hasten.training.loop import Interrupted, Loop
from hasten.training.machine import choose_allocation, choose_device
from hasten.training.observe import MetricsLog, NoLog, Observer, Silent
from hasten.training.planned import Plan
from hasten.training.prepare import prepare_data, with_drawing
from hasten.training.saved import load_tokenizers
from hasten.training.sources import open_sources
from hasten.training.start import remove_start

_SHARING = ("processes", "layout")


def start_run(config: RunConfig, output: str | Path | None, observer: Observer) -> dict[str, Any]:
    """Trains a new run to its end; returns its result as JSON values.

    Raises:
        HastenError: see each subclass for what a person can do.
        Interrupted: a signal arrived; the run can be resumed.
    """
    if output is not None and _started_again(Path(output)):
        return resume_run(Path(output), observer)
    with _joined(config) as ranks, _computing(config), _spooled(config) as config:
        begun: list[tuple[Plan, Loop]] = []
        resources = _measured(config, ranks)

        def begin() -> Path:
            folder = choose_folder(output, config.data)
            plan = plan_run(_with_layout(config, ranks), observer, resources)
            loop = build_loop(plan, folder, observer)  # settings that do not fit leave no folder
            start = loop.parts.model if plan.pretrained is not None else None
            final = create_folder(folder, plan, start)
            observer.note(f"run folder: {folder}")
            begun.append((dataclasses.replace(plan, config=final, pretrained=None), loop))
            return folder

        folder = ranks.on_main(begin)
        if ranks.size == 1:
            plan, loop = begun[0]
            return _train(loop, plan)
        # The others go on as a resumed run does: from what the folder says.
        _agree_on_files(folder, ranks)
        plan = begun[0][0] if begun else _saved_plan(folder)
        begun.clear()
        _arrange(ranks, plan)
        return _train(_build_together(plan, folder, observer, ranks), plan)


def resume_run(
    folder: Path, observer: Observer, parallel: ParallelConfig | None = None
) -> dict[str, Any]:
    """Goes on with a run from its newest checkpoint; a finished one is only measured again.

    Args:
        folder: of the run.
        observer: told of what happens.
        parallel: processes to go on with, where they are not to be those of before.

    Raises:
        DataError: a data file has changed.
        DamagedError: a checkpoint is damaged.
    """
    config = resumed_config(folder, parallel)

    def refuse_early() -> None:
        lock_folder(folder).release()
        check_data_unchanged(read_folder(folder)[1])

    with _joined(config) as ranks, _computing(config):
        ranks.on_main(refuse_early)
        _agree_on_files(folder, ranks)
        resources = _measured(config, ranks)
        plan = _saved_plan(folder, _with_layout(config, ranks))
        if resources is not None:
            plan = _with_new_layout(plan, ranks, resources, observer)
        _arrange(ranks, plan)
        return _train(_build_together(plan, folder, observer, ranks), plan)


def resumed_config(folder: Path, parallel: ParallelConfig | None = None) -> RunConfig:
    """Returns the configuration with which a run goes on.

    Where it goes on with other processes than before, the threads of each are chosen anew. What is
    not asked for stays as it was.

    Raises:
        UsageError: it is not a run folder.
        DamagedError: its configuration cannot be read.
    """
    config, _ = read_folder(folder)
    place = find_place()
    if parallel is None and place is not None and place.size != config.parallel.processes:
        parallel = ParallelConfig(processes="auto", layout="auto")  # torchrun or srun has decided
    if parallel is None:
        return config
    wanted = {name: getattr(parallel, name) for name in parallel.model_fields_set}
    before = config.parallel
    if wanted.get("processes", before.processes) == before.processes:
        if wanted.get("layout", "auto") == "auto":
            # As many as before: what was chosen for them stays.
            wanted["layout"] = before.layout
    else:
        wanted.setdefault("layout", "auto")
    if "layout" in wanted and wanted["layout"] != before.layout:
        wanted.setdefault("processes", "auto")
    values: dict[str, Any] = {f"parallel.{name}": value for name, value in wanted.items()}
    if any(wanted.get(name, getattr(before, name)) != getattr(before, name) for name in _SHARING):
        values["train.num_threads"] = "auto"
    return replace_values(config, values)


def speaks() -> bool:
    """Returns whether this process is the one of its run that prints."""
    place = find_place()
    return place is None or place.rank == 0


def _with_layout(config: RunConfig, ranks: Ranks) -> RunConfig:
    """Returns the configuration with the processes that there are, and what they are for.

    What several are for is left open where it was.
    """
    layout = str(ranks.layout) if isinstance(ranks, World) else str(Layout())
    if ranks.size > 1 and config.parallel.layout == "auto":
        layout = "auto"
    return replace_values(config, {"parallel.processes": ranks.size, "parallel.layout": layout})


def _measured(config: RunConfig, ranks: Ranks) -> Resources | None:
    """Returns what several processes have, where their layout depends on it."""
    if not isinstance(ranks, World) or config.parallel.layout != "auto":
        return None
    return measure_resources(ranks, choose_device(config.train.device)[0])


def _with_new_layout(plan: Plan, ranks: Ranks, resources: Resources, observer: Observer) -> Plan:
    """Returns the plan of a resumed run with a layout for other processes than before."""

    def choose() -> str:
        found = choose_layout_of(plan, resources)
        if found.warning:
            observer.warn(found.warning)
        observer.note(f"parallel.layout {found.layout} ({found.reason})")
        return str(found.layout)

    values = {"parallel.layout": ranks.on_main(choose)}
    return dataclasses.replace(plan, config=replace_values(plan.config, values))


def _arrange(ranks: Ranks, plan: Plan) -> None:
    """Gives the processes what the plan says that they are for."""
    layout = choose_layout(plan.config.parallel.layout, ranks.size)
    if isinstance(ranks, World) and layout != ranks.layout:
        ranks.arrange(layout)
        choose_allocation(saves_memory=not layout.has_whole_weights)


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
    folder, ranks = loop.folder, loop.parts.parallel.ranks
    locks: list[FileLock] = []
    ranks.on_main(lambda: locks.append(lock_folder(folder)))
    try:
        with machine_errors(f"writing to {folder}"), library_errors():
            ranks.on_main(lambda: remove_partials(folder))
            length = loop.resume()
            log = MetricsLog(folder / "metrics.jsonl", length) if ranks.is_main else NoLog()
            if loop.state.step:
                loop.observer.note(f"resumed at step {loop.state.step} of {plan.total_steps}")
            with closing(log):
                loop.run(log)
            result = finish_run(loop, plan)
            ranks.on_main(lambda: write_result(folder, result))
            ranks.on_main(lambda: remove_start(folder))
        return result
    except BaseException as stop:
        # A signal outside the loop, which has its own way of stopping: before its first step, or
        # while the finished model is measured.
        if isinstance(stop, KeyboardInterrupt) or hasattr(stop, "signal_number"):
            raise Interrupted(getattr(stop, "signal_number", signal.SIGINT), folder) from None
        raise
    finally:
        for lock in locks:
            lock.release()


def _saved_plan(folder: Path, config: RunConfig | None = None) -> Plan:
    """Returns the plan of a run whose choices are already made; ``config`` instead of its own."""
    config = config or read_folder(folder)[0]
    device, _ = choose_device(config.train.device)
    sources = open_sources(config, Silent())
    inherited = read_inherited(folder)
    framing = None if inherited is None else inherited.framing
    prepared = prepare_data(config, sources, Silent(), load_tokenizers(folder), framing)
    architecture = read_architecture(folder)
    return Plan(config, [], with_drawing(prepared, config), device, architecture)


def _agree_on_files(folder: Path, ranks: Ranks) -> None:
    """Refuses files that are not the same on all hosts: those of the data, and the run folder.

    Raises:
        DataError: naming the file and the hosts.
        SystemExit: so it is, and rank 0 says it.
    """
    if not isinstance(ranks, World):
        return

    def of_run() -> dict[str, str | None]:
        settings, (_, data) = folder / "config.yaml", read_folder(folder)
        hashes: dict[str, str | None] = {str(settings): file_hash(settings)}
        return hashes | {entry["path"]: entry["sha256"] for entry in data["files"]}

    wanted = ranks.on_main(of_run)
    looks = ranks.place.local_rank == 0 and not ranks.is_main  # once for each host
    found = ranks.assemble({path: _hash_here(Path(path)) for path in wanted if looks})

    def refuse() -> None:
        if problem := unequal_files([wanted, *found[1:]], ranks.hosts):
            raise DataError(f"{problem}: all hosts need the same files under the same paths.")

    ranks.on_main(refuse)


def _hash_here(path: Path) -> str | None:
    """Returns the hash of a file as this host sees it; None where it sees none."""
    with suppress(OSError):
        os.scandir(path.parent).close()  # makes a network file system look again
    return file_hash(path) if path.is_file() else None


def _build_together(plan: Plan, folder: Path, observer: Observer, ranks: Ranks) -> Loop:
    """Returns the loop of one of several processes, once all of them have come so far."""
    if isinstance(ranks, World):
        ranks.assemble(None)  # a host may prepare its data for longer than collectives wait
    return build_loop(plan, folder, _heard(observer, ranks), ranks)


def _started_again(folder: Path) -> bool:
    """Returns whether the processes had begun a run there when they lost one of them."""
    count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return count not in ("", "0") and (folder / "config.yaml").is_file()


def _heard(observer: Observer, ranks: Ranks) -> Observer:
    """Returns whom to tell: one process speaks for all."""
    return observer if ranks.is_main else Silent()


@contextmanager
def _joined(config: RunConfig) -> Iterator[Ranks]:
    """Joins the processes of the run."""
    device, _ = choose_device(config.train.device)
    parallel = config.parallel
    wanted = None if parallel.processes == "auto" else parallel.processes
    with joined(parallel.layout, wanted, device.type, parallel.timeout_seconds) as ranks:
        yield ranks


@contextmanager
def _computing(config: RunConfig) -> Iterator[None]:
    """Sets threads and the allocator, keeps the caller's random state, names lack of memory."""
    layout = choose_layout(config.parallel.layout, None)
    choose_allocation(saves_memory=not layout.has_whole_weights)
    clear_leftovers()
    threads = config.train.num_threads
    before = torch.get_num_threads()
    torch.set_num_threads(available_cores() if threads == "auto" else threads)
    try:
        with torch.random.fork_rng(), using_library():
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
        "result stays the same), --train.recompute true (so does it) or --preset tiny."
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
    clear_leftovers()
    with folder_for_stdin() as folder:
        yield spool_standard_input(sys.stdin.buffer, folder)
