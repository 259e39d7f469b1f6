"""What is compared in test_training_step.py is one method: both lose the same, step by step, from the same weights."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from fastssl.engine.build import build_method
from fastssl.engine.config import BYOLConfig, MoCoConfig
from fastssl.engine.optimizers import make_optimizer
from fastssl.engine.step import TrainingStep
from fastssl.methods import BYOL, MoCo
from fastssl.train import parse

CPU = torch.device("cpu")
STEPS = 6  # more than the four that the queue is long; no more than that, for a rounding grows twofold or more a step


def batches() -> Iterator[list[torch.Tensor]]:
    """Two views for each step."""
    draw = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        yield [torch.randn(32, 3, 32, 32, generator=draw) for _ in "qk"]


def moved(online: nn.Module, momentum: nn.Module, m: float) -> list[torch.Tensor]:
    """lightly's momentum network after the update that it would make at the start of the next step."""
    return [m * k + (1 - m) * q for q, k in zip(online.parameters(), momentum.parameters(), strict=True)]


def test_moco() -> None:
    """Forward, gradients, optimizer, momentum update and queue agree."""
    pytest.importorskip("lightly", reason="lightly is not installed: pip install 'fastssl[bench]'")
    from benchmarks.lightly_moco import LightlyStep

    options = ["--precision=float32", "--batch_size=32", "--queue_size=128"]
    config, _ = parse(["moco", "--recipe=demo_moco", "--gpus=0", *options])
    method = build_method(config, 100)
    assert isinstance(config, MoCoConfig) and isinstance(method, MoCo)
    theirs = LightlyStep(config, method)
    ours = TrainingStep(config, method.train(), make_optimizer(method, config), CPU, None)
    for views in batches():
        torch.testing.assert_close(ours(views, 0.01), theirs(views, 0.01), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(method.queue.keys, theirs.criterion.memory_bank.bank, rtol=0, atol=1e-3)
    model = theirs.model
    expected = moved(model.backbone, model.backbone_momentum, config.momentum)
    expected += moved(model.projection_head, model.projection_head_momentum, config.momentum)
    for mine, other in zip(method.encoder_k.parameters(), expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-4)


def test_byol() -> None:
    """Likewise; the bias that only lightly's last layers have stays at zero here."""
    pytest.importorskip("lightly", reason="lightly is not installed: pip install 'fastssl[bench]'")
    from benchmarks.lightly_byol import LightlyBYOLStep

    config, _ = parse(["byol", "--recipe=demo_byol", "--gpus=0", "--precision=float32", "--batch_size=32"])
    method = build_method(config, 20)  # few, so that the momentum's schedule shows
    assert isinstance(config, BYOLConfig) and isinstance(method, BYOL)
    theirs = LightlyBYOLStep(config, method, 20)
    for head in (theirs.model.projection_head, theirs.model.prediction_head):
        head.layers[-1].bias.requires_grad_(False)
    ours = TrainingStep(config, method.train(), make_optimizer(method, config), CPU, None)
    for views in batches():
        momentum = float(method.momentum)
        torch.testing.assert_close(ours(views, 0.01), theirs(views, 0.01), rtol=1e-4, atol=1e-5)
    expected = moved(theirs.model.backbone, theirs.model.backbone_momentum, momentum)
    for mine, other in zip(method.target.backbone.parameters(), expected, strict=True):  # type: ignore[union-attr]
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-4)
