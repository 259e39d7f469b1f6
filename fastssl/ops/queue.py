"""The queue of keys: a ring buffer on the device, enqueued and dequeued in place."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.errors import FastsslError
from fastssl.ops import backend, library, memory, reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class KeyQueue(nn.Module):
    """First in, first out over normalised keys (MoCo, arXiv:1911.05722, section 3.2); any batch, any capacity.

    The row `tail` is the oldest, the next write goes to row (tail + filled) mod capacity. All state lies in buffers on
    the device and nothing is read back to the host, so a step can be captured in a CUDA graph. What `enqueue_` costs
    does not depend on the capacity: one kernel normalises, casts, writes in place and moves tail and filled. Keys are
    taken as they are, NaN too.

    Under DistributedDataParallel, keep rank 0's buffers from being copied over the others' at every forward
    (``broadcast_buffers=False``; `fastssl.methods.MoCo` does so by itself), and enqueue the keys of all ranks on each:
    `unshuffle_and_gather` gives them.

    Args:
        capacity: K, rows; no multiple of the batch is needed.
        dim: D, components of a key.
        dtype: of the rows, a floating one.
        fill: "random" begins with K random unit rows as in the paper, "empty" with none (so they are never negatives).
        device: of the buffers.
        generator: of the random rows.

    Attributes:
        keys: K×D; tail, filled: 0-d int64.

    Raises:
        ValueError: capacity or dim below 1, fill unknown, or dtype not floating.

    Example:
        >>> queue = KeyQueue(4096, 128)
        >>> queue.enqueue_(torch.randn(256, 128))
        >>> loss = info_nce(q, k, queue.keys, negatives_normalized=True, valid=queue.valid)  # doctest: +SKIP
    """

    keys: Tensor
    tail: Tensor
    filled: Tensor
    arrived: Tensor

    def __init__(
        self,
        capacity: int,
        dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        fill: str = "random",
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if capacity < 1 or dim < 1:
            raise FastsslError(f"a queue needs capacity and dim above 0, got {capacity} and {dim}")
        if fill not in ("random", "empty"):
            raise FastsslError(f"fill must be 'random' or 'empty', got {fill!r}")
        if dtype not in DTYPES:
            raise FastsslError(f"a queue's dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
        keys = torch.zeros(capacity, dim, device=device, dtype=dtype)
        if fill == "random":
            place = generator.device if generator else device
            wide = torch.promote_types(dtype, torch.float32)
            keys.copy_(F.normalize(torch.randn(capacity, dim, generator=generator, device=place, dtype=wide), dim=1))
        self.register_buffer("keys", keys)
        self.register_buffer("tail", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("filled", torch.tensor(capacity if fill == "random" else 0, device=device))
        # Counts the programs of a launch that are done, on GPUs; 0 between calls.
        self.register_buffer("arrived", torch.zeros((), dtype=torch.int32, device=device), persistent=False)

    @property
    def capacity(self) -> int:
        """K, the number of rows."""
        return len(self.keys)

    @property
    def valid(self) -> tuple[Tensor, Tensor]:
        """(tail, filled) for ``info_nce(..., valid=queue.valid)``."""
        return self.tail, self.filled

    @torch.no_grad()
    def enqueue_(self, keys: Tensor) -> None:
        """Normalise, cast and write `keys` (N×D) behind the newest row; of more than `capacity`, the newest stay.

        Raises:
            ValueError: `keys` is not N×D of a floating dtype, on another device, or a part of the queue.
        """
        queue, tail, filled, arrived = self.keys, self.tail, self.filled, self.arrived  # a module finds them slowly
        device = queue.device
        if keys.dim() != 2 or keys.shape[1] != queue.shape[1] or not keys.is_floating_point():
            raise FastsslError(
                f"keys must be N×{queue.shape[1]} of a floating dtype, got {tuple(keys.shape)}, {keys.dtype}"
            )
        if not device == keys.device == tail.device == filled.device == arrived.device:
            places = {"keys": keys.device} | {f"its {name}": x.device for name, x in self.named_buffers()}
            raise FastsslError(f"the queue is on {device}; {', '.join(f'{name} on {d}' for name, d in places.items())}")
        if memory.overlap(keys, queue):
            raise FastsslError("keys are rows of the queue itself, which is written to: give a copy, keys.clone()")
        if not queue.is_contiguous():
            raise FastsslError(f"the queue's rows must be contiguous, they have strides {queue.stride()}")
        dtype = torch.promote_types(queue.dtype, keys.dtype)  # float64 on either side is left to `reference`
        run = backend.implementation("enqueue_", queue.device, dtype)
        run(queue, tail, filled, arrived, keys)

    @torch.no_grad()
    def dequeue_(self, count: int) -> None:
        """Drop the `count` oldest rows; all of them if there are fewer.

        Raises:
            ValueError: `count` is negative.
        """
        if not isinstance(count, (int, torch.SymInt)) or count < 0:
            raise FastsslError(f"count must be a whole number, 0 or more, got {count!r}")
        run = backend.implementation("dequeue_", self.keys.device, self.keys.dtype)
        run(self.tail, self.filled, self.capacity, count)

    def oldest_first(self) -> Tensor:
        """The filled rows in the order they came (filled×D), copied; waits for the device."""
        rows = (self.tail + torch.arange(int(self.filled), device=self.tail.device)) % self.capacity
        return self.keys[rows]

    def extra_repr(self) -> str:
        """Capacity, dim and dtype."""
        return f"capacity={self.capacity}, dim={self.keys.shape[1]}, dtype={self.keys.dtype}"

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):  # type: ignore[no-untyped-def]
        rows, tail, filled = (state_dict.get(prefix + name) for name in ("keys", "tail", "filled"))
        if rows is not None and rows.shape != self.keys.shape:
            remedy = ""
            if rows.shape[1:] == self.keys.shape[1:]:
                remedy = (
                    "; to go on with another capacity, load it into `old`, a queue of the saved shape, and call "
                    "enqueue_(old.oldest_first()) of a new queue with fill='empty'"
                )
            raise FastsslError(f"the saved queue is {tuple(rows.shape)} and this one {tuple(self.keys.shape)}{remedy}")
        for name, value, most in (("tail", tail, self.capacity - 1), ("filled", filled, self.capacity)):
            if value is None or value.is_meta:
                continue
            if value.shape != () or value.dtype != torch.int64 or not 0 <= int(value) <= most:
                raise FastsslError(f"the saved {name} must be an int64 in 0…{most} without dimensions, got {value!r}")
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        # It is not saved: after a detour over the meta device it would be there, or anything.
        if self.arrived.device == self.keys.device:
            self.arrived.zero_()
        else:
            self.arrived = torch.zeros((), dtype=torch.int32, device=self.keys.device)


library.define(
    "enqueue",
    "(Tensor(a!) queue, Tensor(b!) tail, Tensor(c!) filled, Tensor(d!) arrived, Tensor keys) -> ()",
    kernel="key_queue.enqueue",
    fake=lambda *_: None,
)
library.define(
    "dequeue",
    "(Tensor(a!) tail, Tensor(b!) filled, int capacity, int count) -> ()",
    kernel="key_queue.dequeue",
    fake=lambda *_: None,
)
for _op, _reference in (("enqueue", reference.enqueue_), ("dequeue", reference.dequeue_)):
    for _name, _implementation in library.implementations(partial(library.call, _op)).items():
        backend.register(f"{_op}_", _name, _implementation)
    backend.register(f"{_op}_", "reference", backend.Implementation(_reference))
