"""What the model of time says of trainings whose speed is published: ``python -m fastssl.planning.published``."""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.engine.config import MoCoConfig
from fastssl.models import create_backbone, feature_dim
from fastssl.planning.devices import DEVICES, GIB, Device
from fastssl.planning.fake_world import world_of
from fastssl.planning.timing import Times, play
from fastssl.planning.trace import SETTLED, trace_method, trace_step

NVIDIA = "NVIDIA DeepLearningExamples, PyTorch/Classification/ConvNets/resnet50v1.5, pytorch-21.03"
# Older than what fastssl supports; here only because MoCo's authors had it.
V100 = Device(
    title="V100 SXM2", half=125e12, tf32=15.7e12, float32=15.7e12, bandwidth=0.9e12, memory=31.7 * GIB,
    convolution=0.65, link=150e9, network=12.5e9,
    source="NVIDIA V100 datasheet; without tf32, whose place float32 takes",
)  # fmt: skip


@dataclass(frozen=True)
class Published:
    """A measured speed.

    Attributes:
        what: was trained.
        device: on which.
        gpus: how many.
        batch: images a GPU and step.
        dtype: of autocast, None for float32 (tf32 on an A100).
        rate: images a second of all GPUs, measured.
        source: where it is published.
        moco: whether MoCo v2 was trained, otherwise ResNet-50 with labels.
    """

    what: str
    device: Device
    gpus: int
    batch: int
    dtype: torch.dtype | None
    rate: float
    source: str
    moco: bool = False


HALF = torch.float16
OURS = "`python -m benchmarks.trace_step`, 2026-11-22, benchmarks/results/gpu"
RATES = (
    Published("ResNet-50, mixed precision", DEVICES["a100-80"], 1, 256, HALF, 2470, NVIDIA),
    Published("ResNet-50, mixed precision", DEVICES["a100-80"], 8, 256, HALF, 16621, NVIDIA),
    Published("ResNet-50, tf32", DEVICES["a100-80"], 1, 256, None, 938, NVIDIA),
    Published("ResNet-50, tf32", DEVICES["a100-80"], 8, 256, None, 7248, NVIDIA),
    Published("ResNet-50, mixed precision", V100, 1, 256, HALF, 1156, NVIDIA),
    Published("ResNet-50, float32", V100, 1, 128, None, 356, NVIDIA),
    Published("MoCo v2, float32", V100, 8, 32, None, 1343, "53 h for 200 epochs: arXiv:1911.05722, section 4", True),
    Published("MoCo v2, bfloat16, channels_last", DEVICES["h100"], 1, 256, torch.bfloat16, 2625, OURS, True),
)  # fmt: skip


class Supervised(nn.Module):
    """A classifier with the interface of a method: what the published rates are of."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = create_backbone("resnet50")
        self.projector = nn.Linear(feature_dim(self.backbone), 1000)

    def forward(self, views: list[Tensor]) -> Tensor:
        """The cross entropy of a batch and labels that do not matter."""
        labels = torch.zeros(len(views[0]), dtype=torch.int64)
        return F.cross_entropy(self.projector(self.backbone(views[0])).float(), labels)

    def after_step(self) -> None:
        """Nothing."""

    def skip_step(self) -> None:
        """Nothing."""


def predict(one: Published) -> Times:
    """The times of a step, without what only our step does: looking for gradients that are not finite."""
    config: Any = MoCoConfig(nonfinite_limit=0, bn_splits=1)
    if one.moco:
        trace = trace_step(replace(config, channels_last=one.dtype is not None), one.gpus, one.batch, one.dtype)
    else:
        with world_of(one.gpus):
            trace = trace_method(
                config, Supervised(), one.gpus, one.batch, one.dtype, [224], warm_up=SETTLED if one.gpus > 1 else 1
            )
    return play(trace, one.device)


def table() -> str:
    """Measured and predicted rates in Markdown."""
    lines = ["| training | device | GPUs | images/s measured | images/s predicted | ÷ | source |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
    for one in RATES:
        rate = one.batch * one.gpus / predict(one).step
        lines.append(
            f"| {one.what} | {one.device.title} | {one.gpus} | {one.rate:,.0f} | {rate:,.0f} | {rate / one.rate:.2f} | "
            f"{one.source} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
