"""Several processes for tests of what is distributed; they are forked from one that has imported torch already."""

import datetime
import multiprocessing
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

multiprocessing.set_forkserver_preload(["torch", "torch.distributed", "fastssl.methods"])


def run(function: Callable[..., None], world: int, *arguments: Any) -> None:
    """Call ``function(rank, *arguments)`` in `world` processes; the first error of one is raised here."""
    start_processes(function, arguments, nprocs=world, start_method="forkserver")


def meet(rank: int, world: int, meeting: str, seconds: float = 60, backend: str = "gloo") -> None:
    """Make the default process group; `meeting` is the path of a file that does not exist yet."""
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=seconds)
    dist.init_process_group(backend, init_method=f"file://{meeting}", rank=rank, world_size=world, timeout=timeout)
