"""Shuffle-BN: deal the rows of the global batch out to the ranks anew, and bring the keys back."""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from fastssl.errors import FastsslError
from fastssl.ops import backend, reference

backend.register("shuffle_batch", "reference", backend.Implementation(reference.shuffle_batch))


@dataclass(frozen=True)
class ShuffleHandle:
    """What `unshuffle_batch` needs to undo a shuffle."""

    inverse: Tensor  # B: where this rank's own rows are in the shuffled global batch
    group: dist.ProcessGroup | None = field(repr=False)

    def wait(self) -> None:
        """Return when the shuffled rows may be read."""


def shuffle_batch(
    x: Tensor, *, generator: torch.Generator, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, ShuffleHandle]:
    """Shuffle the rows of the global batch across ranks (MoCo's shuffle-BN, arXiv:1911.05722, section 3.3).

    Every rank receives rows of every rank, an equal share or one more, so that no rank's batch statistics give a
    positive pair away. One process: a local permutation.

    Args:
        x: B×…, this rank's rows; B must be the same on all ranks.
        generator: on the CPU and in the same state on every rank: all draw the same permutation, nothing but rows
            travels.
        group: the process group; None is the default one.

    Returns:
        The shuffled rows (B×…, no gradient; read them after ``handle.wait()``) and the handle for `unshuffle_batch`.

    Raises:
        ValueError: B differs between ranks.

    Example:
        >>> x = torch.randn(8, 3, 32, 32)
        >>> shuffled, handle = shuffle_batch(x, generator=torch.Generator())
        >>> bool((unshuffle_batch(shuffled, handle) == x).all())
        True
    """
    batch, world, rank = len(x), reference.world_size(group), reference.rank(group)
    if world > 1:
        sizes = reference.gather(torch.tensor([batch], device=x.device), group).tolist()
        if len(set(sizes)) > 1:
            raise FastsslError(f"shuffle_batch: batch sizes differ between ranks: {sizes}")
    order = global_permutation(batch, world, generator)
    inverse = order.argsort()
    mine = slice(rank * batch, (rank + 1) * batch)
    run = backend.implementation("shuffle_batch", x.device, x.dtype)
    shuffled: Tensor = run(x.detach(), order[mine].to(x.device), group)
    return shuffled, ShuffleHandle(inverse[mine].to(x.device), group)


def unshuffle_batch(keys: Tensor, handle: ShuffleHandle) -> Tensor:
    """Bring rows computed from a shuffled batch back: row i belongs to row i of the `x` that was shuffled.

    Args:
        keys: B×…, one row for each shuffled row; no gradient flows.
        handle: from `shuffle_batch`.
    """
    if len(keys) != len(handle.inverse):
        raise FastsslError(f"unshuffle_batch: {len(handle.inverse)} rows were shuffled, got {len(keys)}")
    run = backend.implementation("shuffle_batch", keys.device, keys.dtype)
    restored: Tensor = run(keys.detach(), handle.inverse, handle.group)
    return restored


def global_permutation(batch: int, world: int, generator: torch.Generator) -> Tensor:
    """A balanced random order of the world·batch rows: entry i is the row that position i of the shuffled batch gets.

    Each rank deals ⌊batch/world⌋ of its rows to each rank, and the rows left over one each to the ranks after it.
    """
    dealt = []  # dealt[source][target]: rows
    for source in range(world):
        rows = source * batch + torch.randperm(batch, generator=generator)
        sizes = [batch // world + ((target - source) % world < batch % world) for target in range(world)]
        dealt.append(rows.split(sizes))
    received = [torch.cat([dealt[source][target] for source in range(world)]) for target in range(world)]
    return torch.cat([rows[torch.randperm(batch, generator=generator)] for rows in received])
