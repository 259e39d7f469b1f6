"""Which images come when: a pure function of (seed, epoch), dealt to the ranks, so that a run can go on anywhere."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

LAST_BATCHES = ("drop", "fill", "partial")
OPEN_SHARDS = 16  # whose images are mixed with each other: shards are read in runs, not jumped about in


@dataclass(frozen=True)
class Order:
    """The order of the images of each epoch, cut into batches.

    Args:
        count: images.
        batch_size: images a batch of one rank.
        seed: of the order.
        rank, world: the batch `n` of the world is cut into `world` parts, the rank's own is number `rank`.
        last_batch: what happens to images that do not fill the last batch of the world: "drop" leaves them to the
            next epoch's order, "fill" adds the first ones of this epoch once more, "partial" makes smaller batches
            (of several ranks some may get nothing).
        shuffle: a new order every epoch; otherwise the images' own.
        shards: of each image the shard it lies in (N int64), or None: images of at most `OPEN_SHARDS` shards are mixed
            at a time, and which shards these are changes every epoch.
    """

    count: int
    batch_size: int
    seed: int = 0
    rank: int = 0
    world: int = 1
    last_batch: str = "drop"
    shuffle: bool = True
    shards: Tensor | None = None

    def __len__(self) -> int:
        """Batches an epoch."""
        size = self.batch_size * self.world
        return self.count // size if self.last_batch == "drop" else -(-self.count // size)

    def batches(self, epoch: int, start: int = 0) -> Iterator[tuple[int, Tensor]]:
        """Numbers and images (int64) of this rank's batches in an epoch, from batch `start` on."""
        images, size = self.images(epoch), self.batch_size * self.world
        for number in range(start, len(self)):
            batch = images[number * size : (number + 1) * size]
            if self.last_batch == "fill" and len(batch) < size:
                batch = torch.cat([batch, images.repeat(-(-size // self.count))])[:size]
            yield number, torch.tensor_split(batch, self.world)[self.rank]

    def images(self, epoch: int) -> Tensor:
        """All images in the order of an epoch."""
        if not self.shuffle:
            return torch.arange(self.count)
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, epoch, "order"))
        if self.shards is None:
            return torch.randperm(self.count, generator=generator)
        place = torch.randperm(int(self.shards.max()) + 1, generator=generator)[self.shards] // OPEN_SHARDS
        return (place + torch.rand(self.count, dtype=torch.float64, generator=generator)).argsort()


def mixed_seed(*parts: object) -> int:
    """One seed out of several numbers or words, the same in every process; neighbours give unrelated ones."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest(), "big")


def mixed_generator(*parts: object) -> torch.Generator:
    """A generator seeded by `mixed_seed`."""
    return torch.Generator().manual_seed(mixed_seed(*parts))
