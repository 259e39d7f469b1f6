"""Shuffle-BN: deal the rows of the global batch out to the ranks anew, and bring the keys back."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor

from fastssl.errors import FastsslError
from fastssl.ops import backend, deal, library, reference

# Permutations are drawn and sizes compared on the host: torch.compile leaves these functions as they are. This is
# torch.compiler.disable, but it imports the compiler at the first call: over a second, which every op would wait for.
_on_the_host = torch._compile._disable_dynamo


@dataclass(frozen=True, eq=False)
class ShuffleHandle:
    """A shuffle under way, and what it takes to undo it."""

    deal: deal.Deal
    group: dist.ProcessGroup | None = field(repr=False)
    exchange: "_Exchange | None" = field(repr=False)
    headers: "_Headers | None" = field(repr=False)

    @_on_the_host
    def wait(self) -> None:
        """Return when the shuffled rows may be read: on the CPU when they are here, on a GPU when its stream knows.

        Raises:
            ValueError: the batches of the ranks differ in size, shape, dtype or memory format.
            RuntimeError: a rank has died or did not take part within the process group's timeout.
        """
        if self.headers is not None:
            self.headers.check()
        if self.exchange is not None:
            with _named("shuffle_batch"):
                self.exchange.wait()


@_on_the_host
def shuffle_batch(
    x: Tensor, *, generator: torch.Generator, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, ShuffleHandle]:
    """Shuffle the rows of the global batch across ranks (MoCo's shuffle-BN, arXiv:1911.05722, section 3.3).

    Every rank receives of every rank ⌊B/W⌋ rows or one more, so that no rank's batch statistics give a positive pair
    away. An all-to-all moves each row once, as it is, of any dtype; it runs while you compute something else, until
    ``handle.wait()``. One process: a local permutation.

    Args:
        x: B×…, this rank's rows; the batches of all ranks must be alike in size, shape, dtype and memory format. You
            may write to `x` afterwards: its rows have been copied.
        generator: on the CPU, made once: it permutes this rank's rows before they are dealt, anew at each call. The
            ranks' may differ; seeded alike, the state in one rank's checkpoint serves all.
        group: the process group, with gloo for CPU tensors and nccl for CUDA's; None is the default one.

    Returns:
        The shuffled rows (B×…, no gradient, in the order of the ranks they come from; read them after
        ``handle.wait()``) and the handle for `unshuffle_batch`.

    Raises:
        ValueError: the batches of the ranks differ (told here for CPU tensors, by ``handle.wait()`` for CUDA's, when
            an nccl group is of no more use), `x` is 0-d, the generator is not on the CPU, or this process is not
            in the group.
        RuntimeError: a rank has died or did not take part within the process group's timeout.

    Example:
        >>> x, generator = torch.randn(8, 3, 32, 32), torch.Generator()
        >>> shuffled, handle = shuffle_batch(x, generator=generator)
        >>> handle.wait()
        >>> bool((unshuffle_batch(shuffled, handle) == x).all())
        True
    """
    if x.dim() == 0:
        raise FastsslError("shuffle_batch: x must have rows, got a tensor without dimensions")
    if generator.device.type != "cpu":
        raise FastsslError(f"shuffle_batch: the generator must be on the CPU, not on {generator.device}")
    world, rank = reference.world_size(group), reference.rank(group)
    if rank < 0:
        raise FastsslError("shuffle_batch: this process is not in the group")
    headers = _Headers(x, group) if world > 1 else None
    drawn = deal.draw(len(x), world, rank, generator)
    run = backend.implementation("shuffle_batch", x.device, x.dtype)
    with _named("shuffle_batch"):
        shuffled, exchange = run(x.detach(), drawn, group)
    return shuffled, ShuffleHandle(drawn, group, exchange, headers)


@_on_the_host
def unshuffle_batch(keys: Tensor, handle: ShuffleHandle) -> Tensor:
    """Bring rows computed from a shuffled batch back: row i belongs to row i of the `x` that was shuffled.

    Args:
        keys: B×…, one row for each shuffled row, alike in shape and dtype on all ranks; no gradient flows.
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
        keys: B×…, one row for each shuffled row, alike in shape and dtype on all ranks; no gradient flows.
        handle: from `shuffle_batch`.

    Returns:
        The rows in the order of the `x` that was shuffled (B×…), and those of all W ranks (W·B×…) in an order that is
        the same on each; with one process, the same tensor twice.

    Raises:
        ValueError: the number of rows is another.
        RuntimeError: a rank has died or did not take part within the process group's timeout.

    Example:
        >>> shuffled, handle = shuffle_batch(torch.randn(8, 3), generator=torch.Generator())
        >>> handle.wait()
        >>> key, everyone = unshuffle_and_gather(shuffled * 2, handle)  # the loss takes `key`, the queue `everyone`
    """
    _check_rows("unshuffle_and_gather", keys, handle)
    with _named("unshuffle_and_gather"):
        everyone = reference.gather(keys.detach(), handle.group)
    restored = everyone.index_select(0, _send(handle.deal.places, keys.device))
    return restored, restored if handle.deal.world == 1 else everyone


class _Exchange:
    """Rows that are on their way. The collective is known until this object is gone."""

    def __init__(
        self, name: str, x: Tensor, order: Tensor | None, send: list[int], receive: list[int], group: str
    ) -> None:
        self.name = name
        self.rows: Tensor = library.call("exchange_rows", name, x, order, send, receive, group)
        weakref.finalize(self, library.call, "forget_rows", name, self.rows)

    def wait(self) -> None:
        """Also a second time, and on several threads; an exchange that failed raises each time."""
        library.call("wait_rows", self.name, self.rows)


def _shuffle(name: str, x: Tensor, drawn: deal.Deal, group: dist.ProcessGroup | None) -> tuple[Tensor, _Exchange]:
    exchange = _Exchange(name, x, _send(drawn.order, x.device), drawn.sent, drawn.received, _group_name(group, drawn))
    return exchange.rows, exchange


def _unshuffle(name: str, keys: Tensor, drawn: deal.Deal, group: dist.ProcessGroup | None) -> Tensor:
    if drawn.world > 1:
        exchange = _Exchange(name, keys, None, drawn.received, drawn.sent, _group_name(group, drawn))
        exchange.wait()
        keys = exchange.rows
    return keys.index_select(0, _send(drawn.inverse, keys.device))


def _reference_shuffle(x: Tensor, drawn: deal.Deal, group: dist.ProcessGroup | None) -> tuple[Tensor, None]:
    return reference.shuffle_batch(x, drawn, group), None


def _group_name(group: dist.ProcessGroup | None, drawn: deal.Deal) -> str:
    """By which C++ finds the group; one process needs none."""
    if drawn.world == 1:
        return ""
    name: str = (dist.group.WORLD if group is None else group).group_name  # type: ignore[union-attr]
    return name


def _send(x: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on `device`, for which the host does not wait."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


class _Headers:
    """What all ranks say of their batches, compared on the CPU at once, and on a GPU when it has come to the host."""

    def __init__(self, x: Tensor, group: dist.ProcessGroup | None) -> None:
        layout = torch._prims_common.suggest_memory_format(x)
        self.row = f"{tuple(x.shape[1:])}, {x.dtype}, {layout}"
        header = _send(torch.tensor([[len(x), crc32(self.row.encode())]], device="cpu"), x.device)
        with _named("shuffle_batch"):
            self.all = reference.gather(header, group)  # W×2
        self.here: torch.cuda.Event | None = None
        if x.device.type == "cuda":
            host = torch.empty(self.all.shape, dtype=torch.int64, device="cpu", pin_memory=True)
            self.all = host.copy_(self.all, non_blocking=True)
            self.here = torch.cuda.Event()
            self.here.record(torch.cuda.current_stream(x.device))
        else:
            self.check()

    def check(self) -> None:
        """Raise if the ranks differ."""
        if self.here is not None:
            self.here.synchronize()
        sizes, rows = self.all.T.tolist()
        if len(set(sizes)) > 1:
            raise FastsslError(f"shuffle_batch: batch sizes differ between ranks: {sizes}")
        if len(set(rows)) > 1:
            raise FastsslError(
                f"shuffle_batch: rows differ between ranks in shape, dtype or memory format; here they are {self.row}"
            )


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
        if not dist.is_initialized():
            raise
        raise RuntimeError(f"{op}: the exchange with the other ranks failed; has one of them died? {error}") from error


def _fake(x: Tensor, order: Tensor | None, send: list[int], receive: list[int], group: str) -> Tensor:
    layout = torch._prims_common.suggest_memory_format(x)
    return torch.empty((sum(receive), *x.shape[1:]), dtype=x.dtype, device=x.device, memory_format=layout)


library.define(
    "exchange_rows", "(Tensor x, Tensor? order, SymInt[] send, SymInt[] receive, str group) -> Tensor", fake=_fake
)
library.define("wait_rows", "(Tensor rows) -> ()", fake=lambda *_: None)
library.define("forget_rows", "(Tensor rows) -> ()", fake=lambda *_: None)
for _op, _function, _reference in (
    ("shuffle_batch", _shuffle, _reference_shuffle),
    ("unshuffle_batch", _unshuffle, reference.unshuffle_batch),
):
    for _name, _implementation in library.compiled_implementations(_function).items():
        backend.register(_op, _name, _implementation)
    backend.register(_op, "reference", backend.Implementation(_reference))
