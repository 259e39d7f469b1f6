"""Shuffle-BN of 64 images a rank over 4 gloo processes, beside the code of MoCo's authors and a bare all-to-all.

`extra_info` has the rows that a rank gets from others, and the bytes that cross the network device (of one machine: the
loopback) for all ranks together, headers included.
"""

import multiprocessing
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from fastssl.ops import shuffle_batch
from fastssl.ops.reference import gather
from tests import processes

WORLD, BATCH, IMAGE = 4, 64, (3, 224, 224)


def authors(x: Tensor, generator: torch.Generator) -> Tensor:
    """`_batch_shuffle_ddp` of the authors' builder.py."""
    parts = [torch.ones_like(x) for _ in range(WORLD)]
    dist.all_gather(parts, x)
    x_gather = torch.cat(parts)
    idx_shuffle = torch.randperm(len(x_gather))
    dist.broadcast(idx_shuffle, src=0)
    return x_gather[idx_shuffle.view(WORLD, -1)[dist.get_rank()]]


def bare(x: Tensor, generator: torch.Generator) -> Tensor:
    """What is sent and nothing else: no permutation, no check of sizes."""
    received = torch.empty_like(x)
    dist.all_to_all_single(received, x)
    return received


def ours(x: Tensor, generator: torch.Generator) -> Tensor:
    shuffled, handle = shuffle_batch(x, generator=generator)
    handle.wait()
    return shuffled


SHUFFLES = {"authors": authors, "all_to_all_single": bare, "fastssl": ours}


def rank_of(rank: int, meeting: str, pipe: Connection) -> None:
    """Does what the parent names until it says stop."""
    processes.meet(rank, WORLD, meeting)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, *IMAGE, generator=torch.Generator().manual_seed(rank))
    x[:, 0, 0, 0] = rank * BATCH + torch.arange(BATCH)
    for name in iter(pipe.recv, "stop"):
        if name.startswith("rows of "):
            rows = SHUFFLES[name.removeprefix("rows of ")](x, generator)[:, 0, 0, 0]
            pipe.send((sorted(gather(rows, None).tolist()), int((rows // BATCH != rank).sum())))
        else:
            SHUFFLES[name](x, generator)
            pipe.send(None)
    dist.destroy_process_group()


class Ranks:
    """Four processes that do one thing at a time together."""

    def __init__(self, folder: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        self.pipes, self.processes = [], []
        for rank in range(WORLD):
            pipe, theirs = context.Pipe()
            process = context.Process(target=rank_of, args=(rank, str(folder / "meeting"), theirs), daemon=True)
            process.start()
            theirs.close()  # so that a process that dies is an error here
            self.pipes.append(pipe)
            self.processes.append(process)

    def __call__(self, name: str) -> list[Any]:
        for pipe in self.pipes:
            pipe.send(name)
        return [pipe.recv() for pipe in self.pipes]

    def stop(self) -> None:
        for pipe in self.pipes:
            pipe.send("stop")
        for process in self.processes:
            process.join()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    ranks = Ranks(tmp_path_factory.mktemp("shuffle"))
    yield ranks
    ranks.stop()


def received() -> int:
    """Bytes that came in over all network devices since the machine was started."""
    lines = Path("/proc/net/dev").read_text().splitlines()[2:]
    return sum(int(line.split(":")[1].split()[0]) for line in lines)


@pytest.mark.parametrize("which", SHUFFLES)
def test_shuffle(benchmark: BenchmarkFixture, ranks: Ranks, which: str) -> None:
    benchmark.group = f"shuffle_batch, {WORLD} processes of {BATCH}×3×224×224 float32"
    for rows, foreign in ranks(f"rows of {which}"):
        assert rows == list(range(WORLD * BATCH))  # nothing is lost or doubled
        if which == "fastssl":
            assert foreign == BATCH * (WORLD - 1) // WORLD
            benchmark.extra_info["rows_from_others"] = foreign
    before = received()
    ranks(which)
    benchmark.extra_info["mb_on_the_wire"] = round((received() - before) / 1e6)
    benchmark.pedantic(ranks, (which,), rounds=11, warmup_rounds=2)
