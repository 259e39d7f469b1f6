"""Times the sides of a case in turns, one sample each and again from the first.

What else the machine does, and how fast it is clocked, changes from one second to the next. A side that is measured
after the other has another machine; sides in turns share theirs, and the ratio of their medians can be repeated.
pytest-benchmark, which knows one test at a time, is then told the samples of each.
"""

import gc
import math
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.clocks import CLOCKS, Graph, peak_memory
from benchmarks.sides import Case, Side

SAMPLE = 5e-3  # seconds that a sample takes at least; shorter calls are repeated
MOST_CALLS = 1000  # of a sample
ROUNDS = (7, 60)  # at least, at most
SECONDS, ALONE = 1.5, 3  # that a side is timed if that makes enough rounds; alone, so many times as long
SLOW, SLOW_ROUNDS = 3.0, 5  # seconds of a round, and how many must do then
QUICK_ROUNDS, QUICK_SECONDS = (3, 10), 0.1
Check = Callable[[Case, Any], None]


class Told:
    """A clock for pytest-benchmark that shows what was measured before."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


TOLD = Told()


class Measured:
    """What one side did.

    Args:
        side: that did it.
    """

    def __init__(self, side: Side) -> None:
        self.side = side
        self.step: Callable[[], Any] | None = None
        self.failure: BaseException | None = None  # or the reason to be skipped
        self.calls, self.samples = 1, list[float]()
        self.peak: int | None = None

    def prepare(self, case: Case, check: Check | None, memory: bool) -> float:
        """Make the call, run it, compare its result; returns the seconds of one call."""
        if case.device == "cuda" and not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        torch.manual_seed(0)
        self.step = self.side.make(case)
        result = self.step()  # the first call compiles, and brings code and threads into memory
        if check is not None and self.side.agrees:
            check(case, result)
        del result
        if self.side.graph:
            self.step = graph = Graph(self.step)
            if self.side.agrees:
                graph.prove(partial(check, case) if check is not None and self.side.pure else None)
        theirs = getattr(self.step, "peak_memory", None)  # of a process that this one cannot look into
        if memory and not self.side.graph:  # whose memory was taken when it was captured
            self.peak = theirs() if theirs else peak_memory(self.step, case.device)
        clock = CLOCKS[case.device]
        seconds = clock(self.step, 1)
        if seconds < SLOW:
            seconds = min(seconds, clock(self.step, 1))
        self.calls = min(MOST_CALLS, math.ceil(SAMPLE / max(seconds, 1e-9)))
        return seconds * self.calls

    def sample(self, case: Case) -> None:
        """Time the call, as often as a sample needs it."""
        assert self.step is not None
        self.samples.append(CLOCKS[case.device](self.step, self.calls) / self.calls)

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """What fails, or skips, is this side's affair: raised in its own test, and the others go on."""
        try:
            yield
        except torch.cuda.OutOfMemoryError as failure:
            # A peer that the device is too small for could not take part; that ours does not fit is a failure.
            reason = f"does not fit into the memory of this device ({failure})"
            self.fail(failure if self.side.role == "ours" else pytest.skip.Exception(reason))
        except (Exception, pytest.skip.Exception) as failure:
            self.fail(failure)

    def fail(self, failure: BaseException) -> None:
        """Keep the first failure, but not the tensors of the functions that it passed through."""
        traceback.clear_frames(failure.__traceback__)
        self.failure = self.failure or failure

    def close(self) -> None:
        """Let go of all that the call holds."""
        close = getattr(self.step, "close", None)
        self.step = None
        if close is not None:
            close()


class Turns:
    """Measures the sides of a case when the first of them is asked for, and remembers them for the others.

    Args:
        items: all tests of the session, which say who takes part.
        quick: few rounds.
    """

    def __init__(self, items: list[pytest.Item], quick: bool) -> None:
        self._sides: dict[tuple[str, Case], list[Side]] = {}
        for item in items:
            parameters = parameters_of(item)
            if "case" in parameters and "side" in parameters:
                self._sides.setdefault((_test(item), parameters["case"]), []).append(parameters["side"])
        self._measured: dict[tuple[str, Case, str], Measured] = {}
        self._rounds, self._seconds = (QUICK_ROUNDS, QUICK_SECONDS) if quick else (ROUNDS, SECONDS)

    def measure(self, node: pytest.Item, case: Case, side: Side, check: Check | None, alone: bool) -> Measured:
        """The measurements of `side`, which may be there already."""
        test = _test(node)
        if (test, case, side.name) not in self._measured:
            together = [side] if alone else self._sides[test, case]
            for measured in self._run(case, together, check, alone):
                self._measured[test, case, measured.side.name] = measured
        return self._measured[test, case, side.name]

    def _run(self, case: Case, sides: list[Side], check: Check | None, alone: bool) -> Iterator[Measured]:
        everybody, ready, seconds = [Measured(side) for side in sides], list[Measured](), 0.0
        try:
            for one in everybody:
                with one.blamed():
                    seconds += one.prepare(case, check, memory=not alone)
                    ready.append(one)
            least, most = self._rounds
            if seconds > SLOW:
                least = min(least, SLOW_ROUNDS)
            wanted = self._seconds * (ALONE if alone else len(ready))
            gc.collect()
            gc.disable()  # a collection would be counted to whom it happens
            for _ in range(min(most, max(least, round(wanted / seconds))) if ready else 0):
                for one in ready:
                    with one.blamed():
                        one.sample(case)
                ready = [one for one in ready if one.failure is None]
        finally:
            gc.enable()
            for one in everybody:
                with one.blamed():
                    one.close()
        yield from everybody


def report(benchmark: BenchmarkFixture, case: Case, measured: Measured) -> None:
    """Tell pytest-benchmark the samples of one side, and what the reports need to know."""
    if measured.failure is not None:
        raise measured.failure
    side = measured.side
    benchmark.group = case.title
    benchmark.extra_info |= {
        "op": case.op, "case": dict(case.axes), "device": case.device,
        "side": side.name, "role": side.role, "differs": side.differs, "graph": side.graph,
        "peak_bytes": measured.peak, "flops": case.flops, "bytes": case.bytes, "items": case.items, "unit": case.unit,
        "calls": measured.calls,
    }  # fmt: skip
    samples = iter(measured.samples)

    def tell() -> None:
        TOLD.now += next(samples)

    benchmark.pedantic(tell, rounds=len(measured.samples))


def parameters_of(item: pytest.Item) -> dict[str, Any]:
    """What a test was parametrized with."""
    return getattr(getattr(item, "callspec", None), "params", {})


def _test(item: pytest.Item) -> str:
    return item.nodeid.split("[")[0]
