"""A run's folder: config.yaml, metrics.jsonl, log.txt, checkpoints/, tensorboard/ and at the end report.html."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastssl.engine.checkpoint import CheckpointFolder
from fastssl.engine.config import Config, to_yaml
from fastssl.errors import FastsslError
from fastssl.files import write_text

RUNS = Path("runs")
JOB = ".job"  # in a run folder: which job has written there last


class RunFolder:
    """Where one run writes; made by `open_run_folder`."""

    def __init__(self, path: Path, keep_checkpoints: int = 2) -> None:
        self.path = path
        self.checkpoints = CheckpointFolder(path / "checkpoints", keep_checkpoints)
        self.config, self.metrics, self.log = path / "config.yaml", path / "metrics.jsonl", path / "log.txt"
        self.tensorboard, self.report = path / "tensorboard", path / "report.html"

    def prepare(self, config: Config, step: int, job: str = "") -> None:
        """Write config.yaml and put aside what a run that goes on from `step` will write again.

        The metrics after `step` go, and a last line cut short by a crash; later checkpoints are renamed to *.pt.old.

        Args:
            config: of the run.
            step: at which it begins.
            job: whose run this is from now on; see `of_this_job`.

        Raises:
            FastsslError: it cannot be written.
        """
        try:
            self.checkpoints.folder.mkdir(parents=True, exist_ok=True)
            write_text(self.config, to_yaml(config))
            self.checkpoints.clean()
            self.checkpoints.set_aside_after(step)
            if self.metrics.exists():
                kept = [json.dumps(row) for row in read_metrics(self.metrics) if 0 < step >= row["step"]]
                write_text(self.metrics, "".join(line + "\n" for line in kept))
            write_text(self.path / JOB, job)
        except OSError as error:
            raise FastsslError(f"cannot write to the output folder '{self.path}' ({error.strerror or error})") from None


def of_this_job(config: Config, name: str, job: str) -> Config:
    """The configuration of processes that were started again: they go on with the run that their job has begun.

    If it died before it had a run folder, it is `config` as it stands, and what lies there is somebody else's.

    Args:
        config: as given.
        name: of the run.
        job: the same for all attempts of one job, and for no other.
    """
    resume = config.resume if Path(config.resume).parent.name == "checkpoints" else "auto"
    path = Path(config.output) if config.output else _default_output(resume, name)
    mark = path / JOB
    begun = bool(job) and mark.is_file() and mark.read_text() == job
    return replace(config, resume="auto", output=str(path)) if begun else config


def open_run_folder(config: Config, name: str) -> RunFolder:
    """Make the run folder, or find the one to resume.

    Args:
        config: with `output` and `resume`.
        name: of the run, for the default output runs/<name>-<number>.

    Raises:
        FastsslError: it cannot be written, or holds a run and no resume was asked for.
    """
    path = Path(config.output) if config.output else _default_output(config.resume, name)
    run = RunFolder(path, config.keep_checkpoints)
    goes_on = config.resume == "auto" or Path(config.resume).parent.resolve() == run.checkpoints.folder.resolve()
    if not goes_on and (run.checkpoints.paths() or run.metrics.exists() or run.config.exists()):
        raise FastsslError(f"'{path}' holds a run already: go on with --resume auto, or choose another --output")
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".writable"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        reason = error.strerror or error
        raise FastsslError(f"cannot write to the output folder '{path}' ({reason}): choose another --output") from None
    return run


def _default_output(resume: str, name: str) -> Path:
    if Path(resume).parent.name == "checkpoints":
        return Path(resume).parent.parent  # a checkpoint goes on in its own folder
    numbers = [int(m[1]) for p in RUNS.glob(f"{name}-*") if (m := re.fullmatch(rf"{re.escape(name)}-(\d+)", p.name))]
    if resume == "auto" and numbers:
        return RUNS / f"{name}-{max(numbers):03d}"
    return RUNS / f"{name}-{max(numbers, default=0) + 1:03d}"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; lines cut short by a crash or a full disk are left out."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows
