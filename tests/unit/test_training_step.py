"""One optimizer step: what must not matter does not, what is not finite does no harm."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from builders import STILL, TINY, Recorder, default_dtype, write_labelled
from hasten.config.load import build_config
from hasten.data.order import cut_micro_batches, plan_epoch, steps_per_epoch
from hasten.optim.state import flatten_optimizer_state
from hasten.task.text_classification import UNSEEN, LabelledExamples, TextClassification
from hasten.training.build import build_loop, plan_run
from hasten.training.loop import Loop
from hasten.training.step import run_step


@pytest.fixture(scope="module")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_labelled(tmp_path_factory.mktemp("data") / "train.csv", 150, noise=0.2)


def make_loop(data_file: Path, folder: Path, **settings: Any) -> Loop:
    overrides = {"data.train": str(data_file), "train.tokens_per_step": 400, **TINY, **settings}
    recorder = Recorder()
    plan = plan_run(build_config(overrides=overrides), recorder)
    return build_loop(plan, folder, recorder)


def batches_of(loop: Loop) -> list[np.ndarray]:
    lengths = loop.train.lengths
    return plan_epoch(lengths, seed=0, epoch=0, num_batches=steps_per_epoch(lengths, 400))


def with_targets(loop: Loop, targets: np.ndarray) -> LabelledExamples:
    """The training examples with other classes."""
    train, task = loop.train, loop.parts.task
    assert isinstance(train, LabelledExamples) and isinstance(task, TextClassification)
    weights = task.unit_weights(targets)
    return LabelledExamples(train.corpus, train.rows, train.store, targets=targets, weights=weights)


def weights_after(loop: Loop, steps: int = 5) -> dict[str, Tensor]:
    batches = batches_of(loop)
    for step in range(steps):
        result = run_step(loop.parts, loop.train, batches[step % len(batches)], step)
        assert result.is_finite
    return {name: p.detach().clone() for name, p in loop.parts.model.named_parameters()}


def largest_difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    return max(float((first[name] - second[name]).abs().max()) for name in first)


VARIANTS: list[dict[str, Any]] = [
    {},
    {"train.class_weights": "balanced", "train.label_smoothing": 0.1},
    {"train.loss": "focal", "train.class_weights": "balanced"},
    {"train.l1": 1e-3, "train.l2": 1e-2, "train.gradient_clip": 0.1},
    {
        "optim.optimizer": "sgd",
        "train.gradient_clip": 0.0,
        "train.learning_rate": 0.1,
        "model.pooling": "attention",
    },
]


def _without_noise(variant: dict[str, Any]) -> dict[str, Any]:
    """Adam divides rounding by rounding where a gradient is next to nothing: not with this."""
    return {"optim.epsilon": 1e-6, **variant} if "optim.optimizer" not in variant else variant


@pytest.mark.parametrize("unseen", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["f32", "f64"]
)
def test_the_size_of_a_micro_batch_does_not_matter(
    data_file: Path,
    tmp_path: Path,
    variant: dict,
    dtype: torch.dtype,
    tolerance: float,
    unseen: bool,
):
    found = []
    for micro_batch_tokens in (100000, 150, 1):
        with default_dtype(dtype):
            settings = {**STILL, "train.learning_rate": 1e-3, **_without_noise(variant)}
            loop = make_loop(
                data_file, tmp_path, **{"train.micro_batch_tokens": micro_batch_tokens}, **settings
            )
            if unseen:
                assert isinstance(loop.train, LabelledExamples)
                targets = loop.train.targets.copy()
                targets[::3] = UNSEEN
                loop.train = with_targets(loop, targets)
            found.append(weights_after(loop))
        assert next(iter(found[-1].values())).dtype == dtype
    with default_dtype(dtype):
        start = dict(make_loop(data_file, tmp_path, **settings).parts.model.state_dict())
    assert largest_difference(found[0], start) > 5e-4  # or nothing would be shown
    for other in found[1:]:
        assert largest_difference(found[0], other) <= tolerance


def test_the_loss_is_the_mean_over_the_whole_batch(data_file: Path, tmp_path: Path):
    settings = {**STILL, "train.class_weights": "balanced", "train.label_smoothing": 0.1}
    loop = make_loop(data_file, tmp_path, **{"train.micro_batch_tokens": 30}, **settings)
    examples = batches_of(loop)[0]
    batch = loop.train.pack(examples)
    assert batch.targets is not None
    task = loop.parts.task
    assert isinstance(task, TextClassification) and task.class_weights is not None
    with torch.no_grad():
        expected = nn.functional.cross_entropy(
            loop.parts.model.eval()(batch),
            batch.targets,
            weight=torch.tensor(task.class_weights),
            label_smoothing=0.1,
        )
    result = run_step(loop.parts, loop.train, examples, 0)
    assert result.loss == pytest.approx(expected.item(), abs=1e-6)
    assert result.num_tokens == result.num_positions == int(batch.num_tokens)


@pytest.mark.parametrize("micro_batch_tokens", [100000, 20])
def test_penalties_enter_once_a_step(data_file: Path, tmp_path: Path, micro_batch_tokens: int):
    """With sgd at rate 1 the step is the gradient: without data it is the penalty's alone."""
    settings = {
        **STILL,
        "optim.optimizer": "sgd",
        "optim.momentum": 0.0,
        "train.learning_rate": 1.0,
        "optim.schedule": "constant",
        "optim.warmup_fraction": 0.0,
        "optim.weight_decay": 0.0,
        "train.gradient_clip": 0.0,
        "train.micro_batch_tokens": micro_batch_tokens,
        "model.zero_init_residual": False,
    }
    results = []
    for penalty in ({}, {"train.l1": 1e-3, "train.l2": 0.05}):
        loop = make_loop(data_file, tmp_path, **settings, **penalty)
        before = {n: p.detach().clone() for n, p in loop.parts.model.named_parameters()}
        results.append(weights_after(loop, steps=1))
    for name, weight in before.items():
        moved = results[0][name] - results[1][name]
        expected = 1e-3 * weight.sign() + 2 * 0.05 * weight if weight.ndim > 1 else 0 * weight
        torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-6)


def test_gradients_are_clipped_to_the_norm(data_file: Path, tmp_path: Path):
    settings = {
        **STILL,
        "optim.optimizer": "sgd",
        "optim.momentum": 0.0,
        "train.learning_rate": 1.0,
        "optim.schedule": "constant",
        "optim.warmup_fraction": 0.0,
        "optim.weight_decay": 0.0,
    }
    for clip, wanted in ((0.01, 0.01), (1000.0, None), (0.0, None)):
        loop = make_loop(data_file, tmp_path, **{"train.gradient_clip": clip}, **settings)
        before = {n: p.detach().clone() for n, p in loop.parts.model.named_parameters()}
        result = run_step(loop.parts, loop.train, batches_of(loop)[0], 0)
        moved = torch.stack(
            [(p - before[n]).norm() for n, p in loop.parts.model.named_parameters()]
        ).norm()
        assert result.gradient_norm > 0.05  # reported before clipping
        assert moved.item() == pytest.approx(wanted or result.gradient_norm, rel=1e-3)


class Poisoned:
    """A task whose loss is not finite in some calls."""

    def __init__(self, task: TextClassification, bad_calls: set[int], value: float) -> None:
        self.task, self.bad_calls, self.value, self.calls = task, bad_calls, value, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)

    def loss_sum(self, outputs: Tensor, batch: Any) -> Tensor:
        self.calls += 1
        loss = self.task.loss_sum(outputs, batch)
        return loss * self.value if self.calls in self.bad_calls else loss


def snapshot(loop: Loop) -> dict[str, Tensor]:
    tensors, _ = flatten_optimizer_state(loop.parts.optimizer)
    found = {f"optimizer {n}": t.clone() for n, t in tensors.items()}
    found |= {n: t.detach().clone() for n, t in loop.parts.model.state_dict().items()}
    assert loop.parts.average is not None
    return found | {f"average {n}": t.clone() for n, t in loop.parts.average.tensors().items()}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_step_that_is_not_finite_touches_nothing(data_file: Path, tmp_path: Path, value: float):
    settings = {"train.micro_batch_tokens": 100, "train.ema_decay": 0.9}
    loop = make_loop(data_file, tmp_path, **settings)
    batches = batches_of(loop)
    run_step(loop.parts, loop.train, batches[0], 0)
    pieces = len(cut_micro_batches(batches[1], loop.train.lengths, 100))
    assert pieces >= 3
    poisoned = Poisoned(loop.parts.task, {2}, value)  # only the second micro-batch of several
    loop.parts = dataclasses.replace(loop.parts, task=poisoned)  # pyright: ignore
    before = snapshot(loop)
    result = run_step(loop.parts, loop.train, batches[1], 1)
    assert not result.is_finite and poisoned.calls == pieces
    after = snapshot(loop)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert loop.parts.average.scalars()["num_updates"] == 1
    # What was poisoned does not linger in a gradient.
    result = run_step(loop.parts, loop.train, batches[2], 2)
    assert result.is_finite
    assert any(not torch.equal(before[n], t) for n, t in snapshot(loop).items())


def test_a_gradient_that_is_not_finite_under_a_finite_loss_is_skipped_too(
    data_file: Path, tmp_path: Path
):
    loop = make_loop(data_file, tmp_path)
    weight = loop.parts.model.get_parameter("head.classifier.weight")
    weight.register_hook(lambda gradient: gradient * float("nan"))
    before = weight.detach().clone()
    result = run_step(loop.parts, loop.train, batches_of(loop)[0], 0)
    assert np.isfinite(result.loss) and not result.is_finite
    assert torch.equal(weight, before) and not loop.parts.optimizer.state


def dropout_pattern(loop: Loop, examples: np.ndarray, step: int) -> list[Tensor]:
    masks: list[Tensor] = []
    encoder = loop.parts.model.get_submodule("encoder")
    handle = encoder.get_submodule("dropout").register_forward_hook(
        lambda module, args, out: masks.append((out == 0).detach().clone())
    )
    run_step(loop.parts, loop.train, examples, step)
    handle.remove()
    return masks


def test_dropout_depends_on_where_training_stands_and_on_nothing_else(
    data_file: Path, tmp_path: Path
):
    settings = {
        **STILL,
        "model.dropout": 0.5,
        "optim.optimizer": "sgd",
        "train.learning_rate": 1e-12,
        "train.micro_batch_tokens": 1,
    }
    loop = make_loop(data_file, tmp_path, **settings)
    lengths = loop.train.lengths
    length = int(np.bincount(lengths).argmax())
    examples = np.flatnonzero(lengths == length)[:4]  # all masks of one shape
    assert len(examples) == 4
    first = dropout_pattern(loop, examples, 7)
    assert len(first) == 4 and 0.3 < first[0].float().mean() < 0.7
    for i in range(4):  # micro-batches differ from one another
        assert all(not torch.equal(first[i], first[j]) for j in range(i))
    torch.manual_seed(12345)  # whatever the generator's state
    again = dropout_pattern(loop, examples, 7)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    later = dropout_pattern(loop, examples, 8)
    assert all(not torch.equal(a, b) for a, b in zip(first, later, strict=True))
    other = make_loop(data_file, tmp_path, **settings, **{"train.seed": 1})
    assert not torch.equal(dropout_pattern(other, examples, 7)[0], first[0])


def test_the_schedule_sets_the_rate_of_each_step(data_file: Path, tmp_path: Path):
    settings = {
        "train.learning_rate": 0.01,
        "optim.schedule": "linear",
        "train.epochs": 2,
        "optim.warmup_fraction": 0.25,
    }
    loop = make_loop(data_file, tmp_path, **settings)
    total = loop.settings.total_steps
    warmup = round(0.25 * total)
    examples = batches_of(loop)[0]
    rates = [
        run_step(loop.parts, loop.train, examples, step).learning_rate for step in range(total)
    ]
    assert rates[0] == pytest.approx(0.01 / (warmup + 1))
    assert max(rates) == pytest.approx(0.01) and rates.index(max(rates)) == warmup
    assert 0 < rates[-1] < 0.01 / (total - warmup) * 1.01


def test_under_one_per_cent_of_what_linear_layers_see_is_padding(data_file: Path, tmp_path: Path):
    loop = make_loop(data_file, tmp_path, **{"train.micro_batch_tokens": 150})
    model, rows = loop.parts.model, {}
    # The head sees sequences, all else sees tokens.
    for name, module in model.named_modules():
        if name.startswith("head"):
            continue
        if isinstance(module, nn.Linear | nn.LayerNorm | nn.RMSNorm | nn.Embedding):

            def count(module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                rows[name] = rows.get(name, 0) + args[0].shape[0]

            module.register_forward_pre_hook(count)
    real = positions = 0
    for step, examples in enumerate(batches_of(loop)):
        result = run_step(loop.parts, loop.train, examples, step)
        real += int(loop.train.lengths[examples].sum())
        positions += result.num_positions
        assert result.num_attention_positions >= result.num_tokens
    assert len(rows) > 12
    for name, count_of_rows in rows.items():
        assert real <= count_of_rows < 1.01 * real, name
    assert positions == max(rows.values())
