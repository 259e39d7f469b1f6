"""Checkpoints: written whole or not at all, and read back only if they are whole."""

import re
import shutil
import zipfile
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastssl.engine.config import IDENTITY, PLACE, Config, to_dict
from fastssl.errors import FastsslError
from fastssl.files import atomic_write

FORMAT = 3  # raised when an older reader could not understand the file
KEYS = {
    "format",
    "method",
    "config",
    "model",
    "optimizer",
    "step",
    "total_steps",
    "data",
    "world",
    "processes",
    "training_step",
    "alarms",
}


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write `state` to `path` so that a crash at any moment leaves the old file or the new one, never half of one.

    Raises:
        FastsslError: it cannot be written (disk full, folder gone); nothing that was there before is touched.
    """
    try:
        with atomic_write(path) as file:
            torch.save({"format": FORMAT, **state}, file)
    except (OSError, RuntimeError) as error:  # torch.save turns some write errors into RuntimeError
        reason = " ".join(str(error).split())
        with suppress(OSError):
            reason += f"; {shutil.disk_usage(path.parent).free / 2**20:,.0f} MiB are free there"
        raise FastsslError(f"cannot write the checkpoint '{path}' ({reason})") from None


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint (weights_only: it can hold tensors and plain values, no code).

    Raises:
        FastsslError: there is none, it is damaged, or it is not one of fastssl's.
    """
    if not path.is_file():
        raise FastsslError(f"there is no checkpoint '{path}'")
    try:
        with zipfile.ZipFile(path) as archive:
            if (part := archive.testzip()) is not None:  # torch.load does not look at the checksums
                raise zipfile.BadZipFile(f"bad checksum of {part}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged pickle raises is anybody's guess
        reason = str(error).split("\n")[0][:100]
        raise FastsslError(f"the checkpoint '{path}' is damaged or not a checkpoint ({reason})") from None
    if isinstance(state, dict) and state.get("format", FORMAT) != FORMAT:
        raise FastsslError(f"'{path}' has format {state['format']}, this version of fastssl reads format {FORMAT}")
    if not isinstance(state, dict) or not state.keys() >= KEYS:
        raise FastsslError(f"'{path}' is not a checkpoint of fastssl.train")
    return state


def check_fits(path: Path, state: Mapping[str, Any], config: Config) -> None:
    """Refuse a checkpoint of another method, network, optimizer or place in the data.

    Raises:
        FastsslError: naming the first difference and how to proceed.
    """
    if state["method"] != config.method:
        raise FastsslError(
            f"'{path}' is a checkpoint of {state['method']}, this is {config.method}: "
            f"use `fastssl.train {state['method']}`, or another --output"
        )
    for name, (there, here) in changes(state, config).items():
        if name in IDENTITY or name in PLACE:
            raise FastsslError(
                f"'{path}' was trained with {name} {there}, here it is {here}: use --{name} {there}, or a new --output"
            )


def check_data(path: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that was trained on other images or other views of them: its place in the data is void.

    Args:
        path: of the checkpoint.
        there: its `fastssl.data.identity` and executor.
        here: the same of this run.

    Raises:
        FastsslError: naming the first difference and how to proceed.
    """
    anew = "or start anew with another --output"
    if there["images"] != here["images"]:
        raise FastsslError(
            f"'{path}' was trained on {there['images']} images, there are {here['images']} now: bring those images "
            f"back (--exclude is for a new run), {anew}"
        )
    if there["names"] != here["names"]:
        raise FastsslError(f"'{path}' was trained on as many images, but not on these: bring those images back, {anew}")
    if there["views"] != here["views"]:
        raise FastsslError(f"'{path}' was trained with another augmentation: bring that one back, {anew}")
    for option in ("loader", "color"):
        if there.get(option) != here.get(option):
            raise FastsslError(
                f"'{path}' was trained with --{option} {there.get(option)}, which makes other views from the same seed "
                f"than {here.get(option)}: use --{option} {there.get(option)}, {anew}"
            )


def changes(state: Mapping[str, Any], config: Config) -> dict[str, tuple[Any, Any]]:
    """The fields in which `config` differs from the checkpoint's, with both values."""
    there, here = state["config"], to_dict(config)
    return {name: (there[name], value) for name, value in here.items() if name in there and there[name] != value}


def step_of(path: Path) -> int:
    """The step in a checkpoint's name, step-<step>.pt."""
    return int(path.stem.split("-")[1])


def copy_to_host(state: Any) -> Any:
    """A copy in the host's memory that what happens next does not change; waits once for the GPU, if there is one."""
    copied = _copied(state)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return copied


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        if value.device.type == "cpu":
            return value.clone()
        return torch.empty_like(value, device="cpu", pin_memory=True).copy_(value, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: _copied(inner) for key, inner in value.items()}
    return [_copied(inner) for inner in value] if isinstance(value, (list, tuple)) else value


class CheckpointFolder:
    """The checkpoints of one run, named by step, written by a thread while the training goes on.

    Args:
        folder: where they lie.
        keep: the newest ones that are kept.
        milestones: those of steps that it divides are kept for good; 0: none.
    """

    def __init__(self, folder: Path, keep: int = 2, milestones: int = 0) -> None:
        self.folder, self.keep, self.milestones = folder, keep, milestones
        self._thread = ThreadPoolExecutor(1, "checkpoint")  # Python waits for it at its end
        self._writing: Future[Path] | None = None

    def paths(self) -> list[Path]:
        """All checkpoints, oldest first."""
        found = [p for p in self.folder.glob("step-*.pt") if re.fullmatch(r"step-\d+\.pt", p.name)]
        return sorted(found, key=step_of)

    def save(self, state: Mapping[str, Any]) -> Path:
        """Write the state as step-<step>.pt, then delete what is older than the newest `keep`."""
        path = self.folder / f"step-{state['step']:09d}.pt"
        save(path, state)
        for old in self.paths()[: -self.keep]:
            if not self.milestones or step_of(old) % self.milestones:
                old.unlink(missing_ok=True)
        return path

    def save_later(self, state: Mapping[str, Any]) -> None:
        """Copy the state, and save the copy while the caller goes on.

        Raises:
            FastsslError: the one before could not be written; this one is being written nevertheless.
        """
        before, copied = self._writing, copy_to_host(state)
        try:
            if before is not None:
                before.result()
        finally:
            self._writing = self._thread.submit(self.save, copied)

    def finish(self) -> Path | None:
        """Wait for the checkpoint under way; its path, or None if there is none.

        Raises:
            FastsslError: it could not be written.
        """
        writing, self._writing = self._writing, None
        return None if writing is None else writing.result()

    def clean(self) -> None:
        """Delete what a killed process has left of a file that it was writing."""
        for part in self.folder.glob("*.tmp"):
            part.unlink(missing_ok=True)

    def set_aside_after(self, step: int) -> None:
        """Rename later checkpoints, so that none of an abandoned course is taken for the newest."""
        for path in self.paths():
            if step_of(path) > step:
                path.rename(path.with_name(path.name + ".old"))

    def newest(self) -> tuple[Path, dict[str, Any], list[str]] | None:
        """The newest checkpoint that can be read, its state, and what was wrong with newer ones.

        Raises:
            FastsslError: there are checkpoints and none can be read.
        """
        complaints: list[str] = []
        for path in reversed(self.paths()):
            try:
                return path, load(path), complaints
            except FastsslError as error:
                complaints.append(str(error))
        if complaints:
            raise FastsslError(f"no checkpoint in '{self.folder}' can be read: {complaints[0]}")
        return None
