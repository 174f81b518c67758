"""A run ends the same however many processes share it, and whatever each of them is for."""

from __future__ import annotations

import json
import math
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from layout_cases import CASES, MEASURED, Case, learning, write_data
from layout_runs import Found, run_case
from safetensors.torch import load_file, save_file
from torch import Tensor

from hasten.parallel.launch import launch

HERE = Path(__file__).parent
# Of losses, norms and metrics, relative; of tensors, relative to the largest value.
TOLERANCES = {"float64": (1e-10, 1e-9), "float32": (1e-5, 1e-3)}
# A softmax over its scores takes no notice of what all of them have in common: its gradient is
# rounding, of which Adam makes steps like any other.
NARROW = 0.01  # of losses where matrices are multiplied in 16 or 8 bits
WITHOUT_EFFECT = ("head.scorer.bias", "key.bias")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of examples, and weights that have learned some of them."""
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    for task in MEASURED:
        found = run_case(learning(task), folder, folder)
        for name in {"accuracy", "macro_f1", "bleu", "exact_match", "f1"} & found.metrics.keys():
            # Where all is right or nothing, counting an example twice would not be seen.
            assert 0 < found.metrics[name] < (100 if name == "bleu" else 1), (task, found.metrics)
        save_file(model_of(found), folder / f"{task}.safetensors")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [2, 4])
def test_the_layout_does_not_matter(num_processes: int, data: Path, monkeypatch):
    cases = CASES[num_processes]
    together = run_together(cases, num_processes, data, monkeypatch)
    alone: dict[str, Found] = {}
    problems = []
    for case, found in zip(cases, together, strict=True):
        problems += [f"{case}: {problem}" for problem in found.problems]
        if case.has_dropout:
            continue
        key = repr(case.alone)
        if key not in alone:
            alone[key] = run_case(case.alone, data, data)
        problems += [f"{case}: {problem}" for problem in differences(case, alone[key], found)]
    problems += dropout_problems(cases, together)
    assert not problems, "\n".join(problems)


def model_of(found: Found) -> dict[str, Tensor]:
    """Returns the weights without what else was trained."""
    names = [name for name in found.tensors if name.startswith("model/")]
    return {name.removeprefix("model/"): found.tensors[name] for name in names}


def run_together(
    cases: list[Case], num_processes: int, data: Path, monkeypatch: pytest.MonkeyPatch
) -> list[Found]:
    """Runs cases in processes of their own; returns what each came to."""
    folder = data / f"{num_processes}-processes"
    folder.mkdir()
    (folder / "cases.json").write_text(json.dumps([asdict(case) for case in cases]))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (*sys.path, HERE, HERE.parent))))
    command = [sys.executable, str(HERE / "layout_worker.py"), str(folder)]
    assert launch(command, num_processes, num_threads=1) == 0
    found = [Found(**one) for one in json.loads((folder / "found.json").read_text())]
    for full_name, tensor in load_file(folder / "found.safetensors").items():
        number, _, name = full_name.partition("/")
        found[int(number)].tensors[name] = tensor
    return found


def differences(case: Case, alone: Found, together: Found) -> list[str]:
    """Says what differs by more than rounding."""
    if case.precision != "float32":
        return narrow_differences(case, alone, together)
    of_numbers, of_tensors = TOLERANCES[case.dtype]
    problems = []
    pairs = zip(alone.steps, together.steps, together.extra_positions, strict=True)
    for step, (one, other, extra) in enumerate(pairs):
        wanted = {**one, "num_positions": one["num_positions"] + extra}
        problems += [
            f"step {step}: {name} is {other[name]!r}, alone {wanted[name]!r}"
            for name in wanted
            if not alike(wanted[name], other[name], of_numbers)
        ]
    for what in ("metrics", "trained"):
        one, other = getattr(alone, what), getattr(together, what)
        problems += [
            f"{what}: {name} is {other.get(name)!r}, alone {one.get(name)!r}"
            for name in sorted(one.keys() | other.keys())
            if not alike(one.get(name), other.get(name), of_numbers)
        ]
    if case.dtype == "float64" and together.samples != alone.samples:
        problems.append(f"decodes {together.samples}, alone {alone.samples}")
    if names := alone.tensors.keys() ^ together.tensors.keys():
        return [*problems, f"tensors that only one has: {sorted(names)}"]
    for name, tensor in alone.tensors.items():
        other, largest = together.tensors[name], float(tensor.abs().max())
        difference = float((other - tensor).abs().max())
        is_alike = name.endswith(WITHOUT_EFFECT) or difference <= of_tensors * largest
        # A fused step counts in float32, others in the default type.
        is_counter = name.startswith("optimizer/step/")
        if not is_alike or (other.dtype != tensor.dtype and not is_counter):
            problems.append(f"{name}: differs by {difference:.2g}, where {largest:.2g} is largest")
    return problems


def narrow_differences(case: Case, alone: Found, together: Found) -> list[str]:
    """Says where fewer bits change a loss by too much, or nothing, or are those of weights."""
    problems = []
    for step, (one, other) in enumerate(zip(alone.steps, together.steps, strict=True)):
        if one["is_finite"] != other["is_finite"]:
            problems.append(f"step {step}: is_finite is {other['is_finite']}")
        if not math.isfinite(other["loss"]):  # what overflows is a gradient
            problems.append(f"step {step}: loss is {other['loss']}")
        if one["is_finite"] and not alike(one["loss"], other["loss"], NARROW):
            problems.append(f"step {step}: loss is {other['loss']!r}, in float32 {one['loss']!r}")
    if not alike(alone.metrics["loss"], together.metrics["loss"], NARROW):
        problems.append(f"metrics: {together.metrics}, in float32 {alone.metrics}")
    for name, tensor in model_of(alone).items():
        if together.tensors[f"model/{name}"].dtype != tensor.dtype:
            problems.append(f"{name} is {together.tensors[f'model/{name}'].dtype}")
    if all(
        one["loss"] == other["loss"] for one, other in zip(alone.steps, together.steps, strict=True)
    ):
        problems.append("it is not narrower than float32")
    return problems


def alike(one: Any, other: Any, tolerance: float) -> bool:
    """Says whether two values are equal but for rounding."""
    if isinstance(one, float) and isinstance(other, float):
        both_nan = math.isnan(one) and math.isnan(other)
        return both_nan or math.isclose(one, other, rel_tol=tolerance)
    return one == other and type(one) is type(other)


def dropout_problems(cases: list[Case], together: list[Found]) -> list[str]:
    """Says where processes drop the same units, or a run does not repeat itself bit for bit."""
    problems = []
    of_layout: dict[str, list[Found]] = {}
    for case, found in zip(cases, together, strict=True):
        if not case.has_dropout:
            continue
        of_layout.setdefault(case.layout, []).append(found)
        masks = [mask for step in found.masks for rank in step for mask in rank]
        shapes, hashes = zip(*masks, strict=True)
        if len(set(map(tuple, shapes))) != 1:
            problems.append(f"{case}: the shapes {shapes} cannot be compared")
        if len(set(hashes)) != len(hashes):
            problems.append(f"{case}: the same units are dropped in {found.masks}")
    for layout, (first, second) in of_layout.items():
        same = all(first.tensors[n].equal(second.tensors[n]) for n in first.tensors)
        if first.masks != second.masks or first.steps != second.steps or not same:
            problems.append(f"{layout}: a second run is not the first")
    assert of_layout
    return problems
