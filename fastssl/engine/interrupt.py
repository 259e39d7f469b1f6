"""Ctrl-C, SIGTERM and SIGHUP as a wish: the loop finishes its step, saves and ends."""

import signal
from types import FrameType


class Interrupt:
    """A context in which `requested` turns true at the first SIGINT, SIGTERM or SIGHUP.

    Args:
        patient: a second signal changes nothing: an agent sends its own after the user's, and kills when it is tired of
            waiting. Otherwise a second one ends the process at once.

    Example:
        >>> with Interrupt() as interrupt:
        ...     bool(interrupt.requested)
        False
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self, patient: bool = False) -> None:
        self.patient = patient
        self.requested: signal.Signals | None = None

    def __enter__(self) -> "Interrupt":
        heeded = [s for s in self.SIGNALS if signal.getsignal(s) is not signal.SIG_IGN]  # nohup ignores SIGHUP
        self._previous = {s: signal.signal(s, self._note) for s in heeded}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = self.requested or signal.Signals(number)
        if not self.patient:
            self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
