"""How long one waits at the start: for an import, a first op, the help, and the first step of the demo.

Each is a Python of its own, from its start to its end. The files come from the system's cache.
"""

import subprocess
import sys
from collections.abc import Callable

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.clocks import on_cpu
from benchmarks.peers import peer
from benchmarks.sides import Case, Side, grid
from benchmarks.turns import Measured, report

ROUNDS = 3

SHAPE = "import torch; q, k, queue = torch.randn(32, 128), torch.randn(32, 128), torch.randn(4096, 128)"
OURS = f"{SHAPE}; from fastssl.ops import info_nce; print(float(info_nce(q, k, queue, temperature=0.07)))"
THEIRS = f"{SHAPE}; from info_nce import info_nce; print(float(info_nce(q, k, queue, temperature=0.07)))"
FIRST_STEP = "from benchmarks.lightly_sides import Fastssl; print(Fastssl('moco', []).run('whole', 1))"


def python(*arguments: str, needs: tuple[str, str] | None = None) -> Callable[[Case], Callable[[], str]]:
    """Runs Python with these arguments and gives what it prints; `needs`: a module and its package."""

    def make(case: Case) -> Callable[[], str]:
        if needs is not None:
            peer(*needs)
        return lambda: subprocess.run([sys.executable, *arguments], check=True, capture_output=True, text=True).stdout

    return make


def case(what: str, quick: bool = False) -> Case:
    return Case("start-up", (("what", what),), quick=quick)


LIGHTLY = python("-c", "import lightly.loss, lightly.models.modules.heads", needs=("lightly", "lightly"))
STARTS = {
    case("import"): (
        Side("import torch", python("-c", "import torch"), role="bound", differs="nothing but torch"),
        Side("lightly", LIGHTLY),
        Side("fastssl", python("-c", "import fastssl.ops"), role="ours"),
    ),
    case("op"): (
        Side("info-nce-pytorch", python("-c", THEIRS, needs=("info_nce", "info-nce-pytorch"))),
        Side("fastssl", python("-c", OURS), role="ours"),
    ),
    case("help", quick=True): (Side("fastssl", python("-m", "fastssl.train", "moco", "--help"), role="ours"),),
    case("first step"): (Side("fastssl", python("-c", FIRST_STEP), role="ours", differs="MoCo's demo"),),
}
PARAMETERS = [parameter for one, sides in STARTS.items() for parameter in grid([one], sides)]


def check(case: Case, printed: str) -> None:
    """An import says nothing, an op a loss, the help what there is."""
    what = case["what"]
    if what == "import":
        assert printed == ""
    elif what == "help":
        assert "--queue_size" in printed
    else:
        assert 0 < float(printed.splitlines()[-1]) < 1000


@pytest.mark.parametrize(("case", "side"), PARAMETERS)
def test_start(benchmark: BenchmarkFixture, case: Case, side: Side) -> None:
    """Not in turns, which would take minutes: few rounds will do, for a start varies little."""
    measured, step = Measured(side), side.make(case)
    check(case, step())  # and brings the files into the cache
    measured.samples = [on_cpu(step, 1) for _ in range(ROUNDS)]
    report(benchmark, case, measured)
