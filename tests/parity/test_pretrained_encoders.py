"""Encoders of transformers give the same outputs, loss and gradients here, and back."""

from __future__ import annotations

from pathlib import Path

import pytest
from pretrained_cases import PretrainedCase, compare
from pretrained_encoders import CASES

TOLERANCE = 1e-4


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_model_of_transformers_is_the_same_here_and_back(case: PretrainedCase, tmp_path: Path):
    found = compare(case, tmp_path)
    assert max(found.outputs, found.loss, found.gradients, found.back) <= TOLERANCE, found
