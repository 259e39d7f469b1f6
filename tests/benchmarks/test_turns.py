"""The sides of a case take turns; what fails is the affair of the side that failed."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

pytest_plugins = ["pytester"]

SUITE = """
from pathlib import Path
import pytest
from benchmarks.sides import Case, Side, grid, unavailable

LOG = Path(__file__).with_name("log")

class Step:
    def __init__(self, name, seconds=0.01):
        self.name = name
    def __call__(self):
        import time
        with LOG.open("a") as file:
            file.write(self.name)
        time.sleep(0.02)
        return {"wrong": 2}.get(self.name, 1)
    def close(self):
        with LOG.open("a") as file:
            file.write(self.name.upper())

def dies(case):
    count = 0
    def step():
        nonlocal count
        count += 1
        if count > 5:
            raise RuntimeError("it died")
        return 1
    return step

def missing(case):
    unavailable("the peer is not installed")

def check(case, result):
    assert result == 1

CASES = [Case("op", (("N", 4),), quick=True), Case("op", (("N", 4),), "cuda")]
SIDES = (
    Side("a", lambda case: Step("a")), Side("b", lambda case: Step("b"), role="ours"),
    Side("wrong", lambda case: Step("wrong")), Side("dies", dies), Side("missing", missing),
)

@pytest.mark.parametrize(("case", "side"), grid(CASES, SIDES))
def test_it(turns, case, side):
    turns(case, side, check)
"""


@pytest.fixture
def suite(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    for name in [name for name in os.environ if name.startswith("PYTEST_XDIST")]:
        monkeypatch.delenv(name)  # several processes would switch the benchmarks off
    root = Path(__file__).parents[2]
    pytester.makeconftest((root / "benchmarks" / "conftest.py").read_text())
    pytester.makepyfile(test_suite=SUITE)
    pytester.makeini("[pytest]\nmarkers =\n    gpu: x\n    quick: x\n")
    pytester.syspathinsert(root)
    return pytester


def run(suite: pytest.Pytester, *arguments: str) -> tuple[dict[str, int], dict[str, Any]]:
    file = suite.path / "run.json"
    done = suite.runpytest_inprocess(
        "-p", "no:cacheprovider", "-p", "no:xdist", "--quick", f"--benchmark-json={file}", *arguments
    )
    return done.parseoutcomes(), json.loads(file.read_text()) if file.stat().st_size else {}


def test_turns_failures_and_skips(suite: pytest.Pytester) -> None:
    outcomes, found = run(suite)
    assert {name: outcomes[name] for name in ("passed", "failed", "skipped", "deselected")} == {
        "passed": 2, "failed": 2, "skipped": 1, "deselected": 5,
    }  # fmt: skip
    assert [row["extra_info"]["side"] for row in found["benchmarks"]] == ["a", "b"]
    assert all(0.019 < row["stats"]["median"] < 0.2 for row in found["benchmarks"])
    (skipped,) = found["skipped"]
    assert (skipped["side"], skipped["reason"]) == ("missing", "the peer is not installed")
    log = (suite.path / "log").read_text().replace("wrong", "").replace("WRONG", "")
    assert log.endswith("ababAB")  # in turns at the end, closed once


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
