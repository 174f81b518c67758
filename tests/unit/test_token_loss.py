"""The chunked loss of tokens against torch's own on the whole logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hasten.model import token_loss
from hasten.model.token_loss import linear_cross_entropy_sum, token_accuracy_count


class Problem(NamedTuple):
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor

    @property
    def inputs(self) -> list[Tensor]:
        return [x for x in self[:3] if x is not None]


def problem(
    num_rows: int,
    vocab_size: int,
    hidden_size: int,
    *,
    bias: bool = True,
    dtype: torch.dtype = torch.float64,
    scale: float = 1.0,
) -> Problem:
    draw = torch.Generator().manual_seed(num_rows + 31 * vocab_size + 977 * hidden_size)

    def normal(*shape: int) -> Tensor:
        values = scale * torch.randn(shape, generator=draw, dtype=torch.float64)
        return values.to(dtype).requires_grad_()

    return Problem(
        normal(num_rows, hidden_size),
        normal(vocab_size, hidden_size),
        normal(vocab_size) if bias else None,
        torch.randint(vocab_size, (num_rows,), generator=draw),
    )


def reference(p: Problem, *, label_smoothing: float = 0.0, softcap: float = 0.0) -> Tensor:
    logits = F.linear(p.hidden, p.weight, p.bias)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, p.targets, reduction="sum", label_smoothing=label_smoothing)


def ours(p: Problem, **options: Any) -> Tensor:
    return linear_cross_entropy_sum(p.hidden, p.weight, p.targets, bias_V=p.bias, **options)


def assert_close(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


OPTIONS = st.fixed_dictionaries(
    {
        "label_smoothing": st.sampled_from([0.0, 0.1, 0.7, 1.0]),
        "softcap": st.sampled_from([0.0, 0.5, 5.0, 30.0]),
    }
)


@given(
    num_rows=st.integers(1, 20),
    vocab_size=st.integers(1, 12),
    hidden_size=st.integers(1, 6),
    chunk_rows=st.sampled_from([None, 1, 2, 7, 20, 64]),
    bias=st.booleans(),
    factor=st.sampled_from([1.0, 0.25, -3.0]),
    options=OPTIONS,
)
def test_equals_torch_on_the_whole_logits(
    num_rows, vocab_size, hidden_size, chunk_rows, bias, factor, options
):
    p = problem(num_rows, vocab_size, hidden_size, bias=bias)
    found, wanted = ours(p, **options, chunk_rows=chunk_rows), reference(p, **options)
    assert found.shape == () and found.requires_grad
    assert_close(found, wanted, 1e-12)
    ours_grads = torch.autograd.grad(factor * found, p.inputs)
    wanted_grads = torch.autograd.grad(factor * wanted, p.inputs)
    for mine, theirs in zip(ours_grads, wanted_grads, strict=True):
        assert_close(mine, theirs, 1e-12)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_gradients_against_finite_differences(bias, softcap, label_smoothing):
    p = problem(5, 7, 3, bias=bias)

    def loss(*inputs: Tensor) -> Tensor:
        hidden, weight, bias_V = (*inputs, None)[:3]
        return linear_cross_entropy_sum(
            hidden, weight, p.targets, bias_V=bias_V, chunk_rows=2,
            label_smoothing=label_smoothing, softcap=softcap,
        )  # fmt: skip

    assert torch.autograd.gradcheck(loss, p.inputs)


@given(
    needed=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    chunk_rows=st.sampled_from([None, 1, 4, 9]),
    options=OPTIONS,
)
@example(needed=(False, False, False), chunk_rows=4, options={})
def test_gradients_only_where_they_are_asked_for(needed, chunk_rows, options):
    p = problem(9, 5, 4)
    for x, wanted in zip(p.inputs, needed, strict=True):
        x.requires_grad_(wanted)
    found = ours(p, **options, chunk_rows=chunk_rows)
    assert found.requires_grad == any(needed)
    assert_close(found, reference(p, **options), 1e-12)
    if any(needed):
        found.backward()
        mine = [x.grad for x in p.inputs]
        for x in p.inputs:
            x.grad = None
        reference(p, **options).backward()
        for x, gradient in zip(p.inputs, mine, strict=True):
            assert (gradient is None) == (x.grad is None)
            if x.grad is not None:
                assert_close(gradient, x.grad, 1e-12)


@pytest.mark.parametrize("chunk_rows", [None, 1, 4])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_no_rows(chunk_rows, softcap):
    p = problem(0, 5, 4)
    loss = ours(p, chunk_rows=chunk_rows, softcap=softcap, label_smoothing=0.1)
    assert loss.item() == 0
    for x, gradient in zip(p.inputs, torch.autograd.grad(loss, p.inputs), strict=True):
        assert gradient.shape == x.shape and not gradient.any()
    assert token_accuracy_count(p.hidden, p.weight, p.targets, p.bias, chunk_rows) == 0


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("softcap", [0.0, 10.0])
def test_the_same_gradients_may_be_asked_for_again(softcap, label_smoothing):
    p = problem(6, 5, 4)
    loss = ours(p, chunk_rows=4, softcap=softcap, label_smoothing=label_smoothing)
    first = torch.autograd.grad(2 * loss, p.inputs, retain_graph=True)
    second = torch.autograd.grad(2 * loss, p.inputs)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def test_a_second_derivative_is_refused_rather_than_wrong():
    p, factor = problem(6, 5, 4), torch.ones((), dtype=torch.float64, requires_grad=True)
    (gradient, *_) = torch.autograd.grad(
        factor * ours(p, chunk_rows=4), p.inputs, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


class LargestTensor(TorchDispatchMode):
    """Sees every operation, and how many elements the largest result of one had."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.names.add(func.overloadpacket.__name__)
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, Tensor):
                self.num_elements = max(self.num_elements, x.numel())
        return result


@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "label_smoothing": 0.1}])
def test_nothing_as_large_as_the_logits_is_ever_held(options):
    p = problem(64, 50, 4)
    with LargestTensor() as seen:
        ours(p, chunk_rows=8, **options).backward()
    assert seen.num_elements == 8 * 50 > max(x.numel() for x in p.inputs)
    with LargestTensor() as seen:
        reference(p, **options).backward()
    assert seen.num_elements == 64 * 50


def test_the_default_holds_no_large_logits_either():
    p = problem(600, 4000, 4, dtype=torch.float32)
    with LargestTensor() as seen:
        loss = ours(p)
        loss.backward()
    assert seen.num_elements <= 300 * 4000
    assert_close(loss, reference(p), 1e-5)


@pytest.mark.parametrize("vocab_size", [1, 7, 512, 4096, 4097, 50_000, 3_000_000])
def test_chunks_are_alike_and_neither_small_nor_large(vocab_size):
    most = max(token_loss._MIN_CHUNK_ROWS, token_loss._FEW_LOGITS // vocab_size)
    weight = torch.empty(vocab_size, 1, device="meta")
    for num_rows in (0, 1, 255, 256, 257, 300, 511, 513, 2048, 10_000, 1_048_577):
        hidden = torch.empty(num_rows, 1, device="meta")
        rows = token_loss._default_chunk_rows(token_loss._Inputs(hidden, weight, None))
        sizes = [len(range(num_rows)[c]) for c in token_loss._chunks(num_rows, rows)]
        assert sum(sizes) == num_rows and rows <= most
        assert len(sizes) == -(-num_rows // most)  # no more than are needed
        assert not sizes or max(sizes) - min(sizes) < len(sizes)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("chunk_rows", [None, 4])
def test_without_gradients_none_are_computed(context, chunk_rows):
    p = problem(9, 5, 4)
    with context(), LargestTensor() as seen:
        found = ours(p, chunk_rows=chunk_rows)
    assert not found.requires_grad
    assert not seen.names & {"mm", "addmm_", "scatter_add_"}
    assert_close(found, reference(p).detach(), 1e-12)


@pytest.mark.parametrize("chunk_rows", [None, 1, 5, 100])
@pytest.mark.parametrize("softcap", [0.0, 30.0])
def test_float32_is_as_close_to_the_truth_as_torch(chunk_rows, softcap):
    p = problem(100, 300, 16, dtype=torch.float32, scale=0.5)
    truth = Problem(*(x.double().detach().requires_grad_() for x in p.inputs), p.targets)
    wanted = reference(truth, softcap=softcap)
    found = ours(p, chunk_rows=chunk_rows, softcap=softcap)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=0)
    wanted.backward()
    found.backward()
    for mine, true in zip(p.inputs, truth.inputs, strict=True):
        assert mine.grad is not None and true.grad is not None
        assert (mine.grad - true.grad).norm() <= 1e-6 * true.grad.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk_rows", [None, 1])
def test_half_precision_takes_the_softmax_and_the_sums_in_float32(dtype, chunk_rows):
    """With one feature the products round once; 300 equal rows would stall a sum in bfloat16."""
    p = problem(1, 4, 1, dtype=dtype)
    rows = Problem(
        p.hidden.detach().expand(300, 1).clone().requires_grad_(),
        p.weight, p.bias, p.targets.expand(300).clone(),
    )  # fmt: skip
    found = ours(rows, chunk_rows=chunk_rows)
    logits = F.linear(p.hidden, p.weight, p.bias).detach().float()
    assert found.dtype == torch.float32
    assert_close(found.detach(), 300 * F.cross_entropy(logits, p.targets), 1e-5)
    found.backward()
    wanted = 300 * (logits.softmax(1)[0] - F.one_hot(p.targets[0], 4))
    assert rows.bias is not None and rows.bias.grad is not None and rows.weight.grad is not None
    assert all(x.grad is not None and x.grad.dtype == dtype for x in rows.inputs)
    assert_close(rows.bias.grad.float(), wanted, 0.02)
    assert_close(rows.weight.grad.flatten().float(), p.hidden.item() * wanted, 0.02)


@pytest.mark.parametrize("chunk_rows", [None, 1, 2])
def test_logits_beyond_the_range_of_exp(chunk_rows):
    hidden = torch.tensor([[1.0], [-1.0], [1.0]], requires_grad=True)
    weight = torch.tensor([[1000.0], [-1000.0], [0.0]], requires_grad=True)
    p = Problem(hidden, weight, None, torch.tensor([0, 1, 2]))
    found = ours(p, chunk_rows=chunk_rows)
    assert found.item() == 1000.0
    found.backward()
    assert hidden.grad is not None and hidden.grad.flatten().tolist() == [0.0, 0.0, 1000.0]
    assert weight.grad is not None and weight.grad.flatten().tolist() == [1.0, 0.0, -1.0]


def test_by_hand():
    """Two tokens over a vocabulary of two: the loss is log(1 + exp(-margin))."""
    hidden, weight = torch.tensor([[2.0], [-1.0]]), torch.tensor([[1.0], [0.0]])
    targets = torch.tensor([0, 0])
    for chunk_rows in (None, 1):
        found = linear_cross_entropy_sum(hidden, weight, targets, chunk_rows=chunk_rows)
        assert found.item() == pytest.approx(0.126928011 + 1.313261688)
    assert token_accuracy_count(hidden, weight, targets) == 1


@pytest.mark.parametrize("target", [-100, -1, 5])
@pytest.mark.parametrize("chunk_rows", [None, 2])
def test_a_target_that_is_no_token_is_never_skipped(target, chunk_rows):
    p = problem(3, 5, 4)
    p.targets[1] = target
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        ours(p, chunk_rows=chunk_rows)


@given(
    num_rows=st.integers(0, 30),
    vocab_size=st.integers(1, 6),
    chunk_rows=st.sampled_from([None, 1, 7, 30, 64]),
    bias=st.booleans(),
)
def test_hits_are_counted_as_by_argmax(num_rows, vocab_size, chunk_rows, bias):
    p = problem(num_rows, vocab_size, 3, bias=bias)
    found = token_accuracy_count(p.hidden, p.weight, p.targets, p.bias, chunk_rows)
    wanted = (F.linear(p.hidden, p.weight, p.bias).argmax(1) == p.targets).sum().item()
    assert type(found) is int and found == wanted


def test_counting_hits_keeps_no_graph_and_no_large_logits():
    p = problem(64, 50, 4)
    with LargestTensor() as seen:
        token_accuracy_count(p.hidden, p.weight, p.targets, p.bias, 8)
    assert seen.num_elements == 8 * 50
