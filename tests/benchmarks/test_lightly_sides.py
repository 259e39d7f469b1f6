"""What the benchmarks of training steps rely on: bare passes, endless batches, lightly's first loss."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.apart import Apart
from benchmarks.lightly_sides import BareStep, endless, training
from benchmarks.test_training_step import COMPUTE, WHOLE, count
from fastssl.engine.build import build_method
from fastssl.engine.optimizers import make_optimizer
from fastssl.engine.step import TrainingStep
from fastssl.train import parse

CPU = torch.device("cpu")
SMALL = ["--backbone=small_resnet16", "--batch_size=16", "--precision=float32"]


def test_endless_batches_close_the_epoch_under_way() -> None:
    closed: list[int] = []

    def batches(epoch: int) -> Iterator[list[Tensor]]:
        try:
            yield [torch.tensor(epoch)]
            yield [torch.tensor(epoch)]
        finally:
            closed.append(epoch)

    stream = endless(batches)
    assert [int(next(stream)[0]) for _ in range(3)] == [0, 0, 1]
    stream.close()
    assert closed == [0, 1]


@pytest.mark.parametrize(("method", "passes"), [("moco", 1), ("byol", 2)])
def test_bare_passes(method: str, passes: int) -> None:
    config, _ = parse([method, f"--recipe=demo_{method}", "--gpus=0", *SMALL])
    built: Any = build_method(config, 10).train()
    step = TrainingStep(config, built, make_optimizer(built, config), CPU, None)
    bare = BareStep(step)
    seen: list[bool] = []  # whether a pass was one with gradient
    for network in (bare.online, bare.target):
        network.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    before = [p.clone() for p in built.parameters()]
    bare([torch.randn(4, 3, 32, 32) for _ in "qk"], 0.1)
    assert sorted(seen) == [False] * passes + [True] * passes
    assert all(p.grad is not None for p in built.backbone.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, built.parameters(), strict=True))


@pytest.mark.parametrize("method", ["moco", "byol"])
def test_lightly_begins_with_our_loss(method: str) -> None:
    pytest.importorskip("lightly", reason="lightly is not installed: pip install 'fastssl[bench]'")
    losses = []
    for name in ("lightly", "fastssl"):
        with Apart(training, name, method, SMALL) as side:
            losses.append(side("run", "compute", 1))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_step_has_the_images_of_the_recipes_batch() -> None:
    for case in [case for case in WHOLE + COMPUTE if case.device == "cpu"]:
        method = case["method"].lower()
        config, _ = parse([method, f"--recipe=demo_{method}", "--gpus=0"])
        assert case.items == count(case) * config.batch_size
