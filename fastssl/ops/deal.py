"""How a shuffle deals rows to ranks: one random permutation, cut into a share for each rank, and who gets which."""

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class Deal:
    """The part of one rank in the shuffle of a batch of B rows a rank over W ranks.

    A rank's permutation of 0…B-1 is cut into W shares of ⌊B/W⌋ rows or one more. Share j of rank s goes to rank s+1+j
    (mod W), so each rank gets B rows, of every rank nearly as many, in the order of the ranks they come from.

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
        begin = _begins(len(self.permutation), self.world)[(-self.rank - 1) % self.world]
        return torch.cat([self.permutation[begin:], self.permutation[:begin]])

    @property
    def inverse(self) -> Tensor:
        """B: where in `order` each row is."""
        return self.order.argsort()

    @property
    def sent(self) -> list[int]:
        """W: how many rows go to each rank."""
        return [share(self.rank, target, len(self.permutation), self.world) for target in range(self.world)]

    @property
    def received(self) -> list[int]:
        """W: how many rows come from each rank."""
        return [share(source, self.rank, len(self.permutation), self.world) for source in range(self.world)]

    @property
    def places(self) -> Tensor:
        """B: where each of this rank's rows is in the shuffled batches of all ranks, one after the other."""
        places = torch.empty_like(self.permutation)
        slots = _slots(len(self.permutation), self.world, self.rank)
        places[self.order] = torch.tensor(slots, dtype=torch.int64, device="cpu")
        return places


def draw(batch: int, world: int, rank: int, generator: torch.Generator) -> Deal:
    """The deal of a rank."""
    return Deal(torch.randperm(batch, generator=generator, device="cpu"), world, rank)


def share(source: int, target: int, batch: int, world: int) -> int:
    """How many rows go from one rank to another."""
    return batch // world + ((target - source - 1) % world < batch % world)


@lru_cache(64)
def _begins(batch: int, world: int) -> list[int]:
    """W: where share j begins."""
    return list(accumulate((share(0, j + 1, batch, world) for j in range(world)), initial=0))[:-1]


@lru_cache(64)
def _slots(batch: int, world: int, rank: int) -> list[int]:
    """B: for each row of `order` its place in the shuffled batches of all ranks."""
    slots: list[int] = []
    for target in range(world):
        first = target * batch + sum(share(source, target, batch, world) for source in range(rank))
        slots += range(first, first + share(rank, target, batch, world))
    return slots
