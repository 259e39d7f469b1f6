"""What the machine can do at best with the same tools: the roof under which everything else stands."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.sides import DEVICES, Case, Side, grid

pytestmark = pytest.mark.together("ops")

SIZE = {"cpu": 2048, "cuda": 8192}  # rows and columns
COUNT = {"cpu": 1 << 25, "cuda": 1 << 28}  # elements, beyond any cache


def matmul(case: Case) -> Callable[[], Any]:
    size = SIZE[case.device]
    a, b = torch.randn(2, size, size, device=case.device).to(case.dtype).unbind()
    return lambda: a @ b


def triad(case: Case) -> Callable[[], Any]:
    """STREAM's: a ← b + s·c."""
    a, b, c = torch.ones(3, COUNT[case.device], device=case.device).unbind()
    return lambda: torch.add(b, c, alpha=0.5, out=a)


def cases(device: str) -> list[Case]:
    return [
        Case("machine", (("what", "matmul"), ("dtype", dtype)), device, flops=2 * SIZE[device] ** 3, quick=True)
        for dtype in ("float32", "bfloat16")
    ] + [Case("machine", (("what", "triad"), ("dtype", "float32")), device, bytes=12 * COUNT[device], quick=True)]


SIDES = (
    Side("torch.matmul", matmul, role="bound", agrees=False, when=lambda c: c["what"] == "matmul"),
    Side("torch.add", triad, role="bound", agrees=False, when=lambda c: c["what"] == "triad"),
)


@pytest.mark.parametrize(("case", "side"), grid([c for device in DEVICES for c in cases(device)], SIDES, check=None))
def test_roof(turns: Callable[..., None], case: Case, side: Side) -> None:
    turns(case, side)
