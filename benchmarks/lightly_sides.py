"""Who trains in the benchmarks of steps: ours as the command line runs it, lightly's, and the bare backbone.

Each trains in a process of its own (apart.py): the Trainer sets the memory allocator of its process, and that stays;
lightly's users have not set it.
"""

import copy
import itertools
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.clocks import peak_memory
from fastssl.data import augmentation as aug
from fastssl.engine.build import build_source
from fastssl.engine.config import MoCoConfig
from fastssl.engine.device import autocast_dtype
from fastssl.engine.schedules import learning_rate
from fastssl.engine.step import TrainingStep
from fastssl.engine.trainer import Trainer
from fastssl.evaluation.evaluator import Evaluator
from fastssl.train import parse

CPU = torch.device("cpu")
WORKERS = 2  # of a loader: processes or threads


class Training(ABC):
    """One of those compared, from images to updated weights.

    Args:
        method: "moco" or "byol".
        options: of ``python -m fastssl.train METHOD``, after its demo recipe.
    """

    loader: Any
    step: Any  # (views, learning rate) -> loss

    def __init__(self, method: str, options: list[str]) -> None:
        self.config, _ = parse([method, f"--recipe=demo_{method}", "--gpus=0", *options])
        self.augmentation = aug.load(self.config.augmentation)
        self.source = build_source(self.config, self.augmentation)
        batches = len(self.source.train) // self.config.batch_size
        self.total_steps = self.config.steps or round(self.config.epochs * batches)
        self._stream: Generator[list[Tensor], None, None] | None = None
        self._views: list[Tensor] | None = None

    @property
    @abstractmethod
    def backbone(self) -> nn.Module:
        """The network that is trained."""

    @abstractmethod
    def batches(self, epoch: int) -> Iterable[list[Tensor]]:
        """Two views of every image, in batches."""

    def ready_views(self) -> list[Tensor]:
        """Two random views, the same for everybody."""
        draw, size = torch.Generator().manual_seed(0), self.augmentation.views[0].size
        return [torch.randn(self.config.batch_size, 3, size, size, generator=draw) for _ in "qk"]

    def run(self, part: str, count: int) -> float:
        """Make `count` steps, "whole" from images on or "compute" on ready views; returns the loss of the first."""
        losses = [self.step(self._ready() if part == "compute" else self._next(), self.config.lr) for _ in range(count)]
        return float(losses[0])

    def peak_memory(self) -> int | None:
        """Bytes that a step on ready views needs at its peak beyond what was there before."""
        return peak_memory(lambda: self.run("compute", 1), "cpu")

    def train(self) -> tuple[float, float]:
        """Train to the end; returns images/s and the kNN accuracy of the features, 0…1."""
        rate = learning_rate(self.config, len(self.loader), self.total_steps)
        start = time.perf_counter()
        for number in range(self.total_steps):
            self.step(self._next(), rate(number))
        speed = self.total_steps * self.config.batch_size / (time.perf_counter() - start)
        evaluator = Evaluator(
            self.source, self.augmentation, CPU, k=self.config.knn_k, temperature=self.config.knn_temperature
        )
        accuracy = evaluator.knn(self.backbone)
        return speed, float("nan") if accuracy is None else accuracy

    def close(self) -> None:
        """End what the loader has under way."""
        if self._stream is not None:
            self._stream.close()

    def _next(self) -> list[Tensor]:
        self._stream = self._stream or endless(self.batches)
        return next(self._stream)

    def _ready(self) -> list[Tensor]:
        self._views = self._views or self.ready_views()
        return self._views


class Fastssl(Training):
    """Ours: loader and step are those of the Trainer that ``python -m fastssl.train`` runs."""

    def __init__(self, method: str, options: list[str]) -> None:
        super().__init__(method, options)
        self._folder = tempfile.TemporaryDirectory()  # the Trainer opens a run folder, and nothing is written there
        config = copy.copy(self.config)
        config.output, config.workers = f"{self._folder.name}/run", WORKERS
        trainer = Trainer(config, "benchmark")
        self.loader, self.step, self.method = trainer.loader, trainer.train_step, trainer.method
        self.method.train()

    @property
    def backbone(self) -> nn.Module:
        return self.method.backbone

    def batches(self, epoch: int) -> Iterable[list[Tensor]]:
        return self.loader.batches(epoch)

    def ready_views(self) -> list[Tensor]:
        """As its loader hands them over."""
        dtype = autocast_dtype(self.config.precision, CPU) or torch.float32
        return [view.to(dtype, memory_format=torch.channels_last) for view in super().ready_views()]


class Bare(Fastssl):
    """The passes of our step through the backbone, and nothing else."""

    def __init__(self, method: str, options: list[str]) -> None:
        super().__init__(method, options)
        self.step = BareStep(self.step)


class BareStep:
    """As many passes with and without gradient as a method makes, in the same precision.

    Args:
        step: of the method.
    """

    def __init__(self, step: TrainingStep) -> None:
        target, online = step.method.momentum_pair
        self.online, self.target, self.step = online.backbone, target.backbone, step
        self.passes = 1 if isinstance(step.config, MoCoConfig) else 2

    def __call__(self, views: list[Tensor], rate: float) -> Tensor:
        """Forward and backward; no weight moves."""
        device, dtype = self.step.device.type, self.step.dtype
        views = [view.to(device, memory_format=torch.channels_last) for view in views[: self.passes]]
        self.online.zero_grad(set_to_none=True)
        with torch.autocast(device, dtype or torch.bfloat16, enabled=dtype is not None):
            with torch.no_grad():
                for view in views:
                    self.target(view)
            total = torch.stack([self.online(view).sum() for view in views]).sum()
        total.backward()
        return total.detach()


def training(name: str, method: str, options: list[str]) -> Training:
    """The side of this name; lightly is only imported for its own."""
    if name in ("lightly", "lightly, tuned"):
        from benchmarks.lightly_moco import Lightly

        return Lightly(method, options, tuned=name != "lightly")
    return {"fastssl": Fastssl, "bare backbone": Bare}[name](method, options)


def endless(batches: Callable[[int], Iterable[list[Tensor]]]) -> Generator[list[Tensor], None, None]:
    """The batches of epoch after epoch; closing it closes the epoch under way."""
    for epoch in itertools.count():
        yield from batches(epoch)
