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
from benchmarks.apart_ops import on_cpu_apart
from benchmarks.sides import DEVICES, Case, Side, grid
from fastssl.ops import KeyQueue

N, D = 256, 128
SAMPLE = 0.05  # seconds: a side that copies the whole queue leaves others' caches cold for a while
Step = Callable[[], tuple[Tensor]]


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


def authors(case: Case) -> Step:
    enqueue, keys = Authors(case["K"], case.device), F.normalize(batch(case))

    def step() -> tuple[Tensor]:
        enqueue(keys)
        return (enqueue.queue.T[:N],)

    return step


def lightly(case: Case) -> Step:
    module = peers.peer("lightly.models.modules.memory_bank", "lightly").MemoryBankModule((case["K"], D))
    module, keys = module.to(case.device), F.normalize(batch(case))

    def step() -> tuple[Tensor]:
        module(keys, update=True)
        return (module.bank[:N],)

    return step


def metric_learning(case: Case) -> Step:
    losses = peers.peer("pytorch_metric_learning.losses", "pytorch-metric-learning")
    memory = losses.CrossBatchMemory(losses.NTXentLoss(), D, case["K"])
    memory.embedding_memory, memory.label_memory = (
        memory.embedding_memory.to(case.device),
        memory.label_memory.to(case.device),
    )
    keys, labels = F.normalize(batch(case)), torch.arange(N, device=case.device)

    def step() -> tuple[Tensor]:
        memory.add_to_memory(keys, labels, N)
        return (memory.embedding_memory[:N],)

    return step


def ours(case: Case) -> Step:
    queue, keys = KeyQueue(case["K"], D, device=case.device), batch(case)  # filled, so that its pages are in memory

    def step() -> tuple[Tensor]:
        queue.enqueue_(keys)
        return (queue.keys[:N],)

    return step


def check(case: Case, result: tuple[Tensor]) -> None:
    (first,) = result  # rows of the queue
    torch.testing.assert_close(first, F.normalize(batch(case)), rtol=0, atol=1e-6)


def make_case(device: str, k: int) -> Case:
    axes = (("N", N), ("D", D), ("K", k), ("dtype", "float32"))
    return Case("KeyQueue", axes, device, bytes=8 * N * D, quick=k == 4096)


CLONES = "gets normalised keys; clones the bank; cuts a batch at the end of the bank"
GIVEN = "gets normalised keys; the capacity must be a multiple of the batch"
SIDES = (
    Side("authors", on_cpu_apart(authors, SAMPLE), differs=GIVEN),
    Side("lightly", on_cpu_apart(lightly, SAMPLE), differs=CLONES),
    Side(
        "pytorch-metric-learning",
        on_cpu_apart(metric_learning, SAMPLE),
        differs="gets normalised keys; stores labels too",
    ),
    Side("fastssl", on_cpu_apart(ours, SAMPLE), role="ours", pure=False),
)
CASES = [make_case(device, k) for device in DEVICES for k in (4096, 65_536, 262_144, 1_048_576)]


@pytest.mark.parametrize(("case", "side"), grid(CASES, SIDES, check, graphs=("fastssl",)))
def test_enqueue(turns: Callable[..., None], case: Case, side: Side) -> None:
    turns(case, side)
