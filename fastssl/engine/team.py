"""The processes of one training: which one this is, and what they say to each other beside gradients and keys."""

import datetime
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from fastssl.engine.device import select_device
from fastssl.errors import FastsslError

TIMEOUT = datetime.timedelta(minutes=10)  # for another process to take part in a collective of a step
PATIENCE = datetime.timedelta(hours=12)  # while process 0 evaluates or writes


@dataclass(frozen=True)
class Team:
    """One process among `world`; by itself if nothing else is said.

    Args:
        device: of this process.
        rank, world: number of this process and count of all.
        restarts: how often the processes have been started anew because some had died.
        control: a gloo group for messages between the hosts, or None for one process.
        job: of which all processes and restarts are; "" for one that nobody would start again.
        died_of: what ended the processes before these, in words.
    """

    device: torch.device
    rank: int = 0
    world: int = 1
    restarts: int = 0
    control: dist.ProcessGroup | None = None
    job: str = ""
    died_of: str = ""

    @property
    def leads(self) -> bool:
        """Whether this process prints, writes and evaluates."""
        return self.rank == 0

    def wait(self) -> None:
        """Return when all processes are here; may take hours."""
        if self.control is not None:
            dist.barrier(self.control)

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, on each of them."""
        if self.control is None:
            return [value]
        values = [None] * self.world
        dist.all_gather_object(values, value, self.control)
        return values

    def share(self, value: Any) -> Any:
        """The value of process 0, on all of them; an error of it, given as a value, is raised on all."""
        if self.control is not None:
            box = [value]
            dist.broadcast_object_list(box, 0, self.control)
            value = box[0]
        if isinstance(value, BaseException):
            raise value
        return value

    def numbers(self, values: Sequence[float]) -> list[list[float]]:
        """A row of numbers of each process, on all of them."""
        if self.control is None:
            return [list(values)]
        own = torch.tensor(list(values), dtype=torch.float64, device="cpu")
        rows = [torch.empty_like(own) for _ in range(self.world)]
        dist.all_gather(rows, own, self.control)
        return torch.stack(rows).tolist()

    def highest(self, values: Sequence[int]) -> "Highest":
        """Ask for the highest of each value over all processes; the answer may be read later."""
        return Highest(values, self.control)


class Highest:
    """An exchange under way: meanwhile the step goes on."""

    def __init__(self, values: Sequence[int], group: dist.ProcessGroup | None) -> None:
        self._values = torch.tensor(list(values), dtype=torch.int64, device="cpu")
        self._work = None if group is None else dist.all_reduce(self._values, dist.ReduceOp.MAX, group, async_op=True)

    def wait(self) -> list[int]:
        """The highest values."""
        if self._work is not None:
            self._work.wait()
        return self._values.tolist()


@contextmanager
def joined(gpus: int | None, procs: int | None, job: str = "", died_of: str = "") -> Iterator[Team]:
    """Meet the other processes that the environment tells of (torchrun's variables), or be alone.

    Args:
        gpus: the option.
        procs: the option.
        job: see `Team`.
        died_of: see `Team`.

    Raises:
        FastsslError: the environment is incomplete, or does not fit the options or the machine.
    """
    if "RANK" not in os.environ:
        yield Team(select_device(0 if procs is not None else gpus))
        return
    rank, world, local_rank, local_world = (
        _number(n) for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    )
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise FastsslError(f"the environment has RANK, but not {name}: start with torchrun, srun or --gpus")
    wanted = procs if procs is not None else gpus
    if wanted and wanted != local_world:
        option = "gpus" if procs is None else "procs"
        raise FastsslError(
            f"{option} {wanted}, but {local_world} processes were started on this machine: start {wanted} "
            f"(torchrun --nproc-per-node {wanted}, srun --ntasks-per-node {wanted}), or leave --{option} out"
        )
    on_gpus = procs is None and gpus != 0 and torch.cuda.is_available()
    device = select_device(1 if on_gpus else 0, local_rank)
    if on_gpus:
        torch.cuda.set_device(device)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world))
    restarts = _number("TORCHELASTIC_RESTART_COUNT", 0)
    if world == 1:
        yield Team(device, restarts=restarts, job=job, died_of=died_of)
        return
    dist.init_process_group(
        "nccl" if on_gpus else "gloo", timeout=TIMEOUT, rank=rank, world_size=world,
        device_id=device if on_gpus else None,
    )  # fmt: skip
    control = dist.new_group(backend="gloo", timeout=PATIENCE)
    assert isinstance(control, dist.ProcessGroup)
    yield Team(device, rank, world, restarts, control, job, died_of)
    dist.destroy_process_group()  # not after an error: the others may be waiting in a collective


def _number(name: str, default: int | None = None) -> int:
    text = os.environ.get(name, "" if default is None else str(default))
    if not text.isdigit():
        raise FastsslError(f"the environment has RANK, but {name} is {text!r}: start with torchrun, srun or --gpus")
    return int(text)
