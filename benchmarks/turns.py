"""Times the sides of a case in turns, one sample each and again from the first, and the cases in turns too.

What else the machine does, and how fast it is clocked, changes from one second to the next. A side that is measured
after the other has another machine; sides in turns share theirs, and the median of their rounds' ratios can be
repeated. A neighbour on the same chip may stay for half a minute, so on the CPU the rounds of a case are spread over
the time that all cases of its group take. pytest-benchmark, which knows one test at a time, is then told the samples.
"""

import gc
import math
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.clocks import Graph
from benchmarks.sides import Call, Case, Function, Side

MOST_CALLS = 1000  # of a sample
SHORT = 0.1  # seconds of a call that may be tried a few times before
BRIEF = 0.02  # seconds of a call for which it may count what the side before has left in the caches
LARGE = 32 * 2**20  # bytes of a call that is taken to ask the system for new pages, which cost more after a pause
SECONDS, ALONE = 1.0, 3  # that a side is timed if that makes enough rounds; alone, so many times as long
MOST_ROUNDS, FEW_ROUNDS = 40, 3  # few do where nobody is compared
SLOW, SLOW_ROUNDS = 3.0, 8  # seconds of a round from which so many must do
QUICK_MOST_ROUNDS, QUICK_SECONDS = 10, 0.1
SILENCE = 20  # seconds after which people want to know what is going on
Group = tuple[object, ...]


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
        self.warm = False  # whether a call that is not timed comes before those of a sample
        self.peak: int | None = None

    def prepare(self) -> float:
        """Make the call, run it, compare its result; returns the seconds of a sample."""
        check = self.case.check if self.side.agrees else None
        if self.case.device == "cuda" and not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        self._make()
        with self.turn() as call:
            start = time.perf_counter()
            result = call()  # the first call compiles, and brings code and threads into memory
            first = time.perf_counter() - start
            call.settle()
            if check is not None:
                check(self.case, result)
            del result
            if self.side.graph:
                graph = Graph(call)
                if self.side.agrees:
                    graph.prove(partial(check, self.case) if check is not None and self.side.pure else None)
                self.call = call = Function(graph, call.seconds)
            seconds = max(first if call.cold else self._once_more(call), 1e-9)
        asks_anew = self.case.device == "cpu" and (self.peak or 0) >= LARGE
        self.warm = not self.case.alone and (seconds < BRIEF or asks_anew)
        self.calls = min(MOST_CALLS, max(call.calls, math.ceil(call.seconds / seconds)))
        return seconds * self.calls

    def _make(self) -> None:
        torch.manual_seed(0)
        made = self.side.make(self.case)
        self.call = made if isinstance(made, Call) else Function(made)

    def _once_more(self, call: Call) -> float:
        """How much memory the call takes now that it is warm, and about how many seconds."""
        seconds = 0.0
        if not (self.side.graph or self.case.alone):  # of a graph it was taken when it was captured
            start = time.perf_counter()
            self.peak = call.peak_memory(self.case.device)
            seconds = time.perf_counter() - start
        if seconds < SLOW:  # else this is all that is asked: how many rounds it is given
            # One call of many may find its work done ahead: all of them do not.
            seconds = self._seconds(call, call.calls) / call.calls
            if seconds < SHORT and call.seconds and call.calls == 1:  # their number should not hang on a hiccup
                seconds = min(seconds, *(self._seconds(call, 1) for _ in range(4)))
        return seconds

    def sample(self, rounds: int) -> None:
        """Time the call, as often as a sample needs it; a call of several lives is made anew at even distances.

        Args:
            rounds: that there will be.
        """
        assert self.call is not None
        done, lives = len(self.samples), self.call.lives
        if lives * done // rounds != lives * max(done - 1, 0) // rounds:
            self._renew()
        with self.turn() as call:
            if self.warm:
                self._seconds(call, 1)
            self.samples.append(self._seconds(call, self.calls) / self.calls)

    def _renew(self) -> None:
        self.close()
        self._make()
        with self.turn() as call:
            self._seconds(call, 1)  # the first call is not like the others

    def _seconds(self, call: Call, calls: int) -> float:
        seconds = call.timed(calls, self.case.device)
        call.settle()
        return seconds

    @contextmanager
    def turn(self) -> Iterator[Call]:
        """Only now may it work."""
        call = self.call
        assert call is not None
        call.wake()
        try:
            yield call
        finally:
            call.rest()

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
        with self.blamed():
            if call is not None:
                call.wake()
                call.close()


class Turns:
    """Measures all cases of a group when the first of them is asked for, and remembers them for the others.

    A group are the cases of a test; tests marked ``together`` with the same name are one group. On CUDA every case is a
    group: a device has few neighbours, and not the memory for many cases at once.

    Args:
        items: all tests of the session, which say who takes part.
        quick: few rounds.
        say: tells people what takes long.
    """

    def __init__(self, items: list[pytest.Item], quick: bool, say: Callable[[str], None]) -> None:
        self._say = say
        self._groups: dict[Group, dict[tuple[str, Case], list[Measured]]] = {}
        for item in items:
            parameters = parameters_of(item)
            if "case" in parameters and "side" in parameters:
                case, side = parameters["case"], parameters["side"]
                cases = self._groups.setdefault(group_of(item, case, side), {})
                cases.setdefault((_test(item), case), []).append(Measured(case, side))
        self._quick = quick
        self._most, self._seconds = (QUICK_MOST_ROUNDS, QUICK_SECONDS) if quick else (MOST_ROUNDS, SECONDS)
        self._done: set[Group] = set()

    def measure(self, item: pytest.Item, case: Case, side: Side) -> Measured:
        """The measurements of `side`, which may be there already."""
        group = group_of(item, case, side)
        if group not in self._done:
            self._done.add(group)
            self._run(list(self._groups[group].values()))
        return next(one for one in self._groups[group][_test(item), case] if one.side == side)

    def _run(self, cases: list[list[Measured]]) -> None:
        with ExitStack() as last:  # goes on closing when one of them is interrupted
            for sides in cases:
                for one in sides:
                    last.callback(one.close)
            gc.freeze()  # what there is now need not be looked at in every collection
            last.callback(gc.unfreeze)
            plans = [self._prepare(sides) for sides in cases]
            if not any(count for count, _ in plans):
                return
            seconds = sum(count * seconds for count, seconds in plans)
            if seconds > SILENCE:
                self._say(f"\nmeasuring {sum(map(len, cases))} sides of {len(cases)} cases in turns: {seconds:.0f} s")
            gc.collect()
            gc.freeze()
            gc.disable()  # a collection would be counted to whom it happens
            last.callback(gc.enable)
            rounds = [count for count, _ in plans]
            for number in turn_order(rounds):
                gc.collect()
                for one in cases[number]:
                    if one.failure is None:
                        with one.blamed():
                            one.sample(rounds[number])
                cases[number].reverse()  # nobody always comes after the same one

    def _prepare(self, sides: list[Measured]) -> tuple[int, float]:
        """Make the sides of a case ready; returns how many rounds they are given, and the seconds of one."""
        seconds, ready = 0.0, 0
        for one in sides:
            with one.blamed():
                seconds += one.prepare()
                ready += 1
        if not ready:
            return 0, 0.0
        warm = any(one.warm for one in sides)
        for one in sides:  # all of a case or none, so that nobody is favoured
            one.warm = warm and one.call is not None and one.call.may_repeat
        least = min(one.call.rounds for one in sides if one.call)
        least = min(least, SLOW_ROUNDS) if seconds > SLOW else least
        case = sides[0].case
        if self._quick or (len(sides) == 1 and not case.alone):  # there is no ratio
            least = min(least, FEW_ROUNDS)
        wanted = self._seconds * (ALONE if case.alone else ready)
        return min(self._most, max(least, round(wanted / seconds))), seconds


def group_of(item: pytest.Item, case: Case, side: Side) -> Group:
    """What is measured together with it: of the same group is what has the same."""
    if case.alone:
        return _test(item), case, side.name
    if case.device == "cuda":
        return _test(item), case
    marker = item.get_closest_marker("together")
    if marker is None:
        return (_test(item),)
    (name,) = marker.args
    return "together", name


def turn_order(rounds: list[int]) -> list[int]:
    """Whose turn it is: every number below ``len(rounds)`` as often as it has rounds, at even distances."""
    moments = [((k + 0.5) / count, number) for number, count in enumerate(rounds) for k in range(count)]
    return [number for _, number in sorted(moments)]


def report(benchmark: BenchmarkFixture, case: Case, measured: Measured) -> None:
    """Tell pytest-benchmark the samples of one side, and what the reports need to know."""
    if measured.failure is not None:
        raise measured.failure
    if not measured.samples:
        raise RuntimeError("it was not measured, for the first test of its group failed")
    side = measured.side
    benchmark.group = case.title
    benchmark.extra_info |= {
        "op": case.op, "case": dict(case.axes), "device": case.device,
        "side": side.name, "role": side.role, "differs": side.differs, "graph": side.graph,
        "peak_bytes": measured.peak, "flops": case.flops, "bytes": case.bytes, "items": case.items, "unit": case.unit,
        "calls": measured.calls, "in_turns": not case.alone,
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
