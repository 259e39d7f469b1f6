"""Ops that are timed in processes of their own, for what ran before decides whether a heap must ask for new pages."""

import gc
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.allocator import fix_thresholds
from benchmarks.apart import Apart, ApartCall
from benchmarks.clocks import on_cpu, peak_memory
from benchmarks.sides import Call, Case, Function

Make = Callable[[Case], Callable[[], Iterable[Tensor]]]


class Op:
    """An op at one shape, alone in a process.

    Args:
        make: gives the function to be timed, which gives tensors.
        case: for which.
    """

    def __init__(self, make: Make, case: Case) -> None:
        fix_thresholds()
        torch.manual_seed(0)
        self._step = make(case)

    def result(self) -> list[Any]:
        """Of a call, as arrays, which need no shared memory to be sent."""
        return [tensor.detach().float().numpy() for tensor in self._step()]

    def timed(self, calls: int) -> float:
        """Seconds of so many calls."""
        gc.collect()
        gc.freeze()
        gc.disable()
        return on_cpu(self._step, calls)

    def peak_memory(self) -> int | None:
        """Bytes that a call needs beyond what was there before."""
        return peak_memory(self._step, "cpu")


class ApartOp(ApartCall):
    """Calls of an `Op`, which tells what they take there.

    Args:
        make: of the op, and
        case: for it; both must be such as can be sent to a process.
    """

    seconds = 0.05  # more than in our process, for the other's threads have to wake
    rounds, lives = 15, 3  # calls that ask for new pages have two speeds, and one process is faster than the next

    def __init__(self, make: Make, case: Case) -> None:
        super().__init__(Apart(Op, make, case), pauses=False)  # nothing goes on there between calls

    def __call__(self) -> list[Tensor]:
        return [torch.from_numpy(array) for array in self.peer("result")]

    def timed(self, calls: int, device: str) -> float:
        return float(self.peer("timed", calls))

    def peak_memory(self, device: str) -> int | None:
        peak: int | None = self.peer("peak_memory")
        return peak


def on_cpu_apart(make: Make) -> Callable[[Case], Call]:
    """What a side's `make` may be: on the CPU the op has a process of its own.

    Args:
        make: gives the function to be timed; one that can be pickled.
    """
    return partial(_call_of, make)


def _call_of(make: Make, case: Case) -> Call:
    return ApartOp(make, case) if case.device == "cpu" else Function(make(case))
