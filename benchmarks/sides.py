"""What a comparison is made of: a case (one op, one shape, one device) and the sides that do it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import pytest
import torch

from benchmarks.clocks import CLOCKS, peak_memory

DEVICES = ("cpu", "cuda")
# A side's `make` calls this when the side cannot run here: pytest.skip, so that importorskip may be used too.
unavailable = pytest.skip


@dataclass(frozen=True)
class Case:
    """One op at one shape on one device.

    Args:
        op: name of the op or pipeline, the same in all its cases.
        axes: what distinguishes the cases of an op, in the order in which they are told.
        device: "cpu" or "cuda".
        flops: operations that no implementation can do without.
        bytes: bytes that must be read or written at least.
        items: how many of `unit` one call makes.
        unit: plural, such as "images".
        quick: part of ``--quick`` too.
        alone: its sides are measured one after the other, for they would work on while it is not their turn.
        check: asserts that a result is right.
    """

    op: str
    axes: tuple[tuple[str, int | str], ...]
    device: str = "cpu"
    flops: float | None = None
    bytes: float | None = None
    items: int | None = None
    unit: str | None = None
    quick: bool = False
    alone: bool = False
    check: Callable[["Case", Any], None] | None = field(default=None, compare=False)

    def __getitem__(self, axis: str) -> Any:
        return dict(self.axes)[axis]

    @property
    def dtype(self) -> torch.dtype:
        """Of the axis "dtype"."""
        dtype: torch.dtype = getattr(torch, self["dtype"])
        return dtype

    @property
    def title(self) -> str:
        """For people."""
        shown = (f"{k}={v:,}" if isinstance(v, int) else str(v) for k, v in self.axes)
        return f"{self.op}, {', '.join(shown)} [{self.device}]"

    def __str__(self) -> str:
        return "-".join([self.device, *(str(v) if isinstance(v, str) else f"{k}{v}" for k, v in self.axes)])


class Call(ABC):
    """What is timed. A side's `make` gives one where a plain function will not do."""

    seconds, calls = 1e-2, 1  # that a sample has at least
    rounds = 10  # that do where they take long
    lives = 1  # how often it is made in a measurement: each time its memory lies elsewhere, and its process is another
    cold = False  # whether every call takes as long as the first: one will do before, and no memory is told
    may_repeat = True  # whether there is time for a call that is not timed before those of a sample

    @abstractmethod
    def __call__(self) -> Any:
        """Do it; what it returns is checked the first time."""

    def timed(self, calls: int, device: str) -> float:
        """Seconds of so many calls on that device."""
        return CLOCKS[device](self, calls)

    def settle(self) -> None:
        """Wait for what calls have left to be done: after every sample, and not timed."""

    def wake(self) -> None:
        """Its turn begins."""

    def rest(self) -> None:
        """Its turn ends: no work may go on."""

    def peak_memory(self, device: str) -> int | None:
        """Bytes that it needs beyond what was there before; None where that cannot be told."""

        def whole() -> None:
            self()
            self.settle()

        return peak_memory(whole, device)

    def close(self) -> None:
        """Let go of all that it holds."""


class Function(Call):
    """A function that is timed.

    Args:
        function: without arguments.
        seconds: that a sample takes at least.
        rounds: that do where they take long.
    """

    def __init__(self, function: Callable[[], Any], seconds: float = Call.seconds, rounds: int = Call.rounds) -> None:
        self._function, self.seconds, self.rounds = function, seconds, rounds

    def __call__(self) -> Any:
        return self._function()


class Elsewhere(Call):
    """What other processes do: their memory cannot be told here, unless they tell it."""

    def peak_memory(self, device: str) -> int | None:
        return None


@dataclass(frozen=True)
class Side:
    """One way to do it.

    Args:
        name: short; "fastssl" is ours.
        make: gives the call to be timed, ready to run; calls `unavailable` with the reason if there is none.
        role: "ours", "peer", or "bound" for a yardstick that does less than the op asks for.
        differs: what it computes otherwise than the rest.
        agrees: its result is compared with the expected one.
        graph: timed as the replay of a CUDA graph.
        pure: a call changes nothing that the next one reads.
        when: for which cases it is asked for at all, for sides that take minutes at some.
    """

    name: str
    make: Callable[[Case], Callable[[], Any] | Call]
    role: Literal["ours", "peer", "bound"] = "peer"
    differs: str = ""
    agrees: bool = True
    graph: bool = False
    pure: bool = True
    when: Callable[[Case], bool] = lambda case: True

    def __str__(self) -> str:
        return self.name


def grid(
    cases: Iterable[Case],
    sides: Sequence[Side],
    check: Callable[[Case, Any], None] | None,
    graphs: Sequence[str] = (),
) -> list[Any]:
    """The parameters ("case", "side") of a test: all sides of a case stand together, CUDA's are marked ``gpu``.

    Args:
        cases: to measure.
        sides: who takes part.
        check: asserts that a result is right: ``check(case, result)``.
        graphs: names of the sides that on CUDA are also replayed as a graph.
    """
    parameters = []
    for case in (replace(case, check=check) for case in cases):
        here = [side for side in sides if side.when(case)]
        if case.device == "cuda":
            here += [replace(s, name=f"{s.name}, CUDA graph", graph=True) for s in here if s.name in graphs]
        marks = [pytest.mark.gpu] * (case.device == "cuda") + [pytest.mark.quick] * case.quick
        parameters += [pytest.param(case, side, id=f"{case}-{side}", marks=marks) for side in here]
    return parameters
