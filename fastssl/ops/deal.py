"""How a shuffle deals rows to ranks: one random permutation, cut into a share for each rank, and who gets which."""

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class Deal:
    """The part of one rank in the shuffle of a batch of B rows a rank over W ranks.

    All ranks draw the same permutation of 0…B-1 and cut it into W shares of ⌊B/W⌋ or one more. Share j of rank s goes
    to rank s+j (mod W), so each rank gets B rows, of every rank nearly as many, in the order of the ranks they come
    from.

    Attributes:
        permutation: B, of local rows.
        world, rank: W, and which rank this is.
    """

    permutation: Tensor
    world: int
    rank: int

    @property
    def order(self) -> Tensor:
        """B: this rank's rows in the order of the ranks they go to."""
        begin = _begins(len(self.permutation), self.world)[-self.rank % self.world]
        return torch.cat([self.permutation[begin:], self.permutation[:begin]])

    @property
    def inverse(self) -> Tensor:
        """B: where in `order` each row is."""
        return self.order.argsort()

    @property
    def sent(self) -> list[int]:
        """W: how many rows go to each rank."""
        return [_share(target - self.rank, len(self.permutation), self.world) for target in range(self.world)]

    @property
    def received(self) -> list[int]:
        """W: how many rows come from each rank."""
        return [_share(self.rank - source, len(self.permutation), self.world) for source in range(self.world)]

    @property
    def places(self) -> Tensor:
        """B: where each of this rank's rows is in the shuffled batches of all ranks, one after the other."""
        places = torch.empty_like(self.permutation)
        places[self.order] = _slots(len(self.permutation), self.world, self.rank)
        return places

    @property
    def arriving(self) -> Tensor:
        """B: the rows that this rank gets, counted through the batches of all ranks."""
        batch, shares = len(self.permutation), self.permutation.split(_shares(len(self.permutation), self.world))
        return torch.cat([source * batch + shares[(self.rank - source) % self.world] for source in range(self.world)])


def draw(batch: int, world: int, rank: int, generator: torch.Generator) -> Deal:
    """A deal from a generator that is in the same state on all ranks."""
    return Deal(torch.randperm(batch, generator=generator), world, rank)


def _share(j: int, batch: int, world: int) -> int:
    """Rows in share j (mod W)."""
    return batch // world + (j % world < batch % world)


def _shares(batch: int, world: int) -> list[int]:
    return [_share(j, batch, world) for j in range(world)]


@lru_cache(64)
def _begins(batch: int, world: int) -> list[int]:
    """W: where each share begins."""
    return list(accumulate(_shares(batch, world), initial=0))[:-1]


@lru_cache(64)
def _slots(batch: int, world: int, rank: int) -> Tensor:
    """B: for each row of `order` its place in the shuffled batches of all ranks."""
    slots = []
    for target in range(world):
        before = sum(_share(target - source, batch, world) for source in range(rank))
        first = target * batch + before
        slots.append(torch.arange(first, first + _share(target - rank, batch, world)))
    return torch.cat(slots)
