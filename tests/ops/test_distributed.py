"""Shuffle-BN and MoCo over real gloo processes: one to four of them, even and uneven batches, and one that dies."""

import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastssl import _extension
from fastssl.errors import FastsslError
from fastssl.methods import MoCo
from fastssl.models import create_backbone
from fastssl.ops import shuffle_batch, unshuffle_and_gather, unshuffle_batch, use_backend
from fastssl.ops.reference import gather
from fastssl.ops.shuffle import _Headers
from tests import processes

WORLD = 4
BACKENDS = ("reference",) if _extension.missing() else ("native", "reference")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.uint8, torch.int64, torch.bool)
Group = dist.ProcessGroup | None


def worker(rank: int, folder: str) -> None:
    processes.meet(rank, WORLD, f"{folder}/shuffle")
    try:
        for world in range(1, WORLD + 1):
            group = dist.new_group(list(range(world)))
            if isinstance(group, dist.ProcessGroup):  # this rank is one of it
                for name in BACKENDS:
                    with use_backend(name):
                        check_shuffle(rank, world, group)
                check_backends_agree(group)
        check_another_order_of_ranks(rank)
        check_overlap()
        check_waiting()
        check_kept_rows()
        check_sizes(rank)
        check_ddp(rank)
    finally:
        dist.destroy_process_group()


def moco_worker(rank: int, folder: str) -> None:
    for world in (2, 3, WORLD):
        if rank < world:
            processes.meet(rank, world, f"{folder}/{world}")
            try:
                check_moco(rank, world)
                check_queues()
            finally:
                dist.destroy_process_group()


def check_shuffle(rank: int, world: int, group: Group, device: str = "cpu") -> None:
    """Rows come from every rank, nothing is lost, and both ways back are the identity."""
    generator = torch.Generator().manual_seed(4)
    for batch in (0, 1, 2, 3, 6, 7, 8, 13):
        for dtype in DTYPES:
            x = (31 * rank + torch.arange(batch, device=device)).view(batch, 1, 1).expand(batch, 2, 3)
            x = x.to(dtype) if dtype != torch.bool else x % 2 == 0
            shuffled, handle = shuffle_batch(x, generator=generator, group=group)
            handle.wait()
            assert (shuffled.shape, shuffled.dtype) == (x.shape, dtype)
            if dtype == torch.int64:
                owners = (shuffled[:, 0, 0] // 31).bincount(minlength=world)
                assert owners.max() - owners.min() <= 1
                rows = gather(shuffled, group)[:, 0, 0].sort().values.tolist()
                assert rows == [31 * r + i for r in range(world) for i in range(batch)]
            assert torch.equal(unshuffle_batch(shuffled.clone(), handle), x)
            keys, everyone = unshuffle_and_gather(shuffled, handle)
            assert torch.equal(keys, x)
            assert torch.equal(everyone, gather(shuffled, group) if world > 1 else x)
    images = torch.randn(5, 3, 4, 6, device=device).contiguous(memory_format=torch.channels_last)
    shuffled, handle = shuffle_batch(images, generator=generator, group=group)
    handle.wait()
    assert torch.equal(unshuffle_batch(shuffled[:, 0], handle), images[:, 0])


def check_backends_agree(group: Group) -> None:
    """Also where each rank has a permutation of its own."""
    x = torch.randn(7, 5)
    results = []
    for name in BACKENDS:
        with use_backend(name):
            generator = torch.Generator().manual_seed(dist.get_rank())
            shuffled, handle = shuffle_batch(x, generator=generator, group=group)
            handle.wait()
            results.append(shuffled)
            assert torch.equal(unshuffle_batch(shuffled, handle), x)
    assert all(torch.equal(result, results[0]) for result in results)


def check_overlap() -> None:
    """Two shuffles under way at the same time, waited for in the other order."""
    generator = torch.Generator().manual_seed(4)
    x, y = torch.randn(2, 64, 5000).unbind()
    (a, first), (b, second) = (shuffle_batch(t, generator=generator) for t in (x, y))
    second.wait()
    first.wait()
    assert torch.equal(unshuffle_batch(a, first), x)
    assert torch.equal(unshuffle_batch(b, second), y)


def check_another_order_of_ranks(rank: int) -> None:
    """A rank's place in a group is not its rank in the world."""
    for members in ([3, 0, 2], [1, 3]):
        group = dist.new_group(members)
        if rank in members:
            assert isinstance(group, dist.ProcessGroup)
            for name in BACKENDS:
                with use_backend(name):
                    check_shuffle(members.index(rank), len(members), group)
        else:
            with pytest.raises(FastsslError, match="not in the group"):
                shuffle_batch(torch.zeros(2, 1), generator=torch.Generator(), group=group)  # type: ignore[arg-type]


def check_waiting() -> None:
    """As often as one likes, on several threads, or not at all: what is dropped lets its memory go."""
    x = torch.randn(64, 5000)
    shuffled, handle = shuffle_batch(x, generator=torch.Generator())
    with ThreadPoolExecutor(3) as pool:
        for done in [pool.submit(handle.wait) for _ in range(3)]:
            done.result()
    handle.wait()
    assert torch.equal(unshuffle_batch(shuffled, handle), x)
    places = set()
    for _ in range(30):
        dropped, handle = shuffle_batch(x, generator=torch.Generator())
        places.add(dropped.data_ptr())
        del dropped, handle
        dist.barrier()
    assert len(places) < 8


def check_kept_rows() -> None:
    """What a caller holds stays as it is while later shuffles use memory again."""
    generator, x = torch.Generator().manual_seed(1), torch.randn(64, 5000)
    kept = []
    for step in range(12):
        shuffled, handle = shuffle_batch(x + step, generator=generator)
        handle.wait()
        if step % 3 == 0:
            kept.append((shuffled, shuffled.clone()))
    assert all(torch.equal(a, b) for a, b in kept)


def check_sizes(rank: int) -> None:
    """Of all that has to be alike; the group is of use afterwards."""
    with pytest.raises(FastsslError, match=r"batch sizes differ between ranks: \[2, 3, 4, 5\]"):
        shuffle_batch(torch.zeros(2 + rank, 1), generator=torch.Generator())
    images = torch.zeros(4, 3, 2, 5)
    for x in (
        images.contiguous(memory_format=torch.channels_last) if rank else images,
        images[:, :2] if rank else images,
        images.double() if rank else images,
    ):
        with pytest.raises(FastsslError, match=r"rows differ between ranks .* here they are \("):
            shuffle_batch(x, generator=torch.Generator())
    assert len(gather(torch.zeros(1), None)) == WORLD


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


STEPS, BATCH, K, DIM, M, T, LR = 20, 6, 50, 6, 0.9, 0.2, 0.05


class Tiny(nn.Sequential):
    num_features = 5

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def make_moco() -> MoCo:
    torch.manual_seed(0)
    return MoCo(Tiny(), dim=DIM, queue_size=K, momentum=M, temperature=T).double()


def views(world: int) -> list[tuple[Tensor, Tensor]]:
    """The batches of all ranks, one after the other."""
    draw = torch.Generator().manual_seed(5)
    shape = (2, world * BATCH, 3, 6, 6)
    return [tuple(torch.randn(shape, generator=draw, dtype=torch.float64).unbind()) for _ in range(STEPS)]  # type: ignore[misc]


def one_process(world: int) -> tuple[list[float], MoCo, Tensor]:
    """The step of Algorithm 1 on all images, each chunk of `world` normalised by itself, as on so many ranks."""
    method = make_moco()
    f_q, f_k = method.encoder_q, method.encoder_k
    queue = method.queue.keys.clone()  # oldest first
    generator = torch.Generator().manual_seed(0)  # the method's own seed
    optimizer = torch.optim.SGD(f_q.parameters(), LR, momentum=0.9)
    losses = []
    for x_q, x_k in views(world):
        # Each rank's rows by one permutation in shares, share j of rank s to rank s+1+j.
        shares = torch.randperm(BATCH, generator=generator).tensor_split(world)
        order = torch.cat([s * BATCH + shares[(t - s - 1) % world] for t in range(world) for s in range(world)])
        q = nn.functional.normalize(torch.cat([f_q(x) for x in x_q.chunk(world)]))
        with torch.no_grad():
            shuffled = nn.functional.normalize(torch.cat([f_k(x) for x in x_k[order].chunk(world)]))
            k = shuffled[order.argsort()]
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1) / T
        loss = nn.functional.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for p_k, p_q in zip(f_k.parameters(), f_q.parameters(), strict=True):
            p_k.data = M * p_k.data + (1 - M) * p_q.data
        queue = torch.cat([queue, shuffled])[-K:]
        losses.append(loss.item())
    return losses, method, queue


def check_moco(rank: int, world: int) -> None:
    """Twenty steps on several ranks are those of one process: losses, weights, and the queue on every rank."""
    method = make_moco()
    parallel = DistributedDataParallel(method)
    optimizer = torch.optim.SGD(method.encoder_q.parameters(), LR, momentum=0.9)
    losses = []
    for x_q, x_k in views(world):
        loss = parallel((x_q.chunk(world)[rank], x_k.chunk(world)[rank]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.after_step()
        losses.append(gather(loss.detach().view(1), None).mean().item())
    expected, other, queue = one_process(world)
    assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) < 1e-9
    for p, q in zip(method.parameters(), other.parameters(), strict=True):
        assert (p - q).abs().max() < 1e-9
    assert (method.queue.oldest_first() - queue).abs().max() < 1e-9
    assert K % (world * BATCH)  # the ring wraps in mid-batch


def check_queues() -> None:
    """All ranks hold one queue, also with both directions, split batch norm, micro-batches and autocast."""
    torch.manual_seed(dist.get_rank())
    method = MoCo(Tiny(), dim=DIM, queue_size=K, symmetric=True, bn_splits=2)
    parallel = DistributedDataParallel(method)
    for _ in range(3):
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                loss = parallel(torch.randn(2, BATCH, 3, 6, 6).unbind())
            loss.backward()
        method.after_step()
    assert int(method.queue.tail) == 3 * 2 * 2 * BATCH * dist.get_world_size() % K
    for name in ("keys", "tail", "filled"):
        everyone = gather(method.queue.get_buffer(name)[None], None)
        assert (everyone == everyone[:1]).all(), name


@pytest.mark.slow  # four processes
def test_shuffle_over_one_to_four_processes(tmp_path: Path) -> None:
    processes.run(worker, WORLD, str(tmp_path))


@pytest.mark.slow  # four processes
def test_moco_over_several_processes_is_that_of_one(tmp_path: Path) -> None:
    processes.run(moco_worker, WORLD, str(tmp_path))


def nccl_worker(rank: int, world: int, folder: str) -> None:
    torch.cuda.set_device(rank)
    processes.meet(rank, world, f"{folder}/nccl", backend="nccl")
    try:
        for name in ("cuda", "reference"):
            with use_backend(name):
                check_shuffle(rank, world, None, "cuda")
    finally:
        dist.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_shuffle_over_nccl(tmp_path: Path) -> None:
    world = torch.cuda.device_count()
    processes.run(nccl_worker, world, world, str(tmp_path))


def dies_before(rank: int, batch: Tensor) -> None:
    if rank == 1:
        os._exit(1)
    shuffle_batch(batch, generator=torch.Generator())[1].wait()


def dies_in_mid_shuffle(rank: int, batch: Tensor) -> None:
    """What the batches are like is exchanged; the rows of rank 1 never come."""
    if rank == 1:
        _Headers(batch, None)
        os._exit(1)
    shuffle_batch(batch, generator=torch.Generator())[1].wait()


def hangs_in_mid_shuffle(rank: int, batch: Tensor) -> None:
    if rank == 1:
        _Headers(batch, None)
        time.sleep(60)
        os._exit(1)
    shuffle_batch(batch, generator=torch.Generator())[1].wait()


def dies_before_unshuffle(rank: int, batch: Tensor) -> None:
    _, handle = shuffle_batch(batch, generator=torch.Generator())
    handle.wait()
    if rank == 1:
        os._exit(1)
    unshuffle_batch(batch, handle)


def dies_before_gather(rank: int, batch: Tensor) -> None:
    _, handle = shuffle_batch(batch, generator=torch.Generator())
    handle.wait()
    if rank == 1:
        os._exit(1)
    unshuffle_and_gather(batch, handle)


Death = Callable[[int, Tensor], None]
DEATHS: dict[Death, str] = {
    dies_before: "shuffle_batch",
    dies_in_mid_shuffle: "shuffle_batch",
    hangs_in_mid_shuffle: "shuffle_batch",
    dies_before_unshuffle: "unshuffle_batch",
    dies_before_gather: "unshuffle_and_gather",
}


def witness(rank: int, death: Death, folder: str) -> None:
    """Writes down what the death of rank 1 looks like from here."""
    processes.meet(rank, 3, f"{folder}/meeting", seconds=4)
    begin = time.monotonic()
    try:
        death(rank, torch.randn(6, 1000))
        message = "nothing happened"
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
    Path(folder, str(rank)).write_text(f"{time.monotonic() - begin}\n{message}")
    os._exit(0)  # a broken group cannot be destroyed in order


@pytest.mark.slow  # waits for a timeout
@pytest.mark.parametrize("death", DEATHS)
def test_the_others_name_the_op_when_a_rank_dies(death: Death, tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    ranks = [context.Process(target=witness, args=(rank, death, str(tmp_path))) for rank in range(3)]
    for process in ranks:
        process.start()
    for rank in (0, 2):
        ranks[rank].join(50)
    ranks[1].kill()
    for rank in (0, 2):
        seconds, message = (tmp_path / str(rank)).read_text().split("\n", 1)
        assert message.startswith(f"RuntimeError: {DEATHS[death]}: the exchange with the other ranks failed"), message
        assert float(seconds) < 4 + 20  # the timeout, and what two busy cores take
