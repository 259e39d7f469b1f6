"""Kernels run under Triton's interpreter where there is no GPU, with every buffer they get fenced by NaN."""

from collections.abc import Iterator

import pytest
import torch

from tests.kernels import fences


@pytest.fixture(autouse=True)
def fenced_outputs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What kernels do not write stays NaN, and what they write beyond an output is found."""
    fences.allocated.clear()
    monkeypatch.setattr(torch.Tensor, "new_empty", fences.new_empty)
    yield
    fences.check()
