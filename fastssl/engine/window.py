"""The steps between two lines of metrics: their losses, and the time that training took."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Window:
    """Collects steps until `close`; what a checkpoint needs of it are the losses."""

    def __init__(self) -> None:
        self._old: list[float] = []  # of steps before a resume
        self._new: list[Tensor] = []
        self._mark, self._seconds = time.perf_counter(), 0.0

    def start(self) -> None:
        """Training begins, or goes on."""
        self._mark = time.perf_counter()

    def add(self, loss: Tensor) -> None:
        """One more step; its loss stays on the device."""
        self._new.append(loss)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside takes no time of the training."""
        self._seconds += time.perf_counter() - self._mark
        yield
        self._mark = time.perf_counter()

    def losses(self) -> list[float]:
        """Of every step in the window; waits for the device."""
        return self._old + (torch.stack(self._new).tolist() if self._new else [])

    def restore(self, losses: list[float]) -> None:
        """Go on with a window that had these losses."""
        self._old, self._new = losses, []

    def close(self) -> tuple[float, int, int, float]:
        """Sum and count of the finite losses, count and seconds of the steps of this process; then begin anew."""
        finite = [loss for loss in self.losses() if math.isfinite(loss)]  # waits for the device, so the time is true
        with self.paused():
            taken = math.fsum(finite), len(finite), len(self._new), self._seconds
        self._old, self._new, self._seconds = [], [], 0.0
        return taken
