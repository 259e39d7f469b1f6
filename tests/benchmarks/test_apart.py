"""Processes of their own: what they keep, how they fail, and that a stopped one does not work ahead, or outlive us."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.apart import Apart, ApartCall


class Odd(Exception):
    """Cannot be sent: it is made of two things and keeps one."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(one + two)


class Counter:
    """Lives in another process."""

    def __init__(self, start: int) -> None:
        self.value = start

    def add(self, more: int) -> int:
        self.value += more
        return self.value

    def fail(self) -> None:
        raise SystemExit("meant")

    def reject(self) -> None:
        raise ValueError("no such number")

    def reject_oddly(self) -> None:
        raise Odd("one", "two")


class Ticking:
    """Has a worker of its own that writes for as long as it may."""

    def __init__(self, path: str) -> None:
        # In a group of its own, as those of our loaders.
        self._worker = subprocess.Popen([sys.executable, "-c", TICK, path], start_new_session=True)

    def name(self) -> int:
        return self._worker.pid

    def close(self) -> None:
        self._worker.kill()
        self._worker.wait()


class Missing:
    """Cannot be made."""

    def __init__(self) -> None:
        pytest.skip("no such package")


class Name(ApartCall):
    """Asks for the number of the worker."""

    def __call__(self) -> int:
        return int(self.peer("name"))


TICK = "import sys, time\nwhile True:\n    open(sys.argv[1], 'a').write('.')\n    time.sleep(0.01)"
DIES = """
import os, signal, sys
from benchmarks.apart import Apart, ApartCall
from tests.benchmarks.test_apart import Name, Ticking
if __name__ == "__main__":
    peer = Apart(Ticking, sys.argv[1])
    print(peer("name"), flush=True)
    Name(peer).rest()
    if sys.argv[2] == "both":
        os.kill(peer._process.pid, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def seen(what: Callable[[], bool], seconds: float = 10) -> bool:
    """Whether it comes true in time."""
    end = time.monotonic() + seconds
    while not what() and time.monotonic() < end:
        time.sleep(0.02)
    return what()


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def state(pid: int) -> str:
    """T: stopped; Z or nothing: dead."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


@pytest.mark.parametrize("on_gpu", [False, True])
def test_keeps_what_it_made(on_gpu: bool) -> None:
    with Apart(Counter, 3, on_gpu=on_gpu) as counter:
        assert counter("add", 1) == 4
        assert counter("add", 2) == 6


def test_the_end_of_a_process_is_told() -> None:
    with Apart(Counter, 3) as counter, pytest.raises(EOFError):
        counter("fail")


def test_what_is_raised_there_is_raised_here_and_the_process_goes_on() -> None:
    with Apart(Counter, 3) as counter:
        with pytest.raises(ValueError, match="no such number") as raised:
            counter("reject")
        assert "in reject" in str(raised.value.__cause__)  # where
        with pytest.raises(RuntimeError, match="Odd: onetwo"):
            counter("reject_oddly")
        assert counter("add", 1) == 4


def test_what_cannot_be_made_there_is_skipped_here() -> None:
    with Apart(Missing) as missing, pytest.raises(pytest.skip.Exception, match="no such package"):
        missing("add", 1)


def test_nobody_works_while_it_is_not_his_turn(tmp_path: Path) -> None:
    ticks = tmp_path / "ticks"
    call = Name(Apart(Ticking, str(ticks)))
    worker = call()
    assert seen(lambda: size(ticks) > 0)
    call.rest()
    assert seen(lambda: state(worker) == "T")
    before = size(ticks)
    time.sleep(0.2)
    assert size(ticks) == before
    call.wake()
    assert seen(lambda: size(ticks) > before)
    call.rest()
    call.close()  # although it is stopped
    assert seen(lambda: state(worker) in ("", "Z"))


@pytest.mark.parametrize("dies", ["main", "both"])
def test_a_stopped_one_does_not_outlive_us(tmp_path: Path, dies: str) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", DIES, str(tmp_path / "ticks"), dies]
    paths = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=root, env=paths, capture_output=True, text=True, timeout=60)
    worker = int(done.stdout)
    assert seen(lambda: state(worker) in ("", "Z"), 20), state(worker)
