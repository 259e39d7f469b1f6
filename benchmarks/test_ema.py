"""The momentum update of a ResNet-50 on the CPU, beside what people write and what the memory allows.

All sides are first asserted to agree. `extra_info` has the bandwidth, each array counted once for each time it is read
or written.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from fastssl.ops import ema_update_

M = 0.999


def parameters(seed: int) -> list[Tensor]:
    """Of a ResNet-50: 25,557,032 float32 in 161 tensors."""
    torch.manual_seed(seed)
    return [p.detach() for p in torchvision.models.resnet50().parameters()]


def loop(targets: list[Tensor], sources: list[Tensor]) -> None:
    """As in the authors' builder.py."""
    for p, q in zip(targets, sources, strict=True):
        p.data = p.data * M + q.data * (1.0 - M)


def foreach(targets: list[Tensor], sources: list[Tensor]) -> None:
    torch._foreach_lerp_(targets, sources, 1 - M)


def cast_and_lerp(targets: list[Tensor], sources: list[Tensor]) -> None:
    """`_foreach_lerp_` refuses mixed dtypes."""
    torch._foreach_lerp_(targets, [source.float() for source in sources], 1 - M)


def ours(targets: list[Tensor], sources: list[Tensor]) -> None:
    ema_update_(targets, sources, M)


def run(benchmark: BenchmarkFixture, group: str, step: Callable[[], Any], moved: int) -> None:
    benchmark.group = group
    benchmark.pedantic(step, rounds=25, warmup_rounds=3)
    if benchmark.stats is not None:  # None with --benchmark-disable
        benchmark.extra_info["gb_per_s"] = round(moved / benchmark.stats.stats.median / 1e9, 1)


def check(update: Callable[[list[Tensor], list[Tensor]], None], sources: list[Tensor]) -> list[Tensor]:
    """Targets after one update, which is the right one."""
    targets = parameters(0)
    expected = [M * t.double() + (1 - M) * s.double() for t, s in zip(targets, sources, strict=True)]
    update(targets, sources)
    assert all(torch.allclose(t.double(), e, atol=1e-6) for t, e in zip(targets, expected, strict=True))
    return targets


@pytest.mark.parametrize("which", ["loop", "foreach", "fastssl"])
def test_float32(benchmark: BenchmarkFixture, which: str) -> None:
    update = {"loop": loop, "foreach": foreach, "fastssl": ours}[which]
    sources = parameters(1)
    targets = check(update, sources)
    run(benchmark, "ema_update_, ResNet-50", lambda: update(targets, sources), 12 * sum(s.numel() for s in sources))


@pytest.mark.parametrize("which", ["cast and lerp", "fastssl"])
def test_bfloat16_sources(benchmark: BenchmarkFixture, which: str) -> None:
    update = {"cast and lerp": cast_and_lerp, "fastssl": ours}[which]
    sources = [source.bfloat16() for source in parameters(1)]
    targets = check(update, sources)
    group = "ema_update_, ResNet-50, bfloat16 sources"
    run(benchmark, group, lambda: update(targets, sources), 10 * sum(s.numel() for s in sources))


@pytest.mark.parametrize("which", ["triad", "triad in place"])
def test_bandwidth(benchmark: BenchmarkFixture, which: str) -> None:
    """STREAM's triad, a ← b + s·c, over as many elements, and a ← a + s·b, which reads and writes what we do."""
    count = sum(p.numel() for p in parameters(0))
    a, b, c = torch.randn(3, count).unbind()
    steps: dict[str, Callable[[], Any]] = {
        "triad": lambda: torch.add(b, c, alpha=0.5, out=a),
        "triad in place": lambda: a.add_(b, alpha=1e-9),
    }
    run(benchmark, "ema_update_, ResNet-50", steps[which], 12 * count)
