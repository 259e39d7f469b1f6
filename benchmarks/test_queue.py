"""Enqueueing a batch of keys into queues of several sizes, beside the code of MoCo's authors and other libraries.

Queues do not take turns with the other ops, which leave the caches to those whose turn is next: one of any capacity
should find them as the other queues have left them.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import peers
from benchmarks.sides import DEVICES, Case, Function, Side, grid
from fastssl.ops import KeyQueue

N, D = 256, 128
# Seconds: a side that copies the whole queue leaves others' caches cold for a while. And more rounds than others.
SAMPLE, ROUNDS = 0.05, 30


class Authors:
    """`_dequeue_and_enqueue` of the authors' builder.py."""

    def __init__(self, capacity: int, device: str) -> None:
        self.queue = F.normalize(torch.randn(D, capacity, device=device), dim=0)
        self.queue_ptr = torch.zeros(1, dtype=torch.long, device=device)

    def __call__(self, keys: Tensor) -> None:
        batch_size, ptr = keys.shape[0], int(self.queue_ptr)
        self.queue[:, ptr : ptr + batch_size] = keys.T
        self.queue_ptr[0] = (ptr + batch_size) % self.queue.shape[1]


def batch(case: Case) -> Tensor:
    return torch.randn(N, D, generator=torch.Generator().manual_seed(0)).to(case.device)


def authors(case: Case) -> Function:
    enqueue, keys = Authors(case["K"], case.device), F.normalize(batch(case))

    def step() -> Tensor:
        enqueue(keys)
        return enqueue.queue.T

    return Function(step, SAMPLE, ROUNDS)


def lightly(case: Case) -> Function:
    module = peers.peer("lightly.models.modules.memory_bank", "lightly").MemoryBankModule((case["K"], D))
    module, keys = module.to(case.device), F.normalize(batch(case))

    def step() -> Tensor:
        module(keys, update=True)
        return module.bank

    return Function(step, SAMPLE, ROUNDS)


def metric_learning(case: Case) -> Function:
    losses = peers.peer("pytorch_metric_learning.losses", "pytorch-metric-learning")
    memory = losses.CrossBatchMemory(losses.NTXentLoss(), D, case["K"])
    memory.embedding_memory, memory.label_memory = (
        memory.embedding_memory.to(case.device),
        memory.label_memory.to(case.device),
    )
    keys, labels = F.normalize(batch(case)), torch.arange(N, device=case.device)

    def step() -> Tensor:
        memory.add_to_memory(keys, labels, N)
        return memory.embedding_memory

    return Function(step, SAMPLE, ROUNDS)


def ours(case: Case) -> Function:
    queue, keys = KeyQueue(case["K"], D, device=case.device), batch(case)  # filled, so that its pages are in memory

    def step() -> Tensor:
        queue.enqueue_(keys)
        return queue.keys

    return Function(step, SAMPLE, ROUNDS)


def check(case: Case, stored: Tensor) -> None:
    torch.testing.assert_close(stored[:N], F.normalize(batch(case)), rtol=0, atol=1e-6)


def make_case(device: str, k: int) -> Case:
    axes = (("N", N), ("D", D), ("K", k), ("dtype", "float32"))
    return Case("KeyQueue", axes, device, bytes=8 * N * D, quick=k == 4096)


def lightly_has_one_speed(case: Case) -> bool:
    """Whether lightly's copy of the bank always takes as long.

    glibc maps a block anew from 32 MB on, unless it happens to have a hole for it: the 32 MB of 65,536 keys take 2 ms
    or 10 from one sample to the next, and their median is either. More keys always take new pages, fewer never.
    """
    return not (case.device == "cpu" and case["K"] == 65_536)


CLONES = "gets normalised keys; clones the bank; cuts a batch at the end of the bank"
GIVEN = "gets normalised keys; the capacity must be a multiple of the batch"
SIDES = (
    Side("authors", authors, differs=GIVEN),
    Side("lightly", lightly, differs=CLONES, when=lightly_has_one_speed),
    Side("pytorch-metric-learning", metric_learning, differs="gets normalised keys; stores labels too"),
    Side("fastssl", ours, role="ours", pure=False),
)
CASES = [make_case(device, k) for device in DEVICES for k in (4096, 65_536, 262_144, 1_048_576)]


@pytest.mark.parametrize(("case", "side"), grid(CASES, SIDES, check, graphs=("fastssl",)))
def test_enqueue(turns: Callable[..., None], case: Case, side: Side) -> None:
    turns(case, side)
