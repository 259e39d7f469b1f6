"""Shuffle-BN and the methods' buffers over real gloo processes."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from fastssl.errors import FastsslError
from fastssl.methods import MoCo
from fastssl.models import create_backbone
from fastssl.ops import shuffle_batch, unshuffle_batch

WORLD = 3


def worker(rank: int, meeting: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=WORLD)
    try:
        check_shuffle(rank)
        check_sizes(rank)
        check_ddp(rank)
    finally:
        dist.destroy_process_group()


def check_shuffle(rank: int) -> None:
    """Rows come from every rank, nothing is lost, and the way back is the identity; batches of 7 do not divide by 3."""
    generator = torch.Generator().manual_seed(4)
    for batch in (6, 7, 2):
        x = (100 * rank + torch.arange(batch)).view(batch, 1, 1).expand(batch, 2, 3)
        shuffled, handle = shuffle_batch(x, generator=generator)
        handle.wait()
        owners = (shuffled[:, 0, 0] // 100).bincount(minlength=WORLD)
        assert shuffled.shape == x.shape
        assert owners.max() - owners.min() <= 1
        everyone = [torch.empty_like(shuffled) for _ in range(WORLD)]
        dist.all_gather(everyone, shuffled.contiguous())
        rows = sorted(torch.cat(everyone)[:, 0, 0].tolist())
        assert rows == [100 * r + i for r in range(WORLD) for i in range(batch)]
        assert torch.equal(unshuffle_batch(shuffled * 2, handle), x * 2)


def check_sizes(rank: int) -> None:
    with pytest.raises(FastsslError, match=r"batch sizes differ between ranks: \[2, 3, 4\]"):
        shuffle_batch(torch.zeros(2 + rank, 1), generator=torch.Generator())


def check_ddp(rank: int) -> None:
    """DistributedDataParallel leaves every rank its own queue and batch-norm statistics."""
    method = MoCo(create_backbone("small_resnet16"), queue_size=8)
    before = method.queue.keys.clone()
    parallel = DistributedDataParallel(method)
    method.queue.enqueue_(torch.full((2, 128), 1.0 + rank) + torch.arange(128) * rank)
    mine = method.queue.keys.clone()
    norm = next(m for m in method.modules() if isinstance(m, nn.BatchNorm2d))
    assert norm.running_mean is not None
    norm.running_mean.fill_(rank)
    parallel([torch.randn(4, 3, 32, 32) + rank for _ in "qk"]).backward()
    assert torch.equal(method.queue.keys, mine)
    assert not torch.equal(mine, before)
    means = [torch.empty_like(norm.running_mean) for _ in range(WORLD)]
    dist.all_gather(means, norm.running_mean)
    assert not torch.equal(means[0], means[1])


@pytest.mark.slow  # three processes import torch
def test_three_processes(tmp_path: Path) -> None:
    spawn(worker, (str(tmp_path / "meeting"),), nprocs=WORLD)
