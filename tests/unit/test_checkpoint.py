"""Checkpoints hold every tensor bit for bit, whatever its size, type and place in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hasten.core.errors import MachineError
from hasten.training import checkpoint
from hasten.training.checkpoint import Checkpoint, load_newest_checkpoint, save_checkpoint

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool)


def as_bytes(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().clone().untyped_storage())


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Parts of a tensor of random bits: none of its elements, one, or more, some strided."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    size = torch.empty((), dtype=dtype).element_size()
    top = 2 if dtype == torch.bool else 256  # what a bool is of other bytes is not defined
    bits = torch.randint(top, (*shape, size), dtype=torch.uint8, generator=generator)
    tensor = bits.view(dtype).squeeze(-1)
    for dim in range(tensor.ndim):
        start, step = draw(st.integers(0, 4)), draw(st.integers(1, 3))
        tensor = tensor[(slice(None),) * dim + (slice(start, None, step),)]
    return tensor.mT if tensor.ndim > 1 and draw(st.booleans()) else tensor


@given(st.dictionaries(st.sampled_from(["a", "b.c", "d"]), tensors()))
def test_what_is_saved_is_loaded_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, group: dict[str, Tensor]
):
    folder = tmp_path_factory.mktemp("checkpoints")
    save_checkpoint(folder, 3, Checkpoint({"model": group}, {"step": 3}))
    loaded = load_newest_checkpoint(folder)
    assert loaded is not None and loaded.scalars["step"] == 3
    read = loaded.tensors["model"]
    assert read.keys() == group.keys()
    for name, tensor in group.items():
        assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape)
        assert as_bytes(read[name]) == as_bytes(tensor)


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_disk_that_alters_one_bit_is_found_out(
    value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Of a zero the sign, of a number that is none the last bit of what says which."""
    bits = torch.tensor([1.0, value]).view(torch.int32)
    altered = bits ^ torch.tensor([0, -(2**31) if value == 0 else 1], dtype=torch.int32)
    load = checkpoint.load_file
    monkeypatch.setattr(
        checkpoint, "load_file", lambda path: {**load(path), "w": altered.view(torch.float32)}
    )
    group = {"w": bits.view(torch.float32)}
    with pytest.raises(MachineError, match=r"model.safetensors: the disk did not keep .* 'w'"):
        save_checkpoint(tmp_path, 1, Checkpoint({"model": group}, {}))
    assert not list(tmp_path.iterdir())
