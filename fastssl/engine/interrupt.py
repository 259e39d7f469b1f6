"""Ctrl-C and SIGTERM as a wish: the loop finishes its step, saves and ends. A second one ends at once."""

import signal
from types import FrameType


class Interrupt:
    """A context in which `requested` turns True at the first SIGINT or SIGTERM.

    Example:
        >>> with Interrupt() as interrupt:
        ...     bool(interrupt.requested)
        False
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None

    def __enter__(self) -> "Interrupt":
        self._previous = {s: signal.signal(s, self._note) for s in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = signal.Signals(number)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
