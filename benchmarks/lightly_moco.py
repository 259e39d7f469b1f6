"""The demo recipe beside the same method in lightly: ``python -m benchmarks.lightly_moco --epochs 4 [--data DIR …]``.

lightly's side is written as its documentation writes MoCo (docs.lightly.ai, examples/moco): its projection head, loss
with memory bank, momentum update, batch shuffle, MoCoV2Transform and LightlyDataset, torch's DataLoader with two
worker processes and SGD, in float32. Network, first weights, batch, K, T, m, learning rates and the augmentation's
numbers are the recipe's on both sides. ``lightly, tuned`` is the same in bfloat16 and channels_last: what a user gets
by two lines of their own, and so how much of the difference is left to everything else.

The script trains each for equal epochs and prints kNN accuracy and images/s; `test_lightly.py` measures the parts.
Options are those of ``python -m fastssl.train moco``. Needs ``pip install 'fastssl[bench]'``.
"""

import argparse
import copy
import itertools
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch
from lightly.data import LightlyDataset
from lightly.loss import NTXentLoss
from lightly.models.modules import MoCoProjectionHead
from lightly.models.modules.heads import ProjectionHead
from lightly.models.utils import batch_shuffle, batch_unshuffle, deactivate_requires_grad, update_momentum
from lightly.transforms import MoCoV2Transform
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from fastssl.data import augmentation as aug
from fastssl.data.sources import Images, load_image
from fastssl.engine.build import build_method, build_source
from fastssl.engine.config import Config, MoCoConfig
from fastssl.engine.device import autocast_dtype
from fastssl.engine.schedules import learning_rate
from fastssl.engine.trainer import Trainer
from fastssl.evaluation.evaluator import Evaluator
from fastssl.methods import MoCo
from fastssl.ops import ColorJitter, GaussianBlur, Grayscale, RandomErasing
from fastssl.train import parse

CPU = torch.device("cpu")
WORKERS = 2
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
        tuned: compute in channels_last, and in bfloat16 where the CPU has it.
    """

    def __init__(self, config: MoCoConfig, method: MoCo, tuned: bool = False) -> None:
        self.config, self.model = config, LightlyMoCo(method, config)
        self.criterion = NTXentLoss(config.temperature, memory_bank_size=(config.queue_size, config.dim))
        self.criterion.memory_bank.bank.copy_(method.queue.keys)
        self.order = torch.channels_last if tuned else torch.contiguous_format
        self.dtype = autocast_dtype("auto", CPU) if tuned else None
        self.model = self.model.to(memory_format=self.order)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), config.lr, config.optimizer_momentum, weight_decay=config.weight_decay
        )

    def __call__(self, views: list[Tensor], rate: float) -> Tensor:
        """Make one step with the learning rate `rate`; returns the loss."""
        model = self.model
        view_q, view_k = (view.to(memory_format=self.order) for view in views)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        update_momentum(model.backbone, model.backbone_momentum, m=self.config.momentum)
        update_momentum(model.projection_head, model.projection_head_momentum, m=self.config.momentum)
        with torch.autocast("cpu", self.dtype or torch.bfloat16, enabled=self.dtype is not None):
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
    steps: dict[type, Any] = {type(step): step for step in view.steps}
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


class Side(ABC):
    """One of those compared, from images to updated queue.

    Args:
        options: of ``python -m fastssl.train moco``, after the recipe demo_moco.
    """

    loader: Any
    step: Any  # (views, learning rate) -> loss

    def __init__(self, options: list[str]) -> None:
        config, _ = parse(["moco", "--recipe=demo_moco", "--gpus=0", *options])
        assert isinstance(config, MoCoConfig)
        self.config = config
        self.augmentation = aug.load(config.augmentation)
        self.source = build_source(config, self.augmentation)
        self.total_steps = config.steps or round(config.epochs * (len(self.source.train) // config.batch_size))
        self._stream: Iterator[list[Tensor]] | None = None
        self._batch: list[Tensor] | None = None

    @property
    @abstractmethod
    def backbone(self) -> nn.Module:
        """The network that is trained."""

    @abstractmethod
    def batches(self, epoch: int) -> Iterable[list[Tensor]]:
        """Two views of every image, in batches."""

    def batch_size(self) -> int:
        """Images a step."""
        return self.config.batch_size

    def run(self, part: str, count: int) -> None:
        """Do `part` of `count` steps: "loader", "compute" (on one batch, again and again) or "step", which is both."""
        for _ in range(count):
            views = self._batch if part == "compute" and self._batch else self._next()
            if part == "compute":
                self._batch = views
            if part != "loader":
                self.step(views, self.config.lr)

    def train(self) -> tuple[float, float]:
        """Train to the end; returns images/s and the kNN accuracy of the features, 0…1."""
        rate = learning_rate(self.config, len(self.loader), self.total_steps)
        views = itertools.chain.from_iterable(self.batches(epoch) for epoch in itertools.count())
        start = time.perf_counter()
        for number in range(self.total_steps):
            self.step(next(views), rate(number))
        speed = self.total_steps * self.config.batch_size / (time.perf_counter() - start)
        evaluator = Evaluator(
            self.source, self.augmentation, CPU, k=self.config.knn_k, temperature=self.config.knn_temperature
        )
        accuracy = evaluator.knn(self.backbone)
        return speed, float("nan") if accuracy is None else accuracy

    def _next(self) -> list[Tensor]:
        if self._stream is None:
            self._stream = itertools.chain.from_iterable(self.batches(epoch) for epoch in itertools.count())
        return next(self._stream)


class Lightly(Side):
    """lightly's."""

    tuned = False

    def __init__(self, options: list[str]) -> None:
        super().__init__(options)
        dataset = LightlyDataset.from_torch_dataset(
            Pictures(self.source.train), transform=lightly_transform(self.augmentation)
        )
        torch.manual_seed(self.config.seed)
        self.loader = DataLoader(
            dataset,
            batch_size=self.config.batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=WORKERS,
            persistent_workers=True,
        )
        method = build_method(self.config, self.total_steps)
        assert isinstance(method, MoCo)
        self.step = LightlyStep(self.config, method, self.tuned)

    @property
    def backbone(self) -> nn.Module:
        return self.step.model.backbone

    def batches(self, epoch: int) -> Iterable[list[Tensor]]:
        return (views for views, _, _ in self.loader)


class TunedLightly(Lightly):
    """The same in channels_last, and in bfloat16 where the CPU has it."""

    tuned = True


class Fastssl(Side):
    """Ours: loader and step are those of the Trainer that ``python -m fastssl.train`` runs."""

    def __init__(self, options: list[str]) -> None:
        super().__init__(options)
        self._folder = tempfile.TemporaryDirectory()  # the Trainer opens a run folder, and nothing is written there
        config: Config = copy.copy(self.config)
        config.output, config.workers = f"{self._folder.name}/run", WORKERS
        trainer = Trainer(config, "benchmark")
        self.loader, self.step, self.method = trainer.loader, trainer.train_step, trainer.method
        self.method.train()

    @property
    def backbone(self) -> nn.Module:
        return self.method.backbone

    def batches(self, epoch: int) -> Iterable[list[Tensor]]:
        return self.loader.batches(epoch)


SIDES: dict[str, type[Side]] = {"lightly": Lightly, "lightly, tuned": TunedLightly, "fastssl": Fastssl}


class Apart(AbstractContextManager["Apart"]):
    """A side in a fresh process of its own.

    The Trainer sets the memory allocator of its process (`keep_freed_memory`) and that stays; lightly's users have
    not set it.

    Args:
        name: of `SIDES`.
        options: of the side.

    Raises:
        EOFError: when the process fails, which says why on stderr.
    """

    def __init__(self, name: str, options: list[str]) -> None:
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, name, options))
        self._process.start()
        theirs.close()  # so that its end is seen here

    def __call__(self, name: str, *arguments: Any) -> Any:
        """Call a method of the side, and wait for what it returns."""
        self._pipe.send((name, arguments))
        return self._pipe.recv()

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._process.join(timeout=20)
        if self._process.is_alive():
            self._process.kill()


def _serve(pipe: Connection, name: str, options: list[str]) -> None:
    side = SIDES[name](options)
    while True:
        try:
            method, arguments = pipe.recv()
        except EOFError:
            return
        pipe.send(getattr(side, method)(*arguments))


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
        with Apart(name, options) as side:
            speed, accuracy = side("train")
        print(f"{name:16}{speed:10,.0f}{accuracy:8.1%}", flush=True)


if __name__ == "__main__":
    main()
