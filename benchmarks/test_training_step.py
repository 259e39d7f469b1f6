"""One training step of the demo network in float32: each method beside the bare backbone with as many passes."""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

from fastssl.engine.device import keep_freed_memory
from fastssl.methods import BYOL, MoCo
from fastssl.models import create_backbone

BATCH = 256


class Bare(nn.Module):
    """As many forward passes with and without gradient as a method makes, and nothing else."""

    def __init__(self, passes: int) -> None:
        super().__init__()
        self.online, self.target, self.passes = (
            create_backbone("small_resnet32"),
            create_backbone("small_resnet32"),
            passes,
        )

    def forward(self, views: list[Tensor]) -> Tensor:
        with torch.no_grad():
            for view in views[: self.passes]:
                self.target(view)
        return torch.stack([self.online(view).sum() for view in views[: self.passes]]).sum()

    def after_step(self) -> None:
        pass


MAKE = {
    "moco": (1, lambda: MoCo(create_backbone("small_resnet32"), queue_size=4096)),
    "byol": (2, lambda: BYOL(create_backbone("small_resnet32"), hidden_dim=512, total_steps=1000)),
}


@pytest.mark.parametrize("kind", ["bare", "method"])
@pytest.mark.parametrize("name", MAKE)
def test_step(benchmark: BenchmarkFixture, name: str, kind: str) -> None:
    keep_freed_memory()
    passes, make = MAKE[name]
    method: nn.Module = make() if kind == "method" else Bare(passes)
    method = method.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], 0.01)
    views = [torch.randn(BATCH, 3, 32, 32).to(memory_format=torch.channels_last) for _ in "qk"]

    def step() -> None:
        optimizer.zero_grad()
        method(views).backward()
        optimizer.step()
        method.after_step()  # type: ignore[operator]

    benchmark.group = f"training step, {name}, batch {BATCH}"
    benchmark.pedantic(step, rounds=10, warmup_rounds=2)
