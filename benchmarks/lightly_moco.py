"""The demo recipe beside the same method in lightly: ``python -m benchmarks.lightly_moco --epochs 4 [--data DIR …]``.

lightly's side is written as its documentation writes MoCo (docs.lightly.ai, examples/moco): its projection head, loss
with memory bank, momentum update, batch shuffle, MoCoV2Transform and LightlyDataset, torch's DataLoader with two
worker processes and SGD, in float32. Network, first weights, batch, K, T, m, learning rates and the augmentation's
numbers are the recipe's on both sides. ``lightly, tuned`` is the same in bfloat16 and channels_last: what a user gets
by two lines of their own, and so how much of the difference is left to everything else.

The script trains each for equal epochs and prints kNN accuracy and images/s; `test_training_step.py` measures steps.
Options are those of ``python -m fastssl.train moco``. Needs ``pip install 'fastssl[bench]'``.
"""

import argparse
import copy
from collections.abc import Iterable
from typing import Any

import torch
from lightly.data import LightlyDataset
from lightly.loss import NTXentLoss
from lightly.models.modules import MoCoProjectionHead
from lightly.models.modules.heads import ProjectionHead
from lightly.models.utils import batch_shuffle, batch_unshuffle, deactivate_requires_grad, update_momentum
from lightly.transforms.moco_transform import MoCoV2Transform
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from benchmarks.apart import Apart
from benchmarks.lightly_byol import LightlyBYOLStep
from benchmarks.lightly_sides import CPU, WORKERS, Training, training
from fastssl.data import augmentation as aug
from fastssl.data.sources import Images, load_image
from fastssl.engine.build import build_method
from fastssl.engine.config import BYOLConfig, MoCoConfig
from fastssl.engine.device import autocast_dtype
from fastssl.methods import BYOL, MoCo
from fastssl.ops import ColorJitter, GaussianBlur, Grayscale, RandomErasing

SIDES = ("lightly", "lightly, tuned", "fastssl")
IN_MOCO_V2_TRANSFORM = (
    aug.RandomResizedCrop,
    aug.HorizontalFlip,
    ColorJitter,
    Grayscale,
    GaussianBlur,
    RandomErasing,
)


class LightlyMoCo(nn.Module):
    """The two encoders as lightly's example has them.

    Args:
        method: whose network, head and weights to take.
        config: its configuration.
    """

    def __init__(self, method: MoCo, config: MoCoConfig) -> None:
        super().__init__()
        self.backbone = copy.deepcopy(method.backbone)
        features: int = self.backbone.num_features  # type: ignore[assignment]
        if config.head == "mlp":
            self.projection_head = MoCoProjectionHead(features, features, config.dim)
        else:  # version 1 has one layer, for which lightly has no name
            self.projection_head = ProjectionHead([(features, config.dim, None, None)])
        ours = method.encoder_q.projector.parameters()  # type: ignore[union-attr]
        for theirs, parameter in zip(self.projection_head.parameters(), ours, strict=True):
            theirs.data.copy_(parameter.data)
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.projection_head_momentum)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection_head(self.backbone(x).flatten(start_dim=1))

    def forward_momentum(self, x: Tensor) -> Tensor:
        return self.projection_head_momentum(self.backbone_momentum(x).flatten(start_dim=1)).detach()


class LightlyStep:
    """One step as in lightly's example, with its shuffle-BN.

    Args:
        config: of the training.
        method: whose weights and queue to begin with.
        tuned: compute in channels_last, and in bfloat16 where the device has it.
        device: of the step.
    """

    def __init__(self, config: MoCoConfig, method: MoCo, tuned: bool = False, device: torch.device = CPU) -> None:
        self.config, self.device = config, device
        self.criterion = NTXentLoss(config.temperature, memory_bank_size=(config.queue_size, config.dim)).to(device)
        self.criterion.memory_bank.bank.copy_(method.queue.keys)
        self.order = torch.channels_last if tuned else torch.contiguous_format
        self.dtype = autocast_dtype("auto", device) if tuned else None
        self.model = LightlyMoCo(method, config).to(device).to(memory_format=self.order)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), config.lr, config.optimizer_momentum, weight_decay=config.weight_decay
        )

    def __call__(self, views: list[Tensor], rate: float) -> Tensor:
        """Make one step with the learning rate `rate`; returns the loss."""
        model = self.model
        view_q, view_k = (view.to(self.device, non_blocking=True, memory_format=self.order) for view in views)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        update_momentum(model.backbone, model.backbone_momentum, m=self.config.momentum)
        update_momentum(model.projection_head, model.projection_head_momentum, m=self.config.momentum)
        with torch.autocast(self.device.type, self.dtype or torch.bfloat16, enabled=self.dtype is not None):
            query = model(view_q)
            shuffled, permutation = batch_shuffle(view_k)
            key = batch_unshuffle(model.forward_momentum(shuffled), permutation)
        loss = self.criterion(query.float(), key.float())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()


class Pictures(Dataset[tuple[Any, int]]):
    """Our images as a dataset of torchvision's kind: picture, label."""

    transform = None  # LightlyDataset sets it

    def __init__(self, images: Images) -> None:
        self.images, self.labels = images, images.labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        picture: Image.Image = load_image(self.images, index)
        label = 0 if self.labels is None else int(self.labels[index])
        return picture if self.transform is None else self.transform(picture), label


def lightly_transform(augmentation: aug.Augmentation) -> MoCoV2Transform:
    """lightly's two views with our recipe's numbers; both views are made alike.

    Raises:
        ValueError: the recipe does what MoCoV2Transform does not, or the same in another order.
    """
    view = augmentation.views[0]
    steps: dict[Any, Any] = {type(step): step for step in view.steps}
    order = [IN_MOCO_V2_TRANSFORM.index(kind) for kind in steps if kind in IN_MOCO_V2_TRANSFORM]
    # A flip may come anywhere: nothing else prefers a side.
    flip = IN_MOCO_V2_TRANSFORM.index(aug.HorizontalFlip)
    order = [place for place in order if place != flip]
    unknown = [kind.name for kind in steps if kind not in IN_MOCO_V2_TRANSFORM]
    if unknown or order != sorted(order) or any(other != view for other in augmentation.views):
        raise ValueError(f"MoCoV2Transform cannot make these views: {augmentation}")
    off = {ColorJitter: ColorJitter(p=0.0), Grayscale: Grayscale(0.0), GaussianBlur: GaussianBlur(p=0.0)}
    jitter, gray, blur = (steps.get(kind, nothing) for kind, nothing in off.items())
    crop = steps[aug.RandomResizedCrop]
    transform = MoCoV2Transform(
        input_size=view.size,
        cj_prob=jitter.p,
        cj_bright=jitter.brightness,
        cj_contrast=jitter.contrast,
        cj_sat=jitter.saturation,
        cj_hue=jitter.hue,
        random_gray_scale=gray.p,
        gaussian_blur=blur.p,
        sigmas=blur.sigma,
        hf_prob=steps[aug.HorizontalFlip].p if aug.HorizontalFlip in steps else 0.0,
        normalize={"mean": list(view.mean), "std": list(view.std)},
    )
    # What it has no arguments for: the crop's largest area and its aspect, and erasing.
    for one in {id(one): one for one in transform.transforms}.values():  # it may use one object for both views
        parts = one.transform.transforms
        assert isinstance(parts[0], v2.RandomResizedCrop) and isinstance(parts[-1], v2.Normalize)
        parts[0] = v2.RandomResizedCrop(view.size, crop.area, crop.aspect)
        if erasing := steps.get(RandomErasing):
            parts.insert(-1, v2.RandomErasing(erasing.p, erasing.area, erasing.aspect))
    return transform


def lightly_loader(images: Images, augmentation: aug.Augmentation, batch_size: int) -> DataLoader[Any]:
    """Its dataset and transform with torch's loader and two workers; batches of (views, labels, names)."""
    dataset = LightlyDataset.from_torch_dataset(Pictures(images), transform=lightly_transform(augmentation))
    return DataLoader(
        dataset, batch_size=batch_size, shuffle=True, drop_last=True, num_workers=WORKERS, persistent_workers=True
    )


def lightly_step(
    config: MoCoConfig | BYOLConfig, method: MoCo | BYOL, total_steps: int, tuned: bool, device: torch.device = CPU
) -> LightlyStep | LightlyBYOLStep:
    """The step of the configuration's method, from the weights of `method`."""
    if isinstance(config, MoCoConfig):
        assert isinstance(method, MoCo)
        return LightlyStep(config, method, tuned, device)
    assert isinstance(method, BYOL)
    return LightlyBYOLStep(config, method, total_steps, tuned, device)


class Lightly(Training):
    """lightly's, of either method; `tuned`: in channels_last, and in bfloat16 where the CPU has it."""

    def __init__(self, method: str, options: list[str], tuned: bool = False) -> None:
        super().__init__(method, options)
        torch.manual_seed(self.config.seed)
        self.loader = lightly_loader(self.source.train, self.augmentation, self.config.batch_size)
        begin = build_method(self.config, self.total_steps)
        self.step = lightly_step(self.config, begin, self.total_steps, tuned)

    @property
    def backbone(self) -> nn.Module:
        backbone: nn.Module = self.step.model.backbone
        return backbone

    def batches(self, epoch: int) -> Iterable[list[Tensor]]:
        return (views for views, _, _ in self.loader)


def main() -> None:
    """Train all of them for equal epochs, one after the other."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.lightly_moco",
        description="Train the demo recipe for equal epochs with lightly and with fastssl; kNN accuracy and images/s.",
        epilog="All other options are those of python -m fastssl.train moco, such as --epochs 4, --seed 1, --data DIR.",
    )
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), help="which to train")
    known, options = parser.parse_known_args()
    print(f"{'':16}{'images/s':>10}{'kNN':>8}")
    for name in known.sides:
        with Apart(training, name, "moco", options) as side:
            speed, accuracy = side("train")
        print(f"{name:16}{speed:10,.0f}{accuracy:8.1%}", flush=True)


if __name__ == "__main__":
    main()
