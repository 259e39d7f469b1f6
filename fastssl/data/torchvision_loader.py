"""Decodes and augments one image at a time with torchvision, in worker processes; needs nothing but torchvision."""

import os
import signal
from collections.abc import Generator, Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from fastssl.data import per_image
from fastssl.data.augmentation import View
from fastssl.data.loading import Loading
from fastssl.data.order import Order, mixed_seed
from fastssl.data.sources import Images, load_image
from fastssl.errors import FastsslError

GRACE = 20  # seconds that a worker goes on after a SIGTERM


class TorchvisionLoader:
    """The views of each image follow from (seed, epoch, image), whatever the number of workers; see `Loader`."""

    def __init__(self, images: Images, views: tuple[View, ...], order: Order, options: Loading) -> None:
        self.order, self.options = order, options
        self._epoch = _Epoch(order)
        self._open = False
        self._loader = DataLoader(
            _Views(images, views, options),
            batch_sampler=self._epoch,
            num_workers=options.workers,
            prefetch_factor=options.prefetch if options.workers else None,
            persistent_workers=options.workers > 0,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_leave_signals_to_the_trainer,
            generator=torch.Generator(),  # its draws must not move torch's own random state
            collate_fn=_collate,
        )

    def __len__(self) -> int:
        return len(self.order)

    def batches(self, epoch: int, start: int = 0) -> Generator[list[Tensor], None, None]:
        """See `Loader`."""
        if self._open:
            raise FastsslError("an iterator of this loader has not come to its end: close() it before the next")
        self._open = True
        self._epoch.place = epoch, start
        try:
            for batch in self._loader:
                if isinstance(batch, FastsslError):
                    raise batch
                yield [view.to(self.options.device, non_blocking=True) for view in batch]
        finally:
            self._open = False

    @property
    def executor(self) -> dict[str, str]:
        """See `Loader`."""
        return {"loader": "torchvision"}


class _Epoch(Sampler[list[tuple[int, int]]]):
    """A batch sampler whose place the loader sets before each epoch; the workers stay."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.place = (0, 0)  # epoch, batch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, start = self.place
        for _, batch in self.order.batches(epoch, start):
            yield [(epoch, index) for index in batch.tolist()]

    def __len__(self) -> int:
        return len(self.order) - self.place[1]


Sample = list[Tensor] | FastsslError


class _Views(Dataset[Sample]):
    """Views of image `index`, drawn from (seed, epoch, index)."""

    def __init__(self, images: Images, views: tuple[View, ...], options: Loading) -> None:
        self.images, self.seed, self.dtype = images, options.seed, options.dtype
        self.transforms = [per_image.transform(view) for view in views]

    def __getitem__(self, sample: tuple[int, int]) -> Sample:
        epoch, index = sample
        try:
            image = load_image(self.images, index)
        except FastsslError as error:
            return error  # raised in the main process: a worker's exception would bring its traceback along
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mixed_seed(self.seed, epoch, index))
            return [transform(image).to(self.dtype) for transform in self.transforms]


def _collate(samples: list[Sample]) -> Sample:
    views: list[list[Tensor]] = []
    for sample in samples:
        if isinstance(sample, FastsslError):
            return sample
        views.append(sample)
    return [torch.stack(batch) for batch in zip(*views, strict=True)]


def _leave_signals_to_the_trainer(worker: int) -> None:
    """A terminal or a scheduler sends its signal to the group of processes, and workers that die of it take us along.

    In a group of their own they are spared a terminal's. Some schedulers send SIGTERM to every single process: then the
    trainer needs its workers for another step, and the time to save. It ends them by a message; should it come to a
    SIGTERM of its own, they end a little later.
    """
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE))
