"""The result does not depend on the layout: a grid of runs, each beside one process.

    layouts x (classifier, generator, translator) x (sgd, adamw) x settings --50 steps-->
        largest relative difference of losses, gradient norms and weights

Dropout is off; examples are ragged and do not go round. The cases are run as in tests/distributed,
which have other cells and fewer steps, and a cell fails by the same tolerances: it is named with
its layout and step, and the command ends with 1. Each layout is kept as soon as it is done, and one
that the output file has already, without a failed cell, is not run again.

    python benchmarks/equivalence.py [--layouts shard=2 tensor=2 ...] [--steps 50] [--output FILE]
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "distributed")]

import layout_cases as cases  # noqa: E402 - found by the line above
from layout_cases import Case  # noqa: E402
from layout_runs import Found, run_case  # noqa: E402
from machine import describe_machine, keep, say  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from test_layouts import WITHOUT_EFFECT, differences  # noqa: E402

from hasten.core.errors import HastenError  # noqa: E402
from hasten.parallel.launch import launch  # noqa: E402
from hasten.parallel.layout import AXES, Layout, choose_layout  # noqa: E402

LAYOUTS = [
    *(f"{axis}=2" for axis in AXES),
    "replicate=4",
    "shard=4",
    *(f"{one}=2,{other}=2" for one, other in itertools.combinations(AXES, 2)),
    "replicate=2,shard=2,tensor=2",
    "shard=2,context=2,tensor=2",
    "pipeline=2,shard=2,tensor=2",
]
_AWKWARD = {
    "model.num_kv_heads": 2,
    "model.feed_forward_size": 74,
    "train.gradient_clip": 0.05,
}
_VARIANTS = {  # rounds of a step, and whether blocks are recomputed
    "one piece": (1, False),
    "accumulated": (2, False),
    "recomputed": (1, True),
    "both": (2, True),
}
_TASKS = (cases.CLASSIFIER, cases.GENERATOR, cases.TRANSLATOR)


def main() -> None:
    """Runs the grid, prints a table and keeps it; what is not equal makes it exit with 1."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layouts", nargs="+", default=LAYOUTS)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--dtype", choices=["float64", "float32"], default="float64")
    parser.add_argument("--output", type=Path, help="file to keep the result in")
    arguments = parser.parse_args()
    rows, problems = _kept(arguments)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HASTEN_CACHE"] = str(Path(folder) / "cache")
        cases.write_data(Path(folder))
        alone: dict[str, Found] = {}
        for layout in (one for one in arguments.layouts if one not in rows):
            started = time.perf_counter()
            wanted = list(_cells(layout, arguments.steps, arguments.dtype))
            rows[layout], problems[layout] = _compare_all(wanted, layout, Path(folder), alone)
            worst = max((max(cell.values()) for cell in rows[layout].values()), default=math.nan)
            seconds = time.perf_counter() - started
            say(
                f"{layout:30} {len(wanted):3} runs, largest difference {worst:.1e}, {seconds:.0f} s"
            )
            result = {
                "benchmark": "equivalence",
                "machine": describe_machine(1),
                "steps": arguments.steps,
                "dtype": arguments.dtype,
                "largest_relative_differences": rows,
                "problems": problems,
            }
            keep(result, arguments.output)
    _print_table(rows)
    found = [problem for layout in problems for problem in problems[layout]]
    if found:
        sys.exit("\n".join(["", *found]))


def _kept(arguments: argparse.Namespace) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """Returns the layouts of an earlier run of as many steps; those that were not equal run again.

    Returns:
        Differences, and problems, by layout.
    """
    if arguments.output is None or not arguments.output.is_file():
        return {}, {}
    result = json.loads(arguments.output.read_text())
    if (result["steps"], result["dtype"]) != (arguments.steps, arguments.dtype):
        sys.exit(f"{arguments.output} holds another number of steps or another dtype")
    rows, problems = result["largest_relative_differences"], result["problems"]
    good = {layout: cells for layout, cells in rows.items() if not problems[layout]}
    return good, {layout: [] for layout in good}


def _cells(layout: str, steps: int, dtype: str) -> Iterator[Case]:
    """Yields the runs of a layout."""
    degrees = choose_layout(layout, None)
    for task in _TASKS:
        if degrees.pipeline > 1 and task == cases.TRANSLATOR:
            continue  # refused: an encoder-decoder is not cut into stages
        for optimizer, name in _crossed(task, degrees.size):
            settings = _settings(task, degrees, name)
            one = Case(f"{task} {optimizer} {name}", task, layout, optimizer, settings)
            yield replace(one, num_steps=steps, dtype=dtype)
    name, settings = "one step not finite", _settings(cases.CLASSIFIER, degrees, "accumulated")
    one = Case(f"{cases.CLASSIFIER} adamw {name}", cases.CLASSIFIER, layout, "adamw", settings)
    yield replace(one, num_steps=steps, dtype=dtype, poisoned_step=steps // 2)


def _crossed(task: str, num_processes: int) -> list[tuple[str, str]]:
    """Returns optimizers and variants: on few cores, the more processes, the fewer of them.

    What an axis gets wrong in accumulating or recomputing shows with two processes, where AdamW
    goes through every variant. Products see each of them in one task or another. Of plain SGD,
    whose steps show a factor that all gradients have in common, there is a run in every task.
    """
    if num_processes == 2:
        return [*(("adamw", name) for name in _VARIANTS), ("sgd", "both")]
    if task != cases.CLASSIFIER:
        return [("sgd", "both"), ("adamw", "accumulated")][: 2 if num_processes == 4 else 1]
    found = [("adamw", "both"), ("sgd", "one piece"), ("sgd", "accumulated")]
    return [*found, ("adamw", "recomputed")] if num_processes == 4 else found[:2]


def _settings(task: str, layout: Layout, name: str) -> dict[str, Any]:
    rounds, recompute = _VARIANTS[name]
    # 6 heads, or as many as the processes that share them can divide.
    heads, width = (6, 36) if 6 % (layout.tensor * layout.context) == 0 else (4, 40)
    found = {**_AWKWARD, "model.num_heads": heads, "model.hidden_size": width}
    found["model.num_layers"] = 3 if layout.pipeline > 1 else 2  # 3 blocks on 2 stages
    if task == cases.TRANSLATOR:
        found["model.num_decoder_layers"] = 1
    if rounds > 1:
        # A little more than its part: examples cannot be dealt to the token.
        found["train.micro_batch_tokens"] = 220 // rounds // layout.num_batch_shares
    return {**found, "train.recompute": recompute}


def _compare_all(
    wanted: list[Case], layout: str, data: Path, alone: dict[str, Found]
) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Runs cells in a layout, and in one process what ``alone`` lacks.

    Returns:
        The differences of each cell, and what is more than rounding: cell, layout, step.
    """
    try:
        found = _run(wanted, layout, data)
    except (HastenError, ChildProcessError) as error:
        return {}, [f"{layout}: {error}"]
    cells, problems = {}, []
    for case, together in zip(wanted, found, strict=True):
        key = repr(case.alone)
        if key not in alone:
            alone[key] = run_case(case.alone, data, data)
        cells[case.name] = compare(alone[key], together)
        more = [*together.problems, *differences(case, alone[key], together)]
        problems += [f"{case}: {problem}" for problem in more]
    return cells, problems


def _run(wanted: list[Case], layout: str, data: Path) -> list[Found]:
    folder = data / layout
    folder.mkdir()
    (folder / "cases.json").write_text(json.dumps([asdict(case) for case in wanted]))
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, str(TESTS / "distributed" / "layout_worker.py"), str(folder)]
    code = launch(command, choose_layout(layout, None).size, num_threads=1)
    if code:
        raise ChildProcessError(f"its processes ended with {code}")
    found = [Found(**one) for one in json.loads((folder / "found.json").read_text())]
    for full_name, tensor in load_file(folder / "found.safetensors").items():
        number, _, name = full_name.partition("/")
        found[int(number)].tensors[name] = tensor
    return found


def compare(alone: Found, together: Found) -> dict[str, float]:
    """Returns the largest relative differences; of weights, relative to a tensor's largest."""
    pairs = list(zip(alone.steps, together.steps, strict=True))
    found = {
        name: max(
            (
                _relative(abs(a[name] - b[name]), abs(a[name]))
                for a, b in pairs
                if not (math.isnan(a[name]) and math.isnan(b[name]))  # a skipped step
            ),
            default=math.inf,
        )
        for name in ("loss", "gradient_norm")
    }
    weights = [
        _relative(float((together.tensors[name] - tensor).abs().max()), float(tensor.abs().max()))
        for name, tensor in alone.tensors.items()
        if name.startswith("model/") and not name.endswith(WITHOUT_EFFECT)
    ]
    return {**found, "weights": max(weights)}


def _relative(difference: float, size: float) -> float:
    """Returns a relative difference; infinite where it is NaN, which ``max`` would lose."""
    found = difference / max(size, 1e-30)
    return math.inf if math.isnan(found) else found


def _print_table(rows: dict[str, dict[str, Any]]) -> None:
    for layout, cells in rows.items():
        say(f"\n{layout}")
        for name, cell in cells.items():
            shown = "  ".join(f"{what} {value:.1e}" for what, value in cell.items())
            say(f"  {name:40} {shown}")


if __name__ == "__main__":
    main()
