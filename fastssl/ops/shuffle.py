"""Shuffle-BN: deal the rows of the global batch out to the ranks anew, and bring the keys back."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from fastssl.errors import FastsslError
from fastssl.ops import backend, deal, library, reference

# Permutations are drawn and sizes compared on the host: torch.compile leaves these functions as they are.
_on_the_host = torch.compiler.disable


@dataclass(frozen=True)
class ShuffleHandle:
    """A shuffle under way, and what it takes to undo it."""

    deal: deal.Deal
    group: dist.ProcessGroup | None = field(repr=False)
    shuffled: Tensor = field(repr=False)
    sizes: "_SizesOnTheirWay | None" = field(repr=False)

    @_on_the_host
    def wait(self) -> None:
        """Return when the shuffled rows may be read: on the CPU when they are here, on a GPU when its stream knows.

        Raises:
            ValueError: the batch size differs between ranks.
            RuntimeError: a rank has died or did not take part within the process group's timeout.
        """
        with _named("shuffle_batch"):
            if self.sizes is not None:
                self.sizes.check()
            if self.deal.world > 1:
                _wait(self.shuffled)


@_on_the_host
def shuffle_batch(
    x: Tensor, *, generator: torch.Generator, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, ShuffleHandle]:
    """Shuffle the rows of the global batch across ranks (MoCo's shuffle-BN, arXiv:1911.05722, section 3.3).

    Every rank receives rows of every rank, an equal share or one more, so that no rank's batch statistics give a
    positive pair away. An all-to-all moves each row once, as it is, of any dtype; it runs while you compute something
    else, until ``handle.wait()``. One process: a local permutation.

    Args:
        x: B×…, this rank's rows; B must be the same on all ranks.
        generator: on the CPU and in the same state on every rank: all draw the same permutation, nothing but rows
            travels.
        group: the process group, with gloo for CPU tensors and nccl for CUDA's; None is the default one.

    Returns:
        The shuffled rows (B×…, no gradient; read them after ``handle.wait()``) and the handle for `unshuffle_batch`.

    Raises:
        ValueError: B differs between ranks, `x` has no rows, or the generator is not on the CPU.
        RuntimeError: a rank has died or did not take part within the process group's timeout.

    Example:
        >>> x = torch.randn(8, 3, 32, 32)
        >>> shuffled, handle = shuffle_batch(x, generator=torch.Generator())
        >>> handle.wait()
        >>> bool((unshuffle_batch(shuffled, handle) == x).all())
        True
    """
    if x.dim() == 0:
        raise FastsslError("shuffle_batch: x must have rows, got a tensor without dimensions")
    if generator.device.type != "cpu":
        raise FastsslError(
            f"shuffle_batch: the generator must be on the CPU, where all ranks' are alike, not on {generator.device}"
        )
    world, rank = reference.world_size(group), reference.rank(group)
    run = backend.implementation("shuffle_batch", x.device, x.dtype)
    with _named("shuffle_batch"):
        sizes = _exchange_sizes(x, group) if world > 1 else None
        drawn = deal.draw(len(x), world, rank, generator)
        shuffled: Tensor = run(x.detach(), drawn, group)
    return shuffled, ShuffleHandle(drawn, group, shuffled, sizes)


@_on_the_host
def unshuffle_batch(keys: Tensor, handle: ShuffleHandle) -> Tensor:
    """Bring rows computed from a shuffled batch back: row i belongs to row i of the `x` that was shuffled.

    Args:
        keys: B×…, one row for each shuffled row; no gradient flows.
        handle: from `shuffle_batch`.

    Raises:
        ValueError: the number of rows is another.
        RuntimeError: a rank has died or did not take part within the process group's timeout.
    """
    _check_rows("unshuffle_batch", keys, handle)
    run = backend.implementation("unshuffle_batch", keys.device, keys.dtype)
    with _named("unshuffle_batch"):
        restored: Tensor = run(keys.detach(), handle.deal, handle.group)
    return restored


@_on_the_host
def unshuffle_and_gather(keys: Tensor, handle: ShuffleHandle) -> tuple[Tensor, Tensor]:
    """`unshuffle_batch` and the keys of all ranks, for a queue that is to be the same on each, in one collective.

    Args:
        keys: B×…, one row for each shuffled row; no gradient flows.
        handle: from `shuffle_batch`.

    Returns:
        The rows in the order of the `x` that was shuffled (B×…), and those of all W ranks (W·B×…) in an order that is
        the same on each; with one process, the same rows twice.

    Raises:
        ValueError: the number of rows is another.
        RuntimeError: a rank has died or did not take part within the process group's timeout.
    """
    _check_rows("unshuffle_and_gather", keys, handle)
    with _named("unshuffle_and_gather"):
        everyone = reference.gather(keys.detach(), handle.group)
        restored = everyone.index_select(0, handle.deal.places.to(keys.device))
    return restored, restored if handle.deal.world == 1 else everyone


def _shuffle(name: str, x: Tensor, drawn: deal.Deal, group: dist.ProcessGroup | None) -> Tensor:
    order, name_of_group = drawn.order.to(x.device), _group_name(group, drawn.world)
    exchanged: Tensor = library.call("exchange_rows", name, x, order, drawn.sent, drawn.received, name_of_group)
    return exchanged


def _unshuffle(name: str, keys: Tensor, drawn: deal.Deal, group: dist.ProcessGroup | None) -> Tensor:
    if drawn.world > 1:
        name_of_group = _group_name(group, drawn.world)
        keys = _wait(library.call("exchange_rows", name, keys, None, drawn.received, drawn.sent, name_of_group))
    return keys.index_select(0, drawn.inverse.to(keys.device))


def _group_name(group: dist.ProcessGroup | None, world: int) -> str:
    """By which C++ finds the group; one process needs none."""
    if world == 1:
        return ""
    name: str = (dist.group.WORLD if group is None else group).group_name  # type: ignore[union-attr]
    return name


def _wait(x: Tensor) -> Tensor:
    waited: Tensor = torch.ops._c10d_functional.wait_tensor(x)
    return waited


class _SizesOnTheirWay:
    """Batch sizes copied from the GPU: the host waits for them when it waits for the shuffle, and for no more."""

    def __init__(self, sizes: Tensor) -> None:
        self.sizes = torch.empty(sizes.shape, dtype=sizes.dtype, pin_memory=True).copy_(sizes, non_blocking=True)
        self.here = torch.cuda.Event()
        self.here.record(torch.cuda.current_stream(sizes.device))

    def check(self) -> None:
        self.here.synchronize()
        _check_sizes(self.sizes)


def _exchange_sizes(x: Tensor, group: dist.ProcessGroup | None) -> _SizesOnTheirWay | None:
    """Check that batch sizes agree: on the CPU at once, on a GPU in `ShuffleHandle.wait`."""
    sizes = reference.gather(torch.full((1,), len(x), device=x.device), group)
    if x.device.type != "cpu":
        return _SizesOnTheirWay(sizes)
    _check_sizes(sizes)
    return None


def _check_sizes(sizes: Tensor) -> None:
    if len(set(sizes.tolist())) > 1:
        raise FastsslError(f"shuffle_batch: batch sizes differ between ranks: {sizes.tolist()}")


def _check_rows(op: str, keys: Tensor, handle: ShuffleHandle) -> None:
    rows = len(handle.deal.permutation)
    if keys.dim() == 0 or len(keys) != rows:
        raise FastsslError(f"{op}: {rows} rows were shuffled, got keys of shape {tuple(keys.shape)}")


@contextmanager
def _named(op: str) -> Iterator[None]:
    """Errors of the process group do not say which op they come from."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise RuntimeError(f"{op}: the exchange with the other ranks failed; has one of them died? {error}") from error


def _fake(x: Tensor, order: Tensor | None, send: list[int], receive: list[int], group: str) -> Tensor:
    layout = torch._prims_common.suggest_memory_format(x)
    return torch.empty((sum(receive), *x.shape[1:]), dtype=x.dtype, device=x.device, memory_format=layout)


library.define(
    "exchange_rows", "(Tensor x, Tensor? order, SymInt[] send, SymInt[] receive, str group) -> Tensor", fake=_fake
)
for _op, _function, _reference in (
    ("shuffle_batch", _shuffle, reference.shuffle_batch),
    ("unshuffle_batch", _unshuffle, reference.unshuffle_batch),
):
    for _name, _implementation in library.compiled_implementations(_function).items():
        backend.register(_op, _name, _implementation)
    backend.register(_op, "reference", backend.Implementation(_reference))
