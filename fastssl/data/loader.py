"""Batches of views: the order of the images and every augmentation follow from (seed, epoch, image) alone.

So a resumed run sees what an uninterrupted one would have seen, whatever the number of workers.
"""

import hashlib
import signal
from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms.v2.functional import to_pil_image

from fastssl.data import batched, per_image
from fastssl.data.augmentation import Augmentation, View
from fastssl.data.sources import ArrayImages, FolderImages, Images, read_image
from fastssl.errors import FastsslError


class Loader(Protocol):
    """What the trainer needs of any loader."""

    def __len__(self) -> int:
        """Batches an epoch; images that do not fill the last one are left to the next epoch's order."""

    def batches(self, epoch: int, start: int = 0) -> Iterator[list[Tensor]]:
        """The batches of an epoch from number `start` on; each a list of views, N×3×size×size, normalised."""


def make_loader(
    images: Images,
    augmentation: Augmentation,
    batch_size: int,
    *,
    kind: str = "auto",
    device: torch.device | None = None,
    workers: int = 0,
    seed: int = 0,
) -> Loader:
    """Make the loader that fits the images.

    Args:
        images: in memory or in a folder.
        augmentation: the views to make.
        batch_size: images a batch.
        kind: "batched" (whole batches, images in memory), "torchvision" (one image at a time), or "auto".
        device: where "batched" makes the views.
        workers: processes of "torchvision".
        seed: of order and augmentations.

    Raises:
        FastsslError: fewer images than one batch, or "batched" for images that are not in memory.
    """
    if batch_size > len(images):
        raise FastsslError(
            f"batch_size {batch_size} is larger than the {len(images)} training images: "
            f"use --batch_size {len(images)} or less"
        )
    if kind == "auto":
        kind = "batched" if isinstance(images, ArrayImages) else "torchvision"
    if kind == "torchvision":
        return TorchvisionLoader(images, augmentation, batch_size, workers=workers, seed=seed)
    if not isinstance(images, ArrayImages):
        raise FastsslError(
            "loader batched needs images of one size that fit in memory, and these differ or are too many: "
            "use --loader torchvision"
        )
    return BatchedLoader(images, augmentation, batch_size, device=device or torch.device("cpu"), seed=seed)


class BatchedLoader:
    """Keeps the images on the device and augments a batch at a time there."""

    def __init__(
        self, images: ArrayImages, augmentation: Augmentation, batch_size: int, *, device: torch.device, seed: int
    ) -> None:
        self.pixels = images.pixels.to(device)
        self.views, self.batch_size, self.seed = augmentation.views, batch_size, seed

    def __len__(self) -> int:
        return len(self.pixels) // self.batch_size

    def batches(self, epoch: int, start: int = 0) -> Iterator[list[Tensor]]:
        """See `Loader`."""
        order = epoch_order(len(self.pixels), self.seed, epoch)
        for number in range(start, len(self)):
            rows = order[number * self.batch_size : (number + 1) * self.batch_size].to(self.pixels.device)
            generator = torch.Generator().manual_seed(mixed_seed(self.seed, epoch, number))
            images = self.pixels[rows]
            yield [batched.execute(view, images, generator) for view in self.views]


class TorchvisionLoader:
    """Decodes and augments one image at a time with torchvision, in worker processes."""

    def __init__(self, images: Images, augmentation: Augmentation, batch_size: int, *, workers: int, seed: int) -> None:
        self.batch_size, self.seed, self.count = batch_size, seed, len(images)
        self._epoch = _Epoch()
        self._loader = _data_loader(_Views(images, augmentation.views, seed), self._epoch, workers, persistent=True)

    def __len__(self) -> int:
        return self.count // self.batch_size

    def batches(self, epoch: int, start: int = 0) -> Iterator[list[Tensor]]:
        """See `Loader`."""
        order = epoch_order(self.count, self.seed, epoch).tolist()
        self._epoch.samples = [
            [(epoch, index) for index in order[number * self.batch_size : (number + 1) * self.batch_size]]
            for number in range(start, len(self))
        ]
        yield from _checked(self._loader)


def view_batches(
    images: Images, view: View, batch_size: int, *, device: torch.device, workers: int = 0, seed: int = 0
) -> Iterator[Tensor]:
    """One view of every image, in order: for features, kNN and retrieval."""
    if isinstance(images, ArrayImages):
        generator = torch.Generator().manual_seed(mixed_seed(seed, "views"))
        for chunk in images.pixels.split(batch_size):
            yield batched.execute(view, chunk.to(device), generator)
        return
    batches = [
        [(0, index) for index in range(first, min(first + batch_size, len(images)))]
        for first in range(0, len(images), batch_size)
    ]
    loader = _data_loader(_Views(images, (view,), seed), batches, workers)
    for [views] in _checked(loader):
        yield views.to(device)


def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """The order of the images in an epoch."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(mixed_seed(seed, epoch, "order")))


def mixed_seed(*parts: object) -> int:
    """One seed out of several numbers or words, the same in every process; neighbours give unrelated ones."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest(), "big")


def _data_loader(
    views: "_Views", batches: Iterable[list[tuple[int, int]]], workers: int, persistent: bool = False
) -> "DataLoader[Sample]":
    return DataLoader(
        views,
        batch_sampler=batches,
        num_workers=workers,
        persistent_workers=persistent and workers > 0,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_leave_ctrl_c_to_the_trainer,
        generator=torch.Generator(),  # its draws must not move torch's own random state
        collate_fn=_collate,
    )


class _Epoch(Sampler[list[tuple[int, int]]]):
    """A batch sampler whose content the loader sets before each epoch; the workers stay."""

    def __init__(self) -> None:
        self.samples: list[list[tuple[int, int]]] = []

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter(self.samples)

    def __len__(self) -> int:
        return len(self.samples)


Sample = list[Tensor] | FastsslError


class _Views(Dataset[Sample]):
    """Views of image `index`, drawn from (seed, epoch, index)."""

    def __init__(self, images: Images, views: tuple[View, ...], seed: int) -> None:
        self.images, self.seed = images, seed
        self.transforms = [per_image.transform(view) for view in views]

    def __getitem__(self, sample: tuple[int, int]) -> Sample:
        epoch, index = sample
        try:
            if isinstance(self.images, FolderImages):
                image = read_image(self.images.paths[index])
            else:
                image = to_pil_image(self.images.pixels[index])
        except FastsslError as error:
            return error  # raised in the main process: a worker's exception would bring its traceback along
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mixed_seed(self.seed, epoch, index))
            return [transform(image) for transform in self.transforms]


def _leave_ctrl_c_to_the_trainer(worker: int) -> None:
    """A terminal sends Ctrl-C to all processes, and workers that die of it take the trainer along.

    SIGTERM stays theirs: it is how the trainer itself ends them.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _collate(samples: list[Sample]) -> Sample:
    views: list[list[Tensor]] = []
    for sample in samples:
        if isinstance(sample, FastsslError):
            return sample
        views.append(sample)
    return [torch.stack(batch) for batch in zip(*views, strict=True)]


def _checked(loader: DataLoader[Sample]) -> Iterator[list[Tensor]]:
    for batch in loader:
        if isinstance(batch, FastsslError):
            raise batch
        yield batch
