"""InfoNCE forward and backward on the CPU: the kernels beside the formula of MoCo's authors, compiled and eager.

float32 results are first asserted to agree with the eager ones. `extra_info` has the memory of one step on top of its
inputs: at the peak, and all tensors it allocates together.
"""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from fastssl.ops import info_nce

N, DIM, TEMPERATURE = 256, 128, 0.07
QUEUE = 65536
BATCH = 4096  # of the in-batch loss


def moco(query: Tensor, key: Tensor, queue: Tensor) -> Tensor:
    """As in the authors' builder.py, with the loss of their main_moco.py."""
    query, key = F.normalize(query, dim=1), F.normalize(key, dim=1)
    l_pos = torch.einsum("nc,nc->n", query, key).unsqueeze(-1)
    l_neg = torch.einsum("nc,ck->nk", query, queue.T)
    logits = torch.cat([l_pos, l_neg], dim=1) / TEMPERATURE
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))


def in_batch(query: Tensor, key: Tensor) -> Tensor:
    query, key = F.normalize(query, dim=1), F.normalize(key, dim=1)
    return F.cross_entropy(query @ key.T / TEMPERATURE, torch.arange(len(query)))


def ours(query: Tensor, key: Tensor, queue: Tensor) -> Tensor:
    return info_nce(query, key, queue, TEMPERATURE, negatives_normalized=True)


def ours_in_batch(query: Tensor, key: Tensor) -> Tensor:
    return info_nce(query, key, temperature=TEMPERATURE)


def products(query: Tensor, queue: Tensor) -> Tensor:
    """The two matrix products that no implementation can do without."""
    return (query @ queue.T) @ queue


def make_queue(dtype: torch.dtype) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    query, key, queue = (torch.randn(rows, DIM, generator=draw) for rows in (N, N, QUEUE))
    return [query.to(dtype).requires_grad_(), key.to(dtype), F.normalize(queue).to(dtype)]


def make_batch() -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(BATCH, DIM, generator=draw).requires_grad_() for _ in "qk"]


def backward_of(loss: Callable[..., Tensor], inputs: list[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    leaves = [x for x in inputs if x.requires_grad]
    return lambda: torch.autograd.grad(loss(*inputs), leaves)


def peak_memory(step: Callable[[], Any]) -> int:
    """Bytes of memory that `step` needs at its peak beyond what was there before; Linux with glibc only."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def kilobytes(name: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(name))

    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # else the step would use again what earlier ones have freed
    reset.write_text("5")  # the peak counts from here
    before = kilobytes("VmRSS")
    step()
    return (kilobytes("VmHWM") - before) * 1024


def allocated(step: Callable[[], Any]) -> int:
    """Bytes of all tensors that `step` creates."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    memory = (event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")
    return sum(size for size in memory if size > 0)


def run(benchmark: BenchmarkFixture, group: str, step: Callable[[], Any]) -> None:
    benchmark.group = group
    step()  # the first call compiles, and brings code and threads into memory
    benchmark.extra_info["peak_mb"] = round(peak_memory(step) / 1e6, 1)
    benchmark.extra_info["allocated_mb"] = round(allocated(step) / 1e6, 1)
    benchmark.pedantic(step, rounds=15, warmup_rounds=2)


@pytest.mark.parametrize("which", ["eager", "compile", "products", "fastssl", "fastssl bf16"])
def test_queue(benchmark: BenchmarkFixture, which: str) -> None:
    inputs = make_queue(torch.float32)
    if which == "products":
        step: Callable[[], Any] = lambda: products(inputs[0].detach(), inputs[2])  # noqa: E731
    elif which == "fastssl bf16":
        step = backward_of(ours, make_queue(torch.bfloat16))
    else:
        loss = {"eager": moco, "compile": torch.compile(moco), "fastssl": ours}[which]
        [expected], step = backward_of(moco, inputs)(), backward_of(loss, inputs)
        assert torch.allclose(step()[0], expected, atol=1e-5 * float(expected.abs().max()))
    run(benchmark, f"info_nce, N={N}, D={DIM}, K={QUEUE}", step)


@pytest.mark.parametrize("which", ["eager", "compile", "fastssl"])
def test_in_batch(benchmark: BenchmarkFixture, which: str) -> None:
    inputs = make_batch()
    loss = {"eager": in_batch, "compile": torch.compile(in_batch), "fastssl": ours_in_batch}[which]
    expected, step = backward_of(in_batch, inputs)(), backward_of(loss, inputs)
    for a, b in zip(step(), expected, strict=True):
        assert torch.allclose(a, b, atol=1e-5 * float(b.abs().max()))
    run(benchmark, f"info_nce in-batch, N={BATCH}, D={DIM}", step)
