"""The batches of an epoch, fetched one ahead, so that all processes agree to go on before any of them steps."""

import time
from collections.abc import Callable, Iterator

from torch import Tensor

from fastssl.engine.team import Highest, Team
from fastssl.errors import DataError


class Stop(Exception):
    """All processes end after the same step.

    Args:
        signal: number of the signal that one of them got, or 0.
        failed: whether one of them has a reason to end, or has met a damaged image.
        error: of this process's image.
    """

    def __init__(self, signal: int, failed: bool, error: DataError | None) -> None:
        super().__init__(signal, failed, error)
        self.signal, self.failed, self.error = signal, failed, error


class Feed:
    """Iterate over it for the views of each step.

    A process that ended by itself would leave the others waiting in a collective, without a checkpoint. So before each
    step all of them say whether they can make the next one; the answer travels while the step is made.

    Args:
        batches: of this process; the same number on all.
        team: the processes.
        wishes: gives the signal that this process got (or 0), and whether it has another reason to end.

    Attributes:
        seconds: that this process has waited for batches.

    Raises:
        Stop: while iterating, when one of the processes has to end.
    """

    def __init__(self, batches: Iterator[list[Tensor]], team: Team, wishes: Callable[[], tuple[int, bool]]) -> None:
        self.batches, self.team, self.wishes = batches, team, wishes
        self.seconds = 0.0

    def __iter__(self) -> Iterator[list[Tensor]]:
        upcoming, agreed = self._fetch()
        while True:
            signal, failed = agreed.wait()
            if signal or failed:
                raise Stop(signal, bool(failed), upcoming if isinstance(upcoming, DataError) else None)
            if upcoming is None:
                return
            assert not isinstance(upcoming, DataError)
            views = upcoming
            upcoming, agreed = self._fetch()
            yield views

    def _fetch(self) -> tuple[list[Tensor] | DataError | None, Highest]:
        batch: list[Tensor] | DataError | None
        start = time.perf_counter()
        try:
            batch = next(self.batches, None)
        except DataError as error:
            batch = error
        self.seconds += time.perf_counter() - start
        signal, wants_to_end = self.wishes()
        return batch, self.team.highest([signal, wants_to_end or isinstance(batch, DataError)])
