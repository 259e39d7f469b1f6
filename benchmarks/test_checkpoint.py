"""Writing the state of MoCo with a ResNet-50, 0.37 GB, and reading it again.

The files lie in memory (/dev/shm) where there is such a folder: compared is the work of each side, not what the disk
happens to do, which comes on top for all, and all of it for those that wait for it.
"""

import functools
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from benchmarks.sides import Call, Case, Side, grid
from fastssl.engine import checkpoint
from fastssl.engine.build import build_method
from fastssl.engine.config import MoCoConfig, to_dict
from fastssl.engine.optimizers import make_optimizer

SIZE = 369_585_184  # of the state: told here, so that collecting the cases need not make it
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
# In turns with the ops, where no disk goes on writing while they are measured.
together = pytest.mark.together("ops") if MEMORY else lambda test: test


@functools.cache
def state() -> dict[str, Any]:
    """As the trainer saves it, with SGD's momentum buffers."""
    config = MoCoConfig()
    method = build_method(config, 1)
    optimizer = make_optimizer(method, config)
    for parameter in (p for p in method.parameters() if p.requires_grad):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    empty: dict[str, Any] = {key: {} for key in checkpoint.KEYS - {"format"}}
    return empty | {
        "method": config.method, "config": to_dict(config), "model": method.state_dict(),
        "optimizer": optimizer.state_dict(), "step": 1, "total_steps": 1, "world": 1, "processes": [],
    }  # fmt: skip


def tensors(value: Any) -> Iterator[Tensor]:
    """All in it, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from tensors(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from tensors(inner)


class InFolder(Call):
    """A call that is given a folder, which goes away with it.

    Args:
        call: gives the state that was read, or the path to which it was written.
    """

    def __init__(self, call: Callable[[Path], Any]) -> None:
        self._call, self._folder = call, tempfile.TemporaryDirectory(dir=MEMORY)
        self.path = Path(self._folder.name)

    def __call__(self) -> Any:
        return self._call(self.path)

    def close(self) -> None:
        self._folder.cleanup()


def ours(folder: Path) -> Path:
    checkpoint.save(folder / "state.pt", state())
    return folder / "state.pt"


def plain(folder: Path) -> Path:
    torch.save(state(), folder / "state.pt")
    return folder / "state.pt"


def synced(folder: Path) -> Path:
    with open(folder / "state.tmp", "wb") as file:
        torch.save(state(), file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(folder / "state.tmp", folder / "state.pt")
    return folder / "state.pt"


def distributed(folder: Path, wait: bool = True) -> Any:
    """torch's distributed checkpoint, by a single process; `wait`: until it is written."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is a single one, and that the last one is overwritten
        written = (save if wait else async_save)(dict(state()), checkpoint_id=folder / "state", no_dist=True)
    return folder / "state" if wait else written


def reading(read: Callable[[Path], Any]) -> Callable[[Case], InFolder]:
    def make(case: Case) -> InFolder:
        step = InFolder(lambda folder: read(folder / "state.pt"))
        checkpoint.save(step.path / "state.pt", state())
        return step

    return make


def check(case: Case, result: Any) -> None:
    """What is read, or what was written, is what there was."""
    found = result
    if isinstance(result, Path) and result.is_dir():
        found = checkpoint.copy_to_host(state())
        for tensor in tensors(found):
            tensor.zero_()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load(found, checkpoint_id=result, no_dist=True)
    elif isinstance(result, Path):
        found = torch.load(result, weights_only=True)
    found = {key: found[key] for key in state()}  # ours also has its format's number
    assert all(torch.equal(a, b) for a, b in zip(tensors(found), tensors(state()), strict=True))
    assert found["config"] == state()["config"] and found["step"] == state()["step"]


def case(what: str, quick: bool = False) -> Case:
    return Case("checkpoint", (("what", what),), bytes=SIZE, quick=quick)


WRITE = (
    Side("torch.save", lambda case: InFolder(plain), differs="neither atomic nor on the disk when it returns"),
    Side("torch.save, fsync and rename", lambda case: InFolder(synced)),
    Side("torch.distributed.checkpoint", lambda case: InFolder(distributed), differs="a folder in a format of its own"),
    Side("fastssl", lambda case: InFolder(ours), role="ours", differs="the folder is synced too"),
)
READ = (
    Side("torch.load", reading(functools.partial(torch.load, weights_only=True)), differs="checks no checksums"),
    Side("fastssl", reading(checkpoint.load), role="ours"),
)


@together
@pytest.mark.parametrize(("case", "side"), grid([case("write")], WRITE, check))
def test_write(turns: Callable[..., None], case: Case, side: Side) -> None:
    turns(case, side)


@together
@pytest.mark.parametrize(("case", "side"), grid([case("resume", quick=True)], READ, check))
def test_resume(turns: Callable[..., None], case: Case, side: Side) -> None:
    turns(case, side)


class Later(InFolder):
    """What a training waits for while a checkpoint is begun; the rest is waited for afterwards, and not timed.

    Args:
        begin: begins to write to a folder; gives what to wait for, which gives the path.
    """

    seconds = 0.0  # one call a sample: a second one would wait for the rest of the first
    rounds, lives = 15, 5  # the copy of one life takes 28 ms, of another 46

    def __init__(self, begin: Callable[[Path], Callable[[], Path]]) -> None:
        super().__init__(begin)
        self._written: list[Path] = []
        self._wait: Callable[[], Path]

    def __call__(self) -> list[Path]:
        """Begin; the list has the path once all is written."""
        self._wait = super().__call__()
        self._written.clear()
        return self._written

    def timed(self, calls: int, device: str) -> float:
        """Seconds, after a call that is not timed: new pages cost what the machine has done with them before."""
        self()
        self.settle()
        return super().timed(calls, device)

    def settle(self) -> None:
        self._written.append(self._wait())

    def peak_memory(self, device: str) -> int | None:
        """Not told: most of it is needed after the call."""
        return None


def ours_later(case: Case) -> Later:
    made = Later(lambda folder: save_later())
    checkpoints = checkpoint.CheckpointFolder(made.path)

    def save_later() -> Callable[[], Path]:
        checkpoints.save_later(state())
        return finished

    def finished() -> Path:
        path = checkpoints.finish()
        assert path is not None
        return path

    return made


def distributed_later(folder: Path) -> Callable[[], Path]:
    writing = distributed(folder, wait=False)

    def finished() -> Path:
        writing.result()
        return folder / "state"

    return finished


def plain_at_once(folder: Path) -> Callable[[], Path]:
    path = plain(folder)
    return lambda: path


LATER = (
    Side("torch.save", lambda case: Later(plain_at_once), differs="neither atomic nor on the disk when it returns"),
    Side("torch.distributed.checkpoint.async_save", lambda case: Later(distributed_later),
         differs="a folder in a format of its own"),
    Side("fastssl", ours_later, role="ours"),
)  # fmt: skip


def check_later(case: Case, written: list[Path]) -> None:
    check(case, written[0])


@together
@pytest.mark.parametrize(("case", "side"), grid([case("write, time the training waits")], LATER, check_later))
def test_wait(turns: Callable[..., None], case: Case, side: Side) -> None:
    turns(case, side)
