"""What people see of a run: progress bar, log lines, metrics.jsonl and TensorBoard."""

import contextlib
import json
import logging
import os
import sys
import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from fastssl.engine.run_folder import RunFolder


class _Terminal(Console):
    """A console whose reader may go away: the training goes on into log.txt."""

    def on_broken_pipe(self) -> None:
        """Write what follows nowhere."""
        self.file = open(os.devnull, "w")


class _LogFile(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """Say nothing: a full disk has been told about where it matters."""


class Silence:
    """The logger of the processes that neither print nor write."""

    def __enter__(self) -> "Silence":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def say(self, text: str, warning: bool = False) -> None:
        """Nothing."""

    def metrics(self, step: int, **values: float) -> None:
        """Nothing."""

    def progress(self, step: int, **shown: str) -> None:
        """Nothing."""


class RunLogger:
    """Writes one run's metrics and shows its progress; use as a context manager.

    Args:
        run: where to write.
        total: steps of the whole training.
        step: at which it begins.
    """

    def __init__(self, run: RunFolder, total: int, step: int) -> None:
        self.run = run
        self.console = _Terminal(highlight=False, emoji=False)
        self._complained = False  # about a disk that cannot be written to
        self._board = SummaryWriter(str(run.tensorboard), purge_step=step + 1 if step else None)
        self._log = logging.getLogger("fastssl.run")
        self._log.setLevel(logging.INFO)
        self._log.propagate = False
        self._file = _LogFile(run.log, delay=True)
        self._file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self._log.addHandler(self._file)
        self._progress = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  kNN {task.fields[knn]}  {task.fields[speed]} images/s"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not sys.stdout.isatty(),  # in a pipe the log lines tell it
        )
        self._task = self._progress.add_task("", total=total, completed=step, epoch="-", loss="-", knn="-", speed="-")

    def __enter__(self) -> "RunLogger":
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._progress.stop()
        with contextlib.suppress(OSError):
            self._board.close()
        if error is not None:
            self._log.error("%s", error)
        self._log.removeHandler(self._file)
        self._file.close()

    def say(self, text: str, warning: bool = False) -> None:
        """A line for people: on the console and in log.txt."""
        self._log.log(logging.WARNING if warning else logging.INFO, text)
        self.console.print(text, style="yellow" if warning else None, markup=False, soft_wrap=True)

    def metrics(self, step: int, **values: float) -> None:
        """A row of metrics.jsonl, and the same in TensorBoard."""
        row: dict[str, Any] = {"step": step, **values, "time": time.time()}
        try:
            self.run.path.mkdir(exist_ok=True)
            with open(self.run.metrics, "a") as file:  # opened anew: the folder may have gone and come back
                file.write(json.dumps(row) + "\n")
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        except OSError as error:  # a full disk may be emptied; no reason to lose the training
            if not self._complained:
                self._complained = True
                self.say(f"cannot write to '{self.run.path}' ({error.strerror}); training goes on", warning=True)

    def progress(self, step: int, **shown: str) -> None:
        """Move the bar; `shown` may set epoch, loss, knn, speed."""
        self._progress.update(self._task, completed=step, **shown)  # type: ignore[arg-type]
