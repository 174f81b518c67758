"""The library that multiplies float32 matrices: exact, put back, measured."""

from __future__ import annotations

import pytest
import torch

from hasten.core import products
from hasten.core.errors import UsageError
from hasten.core.products import current_library, use_library, using_library
from hasten.plan import probe

CPU = torch.device("cpu")

needs_onednn = pytest.mark.skipif(
    not use_library("onednn"), reason="oneDNN does not multiply float32 exactly here"
)
use_library("default")


@pytest.mark.parametrize("library", products.LIBRARIES)
def test_every_library_multiplies_float32_exactly(library: str):
    a, b = torch.randn(70, 300), torch.randn(300, 50)
    with using_library(library):
        found = [a @ b, torch.nn.functional.linear(a, b.t().contiguous()), (b.t() @ a.t()).t()]
    exact = a.double() @ b.double()
    for one in found:
        assert ((one - exact).abs().max() / exact.abs().max()).item() < 1e-5


@needs_onednn
def test_it_is_another_library_that_multiplies():
    """Sums in another order have other last bits."""
    a, b = torch.randn(256, 1000), torch.randn(1000, 256)
    by_torch = a @ b
    with using_library("onednn"):
        assert current_library() == "onednn"
        by_onednn = a @ b
        with using_library("default"):
            assert torch.equal(a @ b, by_torch)
        assert current_library() == "onednn"
        again = a @ b
    assert current_library() == "default"
    assert torch.equal(by_onednn, again)
    assert not torch.equal(by_onednn, by_torch)


def test_a_library_is_put_back_after_an_error():
    with pytest.raises(KeyError), using_library("onednn"):
        raise KeyError
    assert current_library() == "default"


def test_one_that_would_round_is_not_used(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(products, "_onednn_is_exact", lambda: False)
    assert not use_library("onednn")
    assert current_library() == "default"
    with using_library("onednn"):
        assert current_library() == "default"
    assert probe.choose_library("auto", CPU, 64) == (
        "default",
        "oneDNN does not multiply float32 exactly here",
    )
    with pytest.raises(UsageError, match=r"train.matrix_library onednn.*default or auto"):
        probe.choose_library("onednn", CPU, 64)


def test_a_product_of_16_bits_is_found_not_to_be_exact(monkeypatch: pytest.MonkeyPatch):
    product = torch.Tensor.__matmul__

    def rounded(self: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        if self.dtype == torch.float64:
            return product(self, other)
        return product(self.bfloat16(), other.bfloat16()).float()

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
    assert not products._onednn_is_exact.__wrapped__()


@needs_onednn
@pytest.mark.parametrize(
    ("factor", "chosen"), [(0.5, "default"), (1.1, "default"), (2.0, "onednn")]
)
def test_what_is_measured_decides(factor: float, chosen: str, monkeypatch: pytest.MonkeyPatch):
    def rate(dtype: torch.dtype, device: torch.device, size: int) -> float:
        return 1e11 * (factor if current_library() == "onednn" else 1)

    monkeypatch.setattr(probe, "matrix_rate", rate)
    found, reason = probe.choose_library("auto", CPU, 64)
    assert found == chosen == current_library()
    assert f"{factor:g}" in reason


def test_what_is_asked_for_stays():
    assert probe.choose_library("default", CPU, 64) == ("default", "as asked for")
