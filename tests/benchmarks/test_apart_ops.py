"""Ops in processes of their own: results, times and memory come from there."""

import os
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.apart_ops import ApartOp, on_cpu_apart
from benchmarks.sides import Case, Function

CASE = Case("op", (("N", 3),))


def made(case: Case) -> Callable[[], tuple[Tensor, ...]]:
    """Takes 48 MiB and 20 ms; tells the process, and a random number."""
    draw = torch.rand(())

    def step() -> tuple[Tensor, ...]:
        large = torch.ones(12 * 2**20)
        time.sleep(0.02)
        return torch.full((case["N"],), os.getpid()), large[0].bfloat16(), draw.requires_grad_()

    return step


def test_an_op_lives_in_a_process_of_its_own() -> None:
    first, second = (on_cpu_apart(made)(CASE) for _ in range(2))
    try:
        assert isinstance(first, ApartOp)
        (processes, one, draw), (others, _, again) = first(), second()
        assert processes.shape == (3,) and len({os.getpid(), int(processes[0]), int(others[0])}) == 3
        assert one == 1 and draw == again  # the same seed everywhere
        assert 0.06 < first.timed(3, "cpu") < 5
        assert first.peak_memory("cpu") == pytest.approx(48 * 2**20, rel=0.2)
    finally:
        first.close()
        second.close()


def test_on_cuda_it_lives_here() -> None:
    with torch.device("meta"):  # a GPU is not needed to make it
        call = on_cpu_apart(made)(Case("op", (("N", 3),), device="cuda"))
    assert isinstance(call, Function)
    assert call()[0][0] == os.getpid()
