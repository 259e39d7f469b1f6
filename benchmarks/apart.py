"""Things that are timed in processes of their own: with their own allocator, threads and workers."""

import atexit
import functools
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from operator import methodcaller
from typing import Any

import psutil
import pytest

from benchmarks.sides import Elsewhere

Answer = tuple[str, Any]  # "returned" and a value, "raised" and an error with its traceback, "skipped" and why

# Imported once, by the server that processes are forked from: it has no threads, loaders or allocator settings yet.
PRELOADED = [
    "benchmarks.lightly_sides", "benchmarks.lightly_moco", "benchmarks.lightly_byol", "benchmarks.test_info_nce",
    "fastssl.data.loader", "benchmarks.shared_pages",
]  # fmt: skip

# Ends the processes that it was told of once we are gone, however we went: stopped ones would wait for ever.
GUARD = """
import sys, psutil
from contextlib import suppress
family = {}
for line in sys.stdin:
    for pid in map(int, line.split()):
        with suppress(psutil.NoSuchProcess):
            family[pid] = psutil.Process(pid)  # the newest of that number
for process in family.values():
    with suppress(psutil.NoSuchProcess):  # it knows if the number was given to another
        process.kill()
"""


@functools.cache
def _guard() -> subprocess.Popen[str]:
    """Told whom to end, in a session of its own, where no ctrl-c comes."""
    guard = subprocess.Popen([sys.executable, "-c", GUARD], stdin=subprocess.PIPE, text=True, start_new_session=True)
    atexit.register(guard.communicate)  # its end comes before multiprocessing waits for those that nobody closed
    return guard


class Apart(AbstractContextManager["Apart"]):
    """Something that lives in a process of its own, with its own allocator, threads and workers.

    Neither the process nor its workers outlive us.

    Args:
        make: what to make there; it may have a method ``close``.
        arguments: of `make`.
        on_gpu: whether it will use CUDA: the process is a fresh one then, for importing DALI has set CUDA up in the
            server that others are forked from, and that does not survive a fork.

    Raises:
        EOFError, BrokenPipeError: at a call, when the process has ended, which may have said why on stderr.
        Exception: at a call, what it raised there, or `make` before it; pytest's request to skip too.
    """

    def __init__(self, make: Callable[..., Any], *arguments: Any, on_gpu: bool = False) -> None:
        context: Any = get_context("spawn" if on_gpu else "forkserver")
        if not on_gpu:
            context.set_forkserver_preload(PRELOADED)
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, arguments))
        self._process.start()
        theirs.close()  # so that its end is seen here
        self._first = psutil.Process(self._process.pid)
        self._family: list[psutil.Process] = []
        self._know([self._first])

    def __call__(self, name: str, *arguments: Any) -> Any:
        """Call a method there, and wait for what it returns."""
        self._pipe.send((name, arguments))
        how, what = self._pipe.recv()
        if how == "skipped":
            pytest.skip(what)
        if how == "raised":
            error, where = what
            raise error from RuntimeError(f"in another process:\n{where}")
        return what

    def pause(self) -> None:
        """Stop the process and its workers where they are."""
        self._all(psutil.Process.suspend)  # at once; looking for new ones takes milliseconds
        self._look()
        self._all(psutil.Process.suspend)

    def resume(self) -> None:
        """Let them go on."""
        self._all(psutil.Process.resume)

    def close(self) -> None:
        """End the process."""
        self.resume()
        self._look()
        self._pipe.close()
        self._process.join(timeout=20)
        self._all(psutil.Process.kill)  # it, or workers that it has left
        self._process.join()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _look(self) -> None:
        """For workers that it has got since."""
        with suppress(psutil.NoSuchProcess):  # it has failed, and the next call says so
            self._know([self._first, *self._first.children(recursive=True)])

    def _know(self, family: list[psutil.Process]) -> None:
        if family != self._family:
            self._family = family
            print(*(one.pid for one in family), file=_guard().stdin, flush=True)

    def _all(self, do: Callable[[psutil.Process], None]) -> None:
        for process in self._family:
            with suppress(psutil.NoSuchProcess):
                do(process)


class ApartCall(Elsewhere):
    """Calls into a process, which can be made to stand still while it is not its turn: loaders would work ahead.

    Args:
        peer: the process.
        pauses: whether it is. What a GPU was given to do would go on; an op has nothing to do.
    """

    def __init__(self, peer: Apart, pauses: bool = True) -> None:
        self.peer, self._pauses = peer, pauses

    def wake(self) -> None:
        if self._pauses:
            self.peer.resume()

    def rest(self) -> None:
        if self._pauses:
            self.peer.pause()

    def close(self) -> None:
        self.peer.close()


def _serve(pipe: Connection, make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Answer calls with what they return or raise."""
    first = how, made = _answer(make, *arguments)
    while True:
        try:
            name, given = pipe.recv()
        except EOFError:
            break
        pipe.send(_answer(methodcaller(name, *given), made) if how == "returned" else first)
    if hasattr(made, "close"):
        made.close()


def _answer(do: Callable[..., Any], *arguments: Any) -> Answer:
    """Tracebacks are not sent; nor can some errors be, or pytest's request to skip."""
    try:
        return "returned", do(*arguments)
    except pytest.skip.Exception as request:
        return "skipped", str(request)
    except Exception as error:
        where = traceback.format_exc()
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            return "raised", (RuntimeError(f"{type(error).__name__}: {error}"), where)
        return "raised", (error.with_traceback(None), where)
