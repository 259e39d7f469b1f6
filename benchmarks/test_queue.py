"""Enqueueing a batch of keys on the CPU into queues of two sizes, beside the code of MoCo's authors.

Theirs gets keys that are normalised already and a capacity that is a multiple of the batch, as it needs them.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from fastssl.ops import KeyQueue

N, DIM = 256, 128


class Theirs:
    """`_dequeue_and_enqueue` of the authors' builder.py."""

    def __init__(self, capacity: int) -> None:
        self.queue = F.normalize(torch.randn(DIM, capacity), dim=0)
        self.queue_ptr = torch.zeros(1, dtype=torch.long)

    def __call__(self, keys: Tensor) -> None:
        batch_size, ptr = keys.shape[0], int(self.queue_ptr)
        self.queue[:, ptr : ptr + batch_size] = keys.T
        self.queue_ptr[0] = (ptr + batch_size) % self.queue.shape[1]


@pytest.mark.parametrize("capacity", [65_536, 1_048_576])
@pytest.mark.parametrize("which", ["authors", "fastssl"])
def test_enqueue(benchmark: BenchmarkFixture, which: str, capacity: int) -> None:
    benchmark.group = "enqueue_, N=256, D=128"
    keys = torch.randn(N, DIM)
    enqueue: Callable[[Tensor], None]
    if which == "authors":
        enqueue, keys = Theirs(capacity), F.normalize(keys)
    else:
        queue = KeyQueue(capacity, DIM)  # filled, so that its pages are in memory
        enqueue = queue.enqueue_
        enqueue(keys)
        assert torch.allclose(queue.keys[:N], F.normalize(keys), atol=1e-6)
    benchmark.pedantic(enqueue, (keys,), rounds=200, iterations=20, warmup_rounds=5)
