"""Things that are timed in processes of their own: with their own allocator, threads and workers."""

import os
import signal
import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.sides import Call

# Imported once, by the server that processes are forked from: it has no threads, loaders or allocator settings yet.
PRELOADED = ["benchmarks.lightly_sides", "benchmarks.lightly_moco", "benchmarks.lightly_byol", "fastssl.data.loader"]


class Apart(AbstractContextManager["Apart"]):
    """Something that lives in a process of its own, with its own allocator, threads and workers.

    Args:
        make: what to make there; it may have a method ``close``.
        arguments: of `make`.
        on_gpu: whether it will use CUDA: the process is a fresh one then, for importing DALI has set CUDA up in the
            server that others are forked from, and that does not survive a fork.

    Raises:
        EOFError: at a call, when the process has failed, which says why on stderr.
    """

    def __init__(self, make: Callable[..., Any], *arguments: Any, on_gpu: bool = False) -> None:
        context: Any = get_context("spawn" if on_gpu else "forkserver")
        if not on_gpu:
            context.set_forkserver_preload(PRELOADED)
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, arguments))
        self._process.start()
        theirs.close()  # so that its end is seen here
        self._pipe.recv()
        # Ends the process and its workers once we are gone, however we went: one that is stopped would wait for ever.
        guard = 'read _; kill -KILL -"$1" 2> /dev/null'
        self._guard = subprocess.Popen(["sh", "-c", guard, "sh", str(self._process.pid)], stdin=subprocess.PIPE)

    def __call__(self, name: str, *arguments: Any) -> Any:
        """Call a method there, and wait for what it returns."""
        self._pipe.send((name, arguments))
        return self._pipe.recv()

    def pause(self) -> None:
        """Stop the process and its workers where they are."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let them go on."""
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        """End the process, and what is left of its workers."""
        self.resume()
        self._pipe.close()
        self._process.join(timeout=20)
        self._guard.communicate()
        self._process.join()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):  # it has failed, and the next call says so
            os.killpg(self._process.pid, number)


class ApartCall(Call):
    """Calls into a process that stands still while it is not its turn, so that loaders do not work ahead.

    Args:
        peer: the process.
        pauses: whether it can be stopped: what a GPU was given to do would go on.
    """

    def __init__(self, peer: Apart, pauses: bool = True) -> None:
        self.peer, self._pauses = peer, pauses

    def wake(self) -> None:
        if self._pauses:
            self.peer.resume()

    def rest(self) -> None:
        if self._pauses:
            self.peer.pause()

    def peak_memory(self, device: str) -> int | None:
        """Of the other process, and not known here."""
        return None

    def close(self) -> None:
        self.peer.close()


def _serve(pipe: Connection, make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.setpgrp()  # its workers will be of the group
    pipe.send("ready")
    made = make(*arguments)
    while True:
        try:
            name, given = pipe.recv()
        except EOFError:
            break
        pipe.send(getattr(made, name)(*given))
    if hasattr(made, "close"):
        made.close()
