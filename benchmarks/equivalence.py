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
import json
import os
import sys
import tempfile
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
from test_layouts import WITHOUT_EFFECT  # noqa: E402

from hasten.parallel.launch import launch  # noqa: E402
from hasten.parallel.layout import choose_layout  # noqa: E402

LAYOUTS = [
    *(f"{axis}=2" for axis in ("replicate", "shard", "context", "tensor", "pipeline")),
    "replicate=4",
    "shard=4",
    "replicate=2,shard=2",
    "shard=2,tensor=2",
    "context=2,tensor=2",
    "pipeline=2,shard=2",
    "replicate=2,shard=2,tensor=2",
    "pipeline=2,shard=2,tensor=2",
]
_AWKWARD = {
    "model.num_heads": 4,
    "model.num_kv_heads": 2,
    "model.hidden_size": 40,
    "model.feed_forward_size": 74,
    "model.num_layers": 3,
    "train.gradient_clip": 0.05,
}
_VARIANTS: dict[str, dict[str, Any]] = {
    "one piece": {},
    "accumulated": {"train.micro_batch_tokens": 48},
    "recomputed": {"train.micro_batch_tokens": 48, "train.recompute": True},
}
_TASKS = (cases.CLASSIFIER, cases.GENERATOR, cases.TRANSLATOR)


def main() -> None:
    """Runs the grid, prints a table and keeps it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layouts", nargs="+", default=LAYOUTS)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--dtype", choices=["float64", "float32"], default="float64")
    parser.add_argument("--output", type=Path, help="file to keep the result in")
    arguments = parser.parse_args()
    rows = _kept(arguments)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HASTEN_CACHE"] = str(Path(folder) / "cache")
        cases.write_data(Path(folder))
        alone: dict[str, Found] = {}
        for layout in (one for one in arguments.layouts if one not in rows):
            wanted = list(_cells(layout, arguments.steps, arguments.dtype))
            found = _run(wanted, layout, Path(folder))
            rows[layout] = {}
            for case, together in zip(wanted, found, strict=True):
                key = repr(case.alone)
                if key not in alone:
                    alone[key] = run_case(case.alone, Path(folder), Path(folder))
                rows[layout][case.name] = compare(alone[key], together)
            worst = max(max(cell.values()) for cell in rows[layout].values())
            say(f"{layout:30} {len(wanted):3} runs, largest difference {worst:.1e}")
            result = {
                "benchmark": "equivalence",
                "machine": describe_machine(1),
                "steps": arguments.steps,
                "dtype": arguments.dtype,
                "largest_relative_differences": rows,
            }
            keep(result, arguments.output)
    _print_table(rows)


def _kept(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Returns the layouts of an earlier run of as many steps, where there is one."""
    if arguments.output is None or not arguments.output.is_file():
        return {}
    result = json.loads(arguments.output.read_text())
    if (result["steps"], result["dtype"]) != (arguments.steps, arguments.dtype):
        sys.exit(f"{arguments.output} holds another number of steps or another dtype")
    return result["largest_relative_differences"]


def _cells(layout: str, steps: int, dtype: str) -> Any:
    for task in _TASKS:
        if "pipeline" in layout and task == cases.TRANSLATOR:
            continue  # refused: an encoder-decoder is not cut into stages
        for optimizer in ("sgd", "adamw"):
            for name, settings in _VARIANTS.items():
                yield replace(
                    Case(f"{task} {optimizer} {name}", task, layout, optimizer),
                    settings={**_AWKWARD, **settings},
                    num_steps=steps,
                    dtype=dtype,
                )


def _run(wanted: list[Case], layout: str, data: Path) -> list[Found]:
    folder = data / layout
    folder.mkdir()
    (folder / "cases.json").write_text(json.dumps([asdict(case) for case in wanted]))
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, str(TESTS / "distributed" / "layout_worker.py"), str(folder)]
    assert launch(command, choose_layout(layout, None).size, num_threads=1) == 0
    found = [Found(**one) for one in json.loads((folder / "found.json").read_text())]
    for full_name, tensor in load_file(folder / "found.safetensors").items():
        number, _, name = full_name.partition("/")
        found[int(number)].tensors[name] = tensor
    return found


def compare(alone: Found, together: Found) -> dict[str, float]:
    """Returns the largest relative differences; of weights, relative to a tensor's largest."""
    pairs = list(zip(alone.steps, together.steps, strict=True))
    found = {
        name: max(abs(a[name] - b[name]) / abs(a[name]) for a, b in pairs)
        for name in ("loss", "gradient_norm")
    }
    weights = [
        float((together.tensors[name] - tensor).abs().max() / tensor.abs().max().clamp(min=1e-30))
        for name, tensor in alone.tensors.items()
        if name.startswith("model/") and not name.endswith(WITHOUT_EFFECT)
    ]
    return {**found, "weights": max(weights)}


def _print_table(rows: dict[str, dict[str, Any]]) -> None:
    names = list(next(iter(rows.values())))
    for layout, cells in rows.items():
        say(f"\n{layout}")
        for name in names:
            if name in cells:
                shown = "  ".join(f"{what} {value:.1e}" for what, value in cells[name].items())
                say(f"  {name:32} {shown}")


if __name__ == "__main__":
    main()
