"""Shuffle-BN over 2 and 4 gloo processes, beside the code of MoCo's authors and a bare all-to-all.

Over NCCL the processes need a GPU each; `gpu-check` has one.
"""

import multiprocessing
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.sides import Case, Elsewhere, Side, grid
from fastssl.ops import shuffle_batch
from fastssl.ops.reference import gather
from tests import processes

IMAGE = (3, 224, 224)
received: Tensor | None = None  # of this process
Shuffle = Callable[[Tensor, torch.Generator], Tensor]


def authors(x: Tensor, generator: torch.Generator) -> Tensor:
    """`_batch_shuffle_ddp` of the authors' builder.py."""
    parts = [torch.ones_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x)
    x_gather = torch.cat(parts)
    idx_shuffle = torch.randperm(len(x_gather))
    dist.broadcast(idx_shuffle, src=0)
    return x_gather[idx_shuffle.view(len(parts), -1)[dist.get_rank()]]


def bare(x: Tensor, generator: torch.Generator) -> Tensor:
    """What is sent and nothing else: no permutation, no check of sizes, into the same memory each time."""
    global received
    if received is None:
        received = torch.empty_like(x)
    dist.all_to_all_single(received, x)
    return received


def ours(x: Tensor, generator: torch.Generator) -> Tensor:
    shuffled, handle = shuffle_batch(x, generator=generator)
    handle.wait()
    return shuffled


def rank_of(rank: int, world: int, rows: int, shuffle: Shuffle, meeting: str, pipe: Connection) -> None:
    """Shuffle whenever the parent asks; the first time, tell which rows of all came to which rank."""
    processes.meet(rank, world, meeting)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, *IMAGE, generator=torch.Generator().manual_seed(rank))
    x[:, 0, 0, 0] = rank * rows + torch.arange(rows)
    answer: Any = sorted(gather(shuffle(x, generator)[:, 0, 0, 0], None).tolist())
    while pipe.recv() == "shuffle":
        shuffle(x, generator)
        pipe.send(answer)
        answer = None
    dist.destroy_process_group()


class Ranks(Elsewhere):
    """Processes that shuffle together when it is called.

    Args:
        shuffle: what they do.
        case: how many processes, and rows of each.
    """

    def __init__(self, shuffle: Shuffle, case: Case) -> None:
        self._folder = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("forkserver")
        self._pipes, self._processes = [], []
        for rank in range(case["ranks"]):
            pipe, theirs = context.Pipe()
            arguments = rank, case["ranks"], case["rows"], shuffle, str(Path(self._folder.name) / "meeting"), theirs
            process = context.Process(target=rank_of, args=arguments, daemon=True)
            process.start()
            theirs.close()  # so that a process that dies is an error here
            self._pipes.append(pipe)
            self._processes.append(process)

    def __call__(self) -> list[Any]:
        for pipe in self._pipes:
            pipe.send("shuffle")
        return [pipe.recv() for pipe in self._pipes]

    def close(self) -> None:
        for pipe in self._pipes:
            with suppress(OSError):  # it died before
                pipe.send("stop")
        for process in self._processes:
            process.join(timeout=20)
            process.kill()
        self._folder.cleanup()


def check(case: Case, answers: list[Any]) -> None:
    """Nothing is lost or doubled."""
    assert answers == [list(range(case["ranks"] * case["rows"]))] * case["ranks"]


def make_case(ranks: int) -> Case:
    rows = 64
    sent = 4 * rows * torch.Size(IMAGE).numel() * (ranks - 1)  # of all processes, to others
    return Case("shuffle_batch", (("ranks", ranks), ("rows", rows)), bytes=sent, items=ranks * rows, unit="images",
                quick=ranks == 2)  # fmt: skip


SIDES = (
    Side("authors", partial(Ranks, authors), differs="gathers all batches on every rank"),
    Side("all_to_all_single", partial(Ranks, bare), role="bound", when=lambda c: c["rows"] % c["ranks"] == 0),
    Side("fastssl", partial(Ranks, ours), role="ours"),
)


@pytest.mark.parametrize(("case", "side"), grid(map(make_case, (2, 3, 4)), SIDES, check))
def test_shuffle(turns: Callable[..., None], case: Case, side: Side) -> None:
    turns(case, side)
