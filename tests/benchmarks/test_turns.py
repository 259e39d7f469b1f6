"""The sides of a case take turns, and so do the cases of a test; what fails is the affair of the side that failed."""

import json
import os
import re
import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import fastssl.ops  # noqa: F401  here, for pytester forgets what a run has imported, and ops are registered only once
from benchmarks.sides import Call, Case, Elsewhere, Side
from benchmarks.turns import Measured, Turns, turn_order

pytest_plugins = ["pytester"]

SUITE = """
import time
from pathlib import Path
import pytest
from benchmarks.sides import Call, Case, Side, grid, unavailable

LOG = Path(__file__).with_name("log")

def log(word):
    with LOG.open("a") as file:
        file.write(word)

class Step(Call):
    def __init__(self, case, name):
        self.name = f"{name}{case['N']}"
    def __call__(self):
        log(self.name)
        time.sleep(0.05)  # so long that all have the fewest rounds, on a busy machine too
        return 2 if "wrong" in self.name else 1
    def settle(self):
        time.sleep(0.1)  # is not counted
    def wake(self):
        log("(")
    def rest(self):
        log(")")
    def close(self):
        log(self.name.upper())

def dies(case):
    count = 0
    def step():
        nonlocal count
        count += 1
        if count > 8:  # when it is prepared, and in its first round, it has not
            raise RuntimeError("it died")
        time.sleep(0.03)  # a brief side would give all of them an untimed call
        return 1
    return step

def missing(case):
    unavailable("the peer is not installed")

def check(case, result):
    assert result == 1

CASES = [Case("op", (("N", 4),), quick=True), Case("op", (("N", 5),), quick=True), Case("op", (("N", 4),), "cuda")]
SIDES = (
    Side("a", lambda case: Step(case, "a")), Side("b", lambda case: Step(case, "b"), role="ours"),
    Side("wrong", lambda case: Step(case, "wrong")), Side("dies", dies), Side("missing", missing),
)

@pytest.mark.parametrize(("case", "side"), grid(CASES, SIDES, check))
def test_it(turns, case, side):
    turns(case, side)
"""


@pytest.fixture
def suite(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    for name in [name for name in os.environ if name.startswith("PYTEST_XDIST")]:
        monkeypatch.delenv(name)  # several processes would switch the benchmarks off
    root = Path(__file__).parents[2]
    pytester.makeconftest((root / "benchmarks" / "conftest.py").read_text())
    pytester.makepyfile(test_suite=SUITE)
    pytester.makeini("[pytest]\nmarkers =\n    gpu: x\n    quick: x\n    together(name): x\n")
    pytester.syspathinsert(root)
    return pytester


def test_the_rounds_of_all_cases_are_spread_evenly() -> None:
    assert turn_order([2, 0, 4]) == [2, 0, 2, 2, 0, 2]
    order = turn_order([5, 60])
    gaps = [b - a for a, b in pairwise([i for i, number in enumerate(order) if number == 0])]
    assert sorted(order) == [0] * 5 + [1] * 60 and gaps == [13] * 4


def run(suite: pytest.Pytester, *arguments: str) -> tuple[dict[str, int], dict[str, Any]]:
    file = suite.path / "run.json"
    done = suite.runpytest_inprocess(
        "-p", "no:cacheprovider", "-p", "no:xdist", "--quick", f"--benchmark-json={file}", *arguments
    )
    return done.parseoutcomes(), json.loads(file.read_text()) if file.stat().st_size else {}


def test_turns_failures_and_skips(suite: pytest.Pytester) -> None:
    outcomes, found = run(suite)
    assert {name: outcomes[name] for name in ("passed", "failed", "skipped", "deselected")} == {
        "passed": 4, "failed": 4, "skipped": 2, "deselected": 5,
    }  # fmt: skip
    assert [row["extra_info"]["side"] for row in found["benchmarks"]] == ["a", "b"] * 2
    assert all(0.049 < row["stats"]["median"] < 0.14 for row in found["benchmarks"])
    assert {(row["side"], row["reason"]) for row in found["skipped"]} == {("missing", "the peer is not installed")}
    log = (suite.path / "log").read_text()
    # In turns, the cases too, and nobody works while it is not its turn.
    assert "(a4)(b4)(a5)(b5)(b4)(a4)(b5)(a5)" in log
    assert all(log.count(name) == 1 for name in ("A4", "B4", "WRONG4", "A5", "B5", "WRONG5"))
    assert not set("ab") & set(re.split("[A-Z]", log, maxsplit=1)[1])  # closed at the end
    assert min(row["stats"]["rounds"] for row in found["benchmarks"]) > 2


@pytest.mark.parametrize(
    ("names", "turns"),
    [
        (("ops", "ops"), "(a4)(b4)(a5)(b5)(a7)(b7)(b4)(a4)(b5)(a5)(b7)(a7)"),
        (("ops", "steps"), "(a4)(b4)(a5)(b5)(b4)(a4)(b5)(a5)"),
    ],
)
def test_tests_marked_with_the_same_name_take_turns_together(
    suite: pytest.Pytester, names: tuple[str, str], turns: str
) -> None:
    more = """
CASES = [Case("op", (("N", 7),), quick=True)]

@pytest.mark.parametrize(("case", "side"), grid(CASES, SIDES, check))
def test_more(turns, case, side):
    turns(case, side)
"""
    first, second = (f"@pytest.mark.together({name!r})\n@pytest.mark.parametrize" for name in names)
    marked = SUITE.replace("@pytest.mark.parametrize", first) + more.replace("@pytest.mark.parametrize", second)
    suite.makepyfile(test_suite=marked)
    outcomes, _ = run(suite)
    assert outcomes["passed"] == 6 and outcomes["skipped"] == 3
    assert turns in (suite.path / "log").read_text()


def test_a_side_that_is_chosen_alone(suite: pytest.Pytester) -> None:
    _, found = run(suite, "-k", "cpu-N4-b")
    assert [row["extra_info"]["side"] for row in found["benchmarks"]] == ["b"]
    assert "a" not in (suite.path / "log").read_text()


def test_the_machine_is_named_and_its_host_is_not(suite: pytest.Pytester) -> None:
    _, found = run(suite, "-k", "cpu-N4-b")
    machine = found["machine_info"]
    assert machine["fastssl"]["quick"] is True and machine["fastssl"]["threads"] >= 1
    assert machine["fastssl"]["versions"]["torch"]
    assert "node" not in machine


@pytest.mark.parametrize(("is_cold", "calls"), [(True, [1]), (False, [1, 2, 3, 4, 5, 6, 7])])
def test_what_starts_cold_every_time_is_called_once_before_it_is_timed(is_cold: bool, calls: list[int]) -> None:
    made = list[int]()

    class Counted(Call):
        cold = is_cold

        def __call__(self) -> None:
            made.append(len(made) + 1)

    one = Measured(Case("op", ()), Side("a", lambda case: Counted()))
    assert one.prepare() > 0
    assert made == calls
    assert (one.peak is None) == is_cold


@pytest.mark.parametrize(
    ("wait", "peak", "alone", "untimed"),
    [(0.001, 0, False, True), (0.05, 2**20, False, False), (0.05, 2**27, False, True), (0.001, 0, True, False)],
)
def test_a_sample_of_brief_or_large_calls_begins_with_one_that_is_not_timed(
    wait: float, peak: int, alone: bool, untimed: bool
) -> None:
    waits = list[float]()

    class Slow(Call):
        seconds = 0.0  # one call a sample

        def __call__(self) -> None:
            time.sleep(waits.pop() if waits else wait)

        def peak_memory(self, device: str) -> int:
            return peak

    one = Measured(Case("op", (), alone=alone), Side("a", lambda case: Slow()))
    one.prepare()
    assert one.warm == untimed
    waits.append(1.0)
    one.sample(rounds=1)
    assert not waits
    assert (one.samples[0] < 0.5) == untimed


class Waiting(Call):
    """Counts how often it was asked for a time, and tells when it is closed."""

    seconds = 0.0  # one call a sample

    def __init__(self, counts: list[int], wait: float, peak: int, repeats: bool, case: Case) -> None:
        self._counts, self._wait, self._peak, self.may_repeat, self.count = counts, wait, peak, repeats, 0

    def __call__(self) -> None:
        time.sleep(self._wait)

    def timed(self, calls: int, device: str) -> float:
        self.count += 1
        return super().timed(calls, device)

    def peak_memory(self, device: str) -> int:
        return self._peak

    def close(self) -> None:
        self._counts.append(self.count)


def measure(case: Case, sides: list[Side], quick: bool) -> list[Measured]:
    """What the sides did, of one test."""
    items: Any = [
        SimpleNamespace(
            nodeid=f"op[{side}]",
            callspec=SimpleNamespace(params={"case": case, "side": side}),
            get_closest_marker=lambda name: None,
        )
        for side in sides
    ]
    turns = Turns(items, quick, say=print)
    return [turns.measure(item, case, side) for item, side in zip(items, sides, strict=True)]


@pytest.mark.parametrize(
    ("wait", "peak", "repeats", "untimed"),
    [(0.001, 0, True, 1), (0.04, 0, True, 0), (0.04, 2**27, True, 1), (0.001, 0, False, 0)],
)
def test_all_sides_of_a_case_begin_with_an_untimed_call_or_none(
    wait: float, peak: int, repeats: bool, untimed: int
) -> None:
    case, counts = Case("op", ()), list[int]()
    sides = [Side(name, partial(Waiting, counts, w, p, repeats)) for name, w, p in (("a", wait, peak), ("b", 0.05, 0))]
    measured = measure(case, sides, quick=True)
    assert sorted(counts) == sorted(1 + len(one.samples) * (1 + untimed) for one in measured)  # one when prepared
    assert all(one.samples for one in measured)


@pytest.mark.parametrize(
    ("rounds", "seconds", "quick", "right"),
    [([17], 0.0, False, 3), ([17, 15], 0.0, False, 15), ([17, 15], 0.0, True, 3), ([17, 15], 1.0, False, 40)],
)
def test_a_case_has_as_many_rounds_as_do_for_its_calls(
    rounds: list[int], seconds: float, quick: bool, right: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Brief(Call):
        seconds = 0.0  # one call a sample

        def __init__(self, rounds: int, case: Case) -> None:
            self.rounds = rounds

        def __call__(self) -> None:
            pass

    monkeypatch.setattr("benchmarks.turns.SECONDS", seconds)
    monkeypatch.setattr("benchmarks.turns.QUICK_SECONDS", seconds)
    measured = measure(Case("op", ()), [Side(str(count), partial(Brief, count)) for count in rounds], quick)
    assert [len(one.samples) for one in measured] == [right] * len(rounds)


@pytest.mark.parametrize("lives", [1, 3])
def test_a_call_of_several_lives_is_made_anew_at_even_distances(lives: int) -> None:
    class Brief(Call):
        seconds = 0.0  # one call a sample

        def __init__(self, case: Case) -> None:
            self.lives, self.count = lives, 0
            made.append(self)

        def __call__(self) -> None:
            assert self not in closed
            self.count += 1

        def close(self) -> None:
            closed.append(self)

    made, closed = list[Brief](), list[Brief]()
    (one, _) = measure(Case("op", ()), [Side("a", Brief), Side("b", Brief)], quick=False)
    assert len(one.samples) == 40
    assert len(made) == len(closed) == 2 * lives
    # A later life is 13 rounds of an untimed and a timed call, after its first call.
    assert sorted(call.count for call in made)[:-2] == [1 + 13 * 2] * 2 * (lives - 1)


def test_what_was_done_ahead_does_not_make_samples_longer() -> None:
    """A loader hands over at once what it had ready; its usual speed says how many calls a second takes."""
    ahead = list[int]()

    class Loader(Elsewhere):
        seconds, calls = 0.2, 4

        def __call__(self) -> None:
            if ahead:
                ahead.pop()
            else:
                time.sleep(0.02)

        def settle(self) -> None:
            ahead[:] = [1, 2]

    one = Measured(Case("op", ()), Side("a", lambda case: Loader()))
    one.prepare()
    assert 4 <= one.calls <= 20  # not thousands
