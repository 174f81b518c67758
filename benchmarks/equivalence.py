"""The result does not depend on the layout: a grid of runs, each beside one process.

    layouts x (classifier, generator, translator) x (sgd, adamw) x settings --50 steps-->
        largest relative difference of losses, gradient norms and weights

Dropout is off; examples are ragged and do not go round. The cases are those of tests/distributed,
which run a part of the grid for fewer steps. The whole grid takes hours on two cores: each layout
is kept as soon as it is done, and a layout that the output file has already is not run again.

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
from hasten.parallel.layout import AXES, choose_layout  # noqa: E402

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
    "model.num_layers": 3,
    "train.gradient_clip": 0.05,
}
_ACCUMULATED: dict[str, Any] = {"train.micro_batch_tokens": 48}
_RECOMPUTED: dict[str, Any] = {"train.recompute": True}
_VARIANTS: dict[str, dict[str, Any]] = {
    "one piece": {},
    "accumulated": _ACCUMULATED,
    "recomputed": _RECOMPUTED,
    "both": {**_ACCUMULATED, **_RECOMPUTED},
}
_NOT_FINITE = ", one step not finite"
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
    """Yields the runs of a layout.

    AdamW goes through every setting. Of plain SGD, whose steps show what all gradients have in
    common, one run for each task sees all that differs: it accumulates and recomputes.
    """
    degrees = choose_layout(layout, None)
    fits = 6 % (degrees.tensor * degrees.context) == 0
    heads = {"model.num_heads": 6 if fits else 4, "model.hidden_size": 36 if fits else 40}
    common = Case("", "", layout, settings={**_AWKWARD, **heads}, num_steps=steps, dtype=dtype)

    def cell(task: str, optimizer: str, name: str, **others: Any) -> Case:
        settings = {**common.settings, **_VARIANTS[name.removesuffix(_NOT_FINITE)]}
        one = replace(common, task=task, optimizer=optimizer, settings=settings, **others)
        return replace(one, name=f"{task} {optimizer} {name}")

    for task in _TASKS:
        if degrees.pipeline > 1 and task == cases.TRANSLATOR:
            continue  # refused: an encoder-decoder is not cut into stages
        for name in _VARIANTS:
            yield cell(task, "adamw", name)
        yield cell(task, "sgd", "both")
    name = f"accumulated{_NOT_FINITE}"
    yield cell(cases.CLASSIFIER, "adamw", name, poisoned_step=steps // 2)


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
