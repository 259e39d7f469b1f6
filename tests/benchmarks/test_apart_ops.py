"""Ops in processes of their own: results, times and memory come from there."""

import os
import pickle
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks import test_info_nce as info_nce
from benchmarks.apart_ops import ApartOp, on_cpu_apart
from benchmarks.sides import Case, Function, Side
from benchmarks.turns import LARGE, Measured

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
        torch.manual_seed(0)
        assert one == 1 and draw == again == torch.rand(())  # the same seed everywhere
        assert 0.06 < first.timed(3, "cpu") < 5
        assert first.peak_memory("cpu") == pytest.approx(48 * 2**20, rel=0.2)
    finally:
        first.close()
        second.close()


def test_on_cuda_it_lives_here() -> None:
    call = on_cpu_apart(made)(Case("op", (("N", 3),), device="cuda"))
    assert isinstance(call, Function)
    assert call()[0][0] == os.getpid()


def test_every_side_of_info_nce_can_be_sent_to_a_process() -> None:
    for side in (*info_nce.QUEUE_SIDES, *info_nce.IN_BATCH_SIDES):
        pickle.dumps(side.make)


def test_what_it_took_there_is_what_counts() -> None:
    """Not the way there and back."""

    class Slowly(ApartOp):
        def __call__(self) -> list[Tensor]:
            time.sleep(0.2)
            return super().__call__()

    one = Measured(CASE, Side("a", lambda case: Slowly(made, case)))
    try:
        one.prepare()
        one.sample(rounds=1)
        assert 0.02 < one.samples[0] < 0.15
        assert one.warm and one.peak is not None and one.peak > LARGE  # and so it asks for new pages
    finally:
        one.close()
