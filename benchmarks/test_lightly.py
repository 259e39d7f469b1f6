"""The whole training step of the demo recipe against the same method written with lightly, and its two halves.

Both begin from the same weights and queue and see equal augmentations; `test_same_method` shows that they then lose the
same. What lightly does otherwise, without another result:
- The momentum update comes before the forward pass (the authors' code), ours after the optimizer (Algorithm 1): the
  first of lightly's does nothing, and then both have made the same ones when a key is computed.
- Its queue is written while the loss is computed, from a copy that the loss still reads; ours after the step. A batch
  that does not fit the end of its queue is cut; K here is a multiple of the batch.
- Shuffle-BN on one device changes the order of the batch only: not the statistics, but the time. Both do it.
- Its jitter, blur and crop are torchvision's and PIL's, image by image; ours give the same images (color "exact"), and
  erase before the values are normalised, as here. The random numbers differ.
Ours runs as the command line runs it on a CPU: bfloat16 where the CPU has it, channels_last. lightly's users get
float32; ``lightly, tuned`` is theirs with both.

Each runs in a process of its own (see `Apart`). Two loader workers or threads each, and torch's threads beside them.
"""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

pytest.importorskip("lightly", reason="the peer is not installed: pip install 'fastssl[bench]'")

from benchmarks.lightly_moco import CPU, SIDES, Apart, LightlyStep
from fastssl.engine.build import build_method
from fastssl.engine.config import MoCoConfig
from fastssl.engine.optimizers import make_optimizer
from fastssl.engine.step import TrainingStep
from fastssl.methods import MoCo
from fastssl.train import parse

STEPS = 10  # a round
SETUPS = {
    "demo": [],  # small_resnet32, batch 128
    "width 16, stem of stride 1, batch 256": ["--backbone=small_resnet16", "--small_images=true", "--batch_size=256"],
}


def test_same_method() -> None:
    """The same losses over several steps: forward, gradients, optimizer, momentum update and queue agree."""
    options = ["--precision=float32", "--batch_size=32", "--queue_size=128"]
    config, _ = parse(["moco", "--recipe=demo_moco", "--gpus=0", *options])
    assert isinstance(config, MoCoConfig)
    method = build_method(config, 100)
    assert isinstance(method, MoCo)
    theirs = LightlyStep(config, method)
    ours = TrainingStep(config, method.train(), make_optimizer(method, config), CPU, None)
    generator = torch.Generator().manual_seed(0)
    # More than the four steps that the queue is long; no more than that, for a rounding grows twofold or more a step.
    for _ in range(6):
        views = [torch.randn(32, 3, 32, 32, generator=generator) for _ in "qk"]
        torch.testing.assert_close(ours(views, 0.01), theirs(views, 0.01), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(method.queue.keys, theirs.criterion.memory_bank.bank, rtol=0, atol=1e-3)
    for mine, other in zip(method.encoder_k.parameters(), _momentum_parameters(theirs), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-4)


def _momentum_parameters(step: LightlyStep) -> list[torch.nn.Parameter]:
    """lightly's after the update that it would make at the start of the next step."""
    model = step.model
    pairs = (model.backbone, model.backbone_momentum), (model.projection_head, model.projection_head_momentum)
    m = step.config.momentum
    return [
        torch.nn.Parameter(m * k + (1 - m) * q)
        for online, momentum in pairs
        for q, k in zip(online.parameters(), momentum.parameters(), strict=True)
    ]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("part", ["step", "loader", "compute"])
@pytest.mark.parametrize("setup", SETUPS)
def test_throughput(benchmark: BenchmarkFixture, setup: str, part: str, side: str) -> None:
    if part == "loader" and "tuned" in side:
        pytest.skip("its loader is the other's")
    what = {"step": "whole step", "loader": "loader alone", "compute": "compute alone"}[part]
    benchmark.group = f"MoCo, {setup}: {what}, {STEPS} steps"
    with Apart(side, SETUPS[setup]) as peer:
        batch = peer("batch_size")
        benchmark.pedantic(peer, ("run", part, STEPS), rounds=5, warmup_rounds=1)
    benchmark.extra_info["images_per_second"] = round(STEPS * batch / benchmark.stats.stats.median)
