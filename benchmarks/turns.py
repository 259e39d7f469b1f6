"""Times the sides of a case in turns, one sample each and again from the first, and the cases of a test in turns too.

What else the machine does, and how fast it is clocked, changes from one second to the next. A side that is measured
after the other has another machine; sides in turns share theirs, and the ratio of their medians can be repeated. A
neighbour on the same chip may stay for half a minute, so on the CPU the rounds of a case are spread over the time that
all cases of its test take. pytest-benchmark, which knows one test at a time, is then told the samples of each.
"""

import gc
import math
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.clocks import CLOCKS, Graph
from benchmarks.sides import Call, Case, Function, Side

MOST_CALLS = 1000  # of a sample
ROUNDS = (7, 60)  # at least, at most
SECONDS, ALONE = 1.5, 3  # that a side is timed if that makes enough rounds; alone, so many times as long
SLOW, SLOW_ROUNDS = 3.0, 5  # seconds of a round, and how many must do then
QUICK_ROUNDS, QUICK_SECONDS = (3, 10), 0.1
SILENCE = 20  # seconds after which people want to know what is going on
Check = Callable[[Case, Any], None]


class Told:
    """A clock for pytest-benchmark that shows what was measured before."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


TOLD = Told()


class Measured:
    """What one side of a case did.

    Args:
        case: that it did.
        side: that did it.
    """

    def __init__(self, case: Case, side: Side) -> None:
        self.case, self.side = case, side
        self.call: Call | None = None
        self.failure: BaseException | None = None  # or the reason to be skipped
        self.calls, self.samples = 1, list[float]()
        self.peak: int | None = None

    def prepare(self, check: Check | None, memory: bool) -> float:
        """Make the call, run it, compare its result; returns the seconds of a sample."""
        if self.case.device == "cuda" and not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        torch.manual_seed(0)
        made = self.side.make(self.case)
        self.call = made if isinstance(made, Call) else Function(made)
        with self.turn() as call:
            result = call()  # the first call compiles, and brings code and threads into memory
            call.settle()
            if check is not None and self.side.agrees:
                check(self.case, result)
            del result
            if self.side.graph:
                graph = Graph(call)
                if self.side.agrees:
                    graph.prove(partial(check, self.case) if check is not None and self.side.pure else None)
                self.call = call = Function(graph)
            seconds = 0.0
            if memory and not self.side.graph:  # of a graph it was taken when it was captured
                start = time.perf_counter()
                self.peak = call.peak_memory(self.case.device)
                seconds = time.perf_counter() - start
            if seconds < SLOW:  # else this is all that is asked: how many rounds it is given
                seconds = min(self._seconds(call, 1) for _ in range(1 if seconds > call.seconds else 2))
        self.calls = min(MOST_CALLS, max(1, math.ceil(call.seconds / max(seconds, 1e-9))))
        return seconds * self.calls

    def sample(self) -> None:
        """Time the call, as often as a sample needs it."""
        with self.turn() as call:
            self.samples.append(self._seconds(call, self.calls) / self.calls)

    def _seconds(self, call: Call, calls: int) -> float:
        seconds = CLOCKS[self.case.device](call, calls)
        call.settle()
        return seconds

    @contextmanager
    def turn(self) -> Iterator[Call]:
        """Only now may it work."""
        assert self.call is not None
        self.call.wake()
        try:
            yield self.call
        finally:
            self.call.rest()

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
        call, self.call = self.call, None
        if call is not None:
            call.wake()
            call.close()


class Turns:
    """Measures all cases of a test when the first of them is asked for, and remembers them for the others.

    On CUDA a case at a time: a device has few neighbours, and not the memory for all cases at once.

    Args:
        items: all tests of the session, which say who takes part.
        quick: few rounds.
        say: tells people what takes long.
    """

    def __init__(self, items: list[pytest.Item], quick: bool, say: Callable[[str], None]) -> None:
        self._say = say
        self._cases: dict[str, dict[Case, list[Side]]] = {}
        for item in items:
            parameters = parameters_of(item)
            if "case" in parameters and "side" in parameters:
                sides = self._cases.setdefault(_test(item), {}).setdefault(parameters["case"], [])
                sides.append(parameters["side"])
        self._measured: dict[tuple[str, Case, str], Measured] = {}
        self._rounds, self._seconds = (QUICK_ROUNDS, QUICK_SECONDS) if quick else (ROUNDS, SECONDS)

    def measure(self, node: pytest.Item, case: Case, side: Side, check: Check | None, alone: bool) -> Measured:
        """The measurements of `side`, which may be there already."""
        test = _test(node)
        if (test, case, side.name) not in self._measured:
            together = {case: [side]} if alone else self._together(test, case)
            for measured in self._run(together, check, alone):
                self._measured[test, measured.case, measured.side.name] = measured
        return self._measured[test, case, side.name]

    def _together(self, test: str, case: Case) -> dict[Case, list[Side]]:
        cases = self._cases[test]
        return {c: cases[c] for c in cases if c.device == "cpu"} if case.device == "cpu" else {case: cases[case]}

    def _run(self, cases: dict[Case, list[Side]], check: Check | None, alone: bool) -> list[Measured]:
        everybody = [[Measured(case, side) for side in sides] for case, sides in cases.items()]
        flat = [one for sides in everybody for one in sides]
        try:
            plans = [self._prepare(sides, check, alone) for sides in everybody]
            if not any(count for count, _ in plans):
                return flat
            seconds = sum(count * seconds for count, seconds in plans)
            if seconds > SILENCE:
                self._say(f"\nmeasuring {len(flat)} sides of {len(cases)} cases in turns: {seconds:.0f} s")
            gc.collect()
            gc.freeze()  # what there is now need not be looked at again
            gc.disable()  # a collection would be counted to whom it happens
            for number in turn_order([count for count, _ in plans]):
                gc.collect()
                for one in everybody[number]:
                    if one.failure is None:
                        with one.blamed():
                            one.sample()
        finally:
            gc.enable()
            gc.unfreeze()
            for one in flat:
                with one.blamed():
                    one.close()
        return flat

    def _prepare(self, sides: list[Measured], check: Check | None, alone: bool) -> tuple[int, float]:
        """Make the sides of a case ready; returns how many rounds they are given, and the seconds of one."""
        seconds, ready = 0.0, 0
        for one in sides:
            with one.blamed():
                seconds += one.prepare(check, memory=not alone)
                ready += 1
        if not ready:
            return 0, 0.0
        least, most = self._rounds
        if seconds > SLOW:
            least = min(least, SLOW_ROUNDS)
        if len(sides) == 1:  # there is no ratio
            least = min(least, QUICK_ROUNDS[0])
        wanted = self._seconds * (ALONE if alone else ready)
        return min(most, max(least, round(wanted / seconds))), seconds


def turn_order(rounds: list[int]) -> list[int]:
    """Whose turn it is: every number below ``len(rounds)`` as often as it has rounds, at even distances."""
    moments = [((k + 0.5) / count, number) for number, count in enumerate(rounds) for k in range(count)]
    return [number for _, number in sorted(moments)]


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
