"""How long one waits at the start: for an import, a first op, the help, and the first step of the demo.

Each is a Python of its own, from its start to its end. The files come from the system's cache.
"""

import subprocess
import sys
from collections.abc import Callable

import pytest

from benchmarks.peers import peer
from benchmarks.sides import Case, Elsewhere, Side, grid

SHAPE = "import torch; q, k, queue = torch.randn(32, 128), torch.randn(32, 128), torch.randn(4096, 128)"
OURS = f"{SHAPE}; from fastssl.ops import info_nce; print(float(info_nce(q, k, queue, temperature=0.07)))"
THEIRS = f"{SHAPE}; from info_nce import info_nce; print(float(info_nce(q, k, queue, temperature=0.07)))"
FIRST_STEP = "from benchmarks.lightly_sides import Fastssl; print(Fastssl('moco', []).run('whole', 1))"


class Python(Elsewhere):
    """A run of Python, which gives what it prints.

    Args:
        arguments: of the interpreter.
    """

    rounds = 4  # a start takes seconds and varies little
    cold = True

    def __init__(self, *arguments: str) -> None:
        self._command = [sys.executable, *arguments]

    def __call__(self) -> str:
        return subprocess.run(self._command, check=True, capture_output=True, text=True).stdout


def python(*arguments: str, needs: tuple[str, str] | None = None) -> Callable[[Case], Python]:
    """Makes a run with these arguments; `needs`: a module and its package."""

    def make(case: Case) -> Python:
        if needs is not None:
            peer(*needs)
        return Python(*arguments)

    return make


def check(case: Case, printed: str) -> None:
    """An import says nothing, an op a loss, the help what there is."""
    what = case["what"]
    if what == "import":
        assert printed == ""
    elif what == "help":
        assert "--queue_size" in printed
    else:
        assert 0 < float(printed.splitlines()[-1]) < 1000


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
PARAMETERS = [parameter for one, sides in STARTS.items() for parameter in grid([one], sides, check)]


@pytest.mark.parametrize(("case", "side"), PARAMETERS)
def test_start(turns: Callable[..., None], case: Case, side: Side) -> None:
    turns(case, side)
