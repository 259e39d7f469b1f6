"""The queue of keys: a ring buffer on the device, enqueued and dequeued in place."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.errors import FastsslError
from fastssl.ops import backend, reference

backend.register("key_queue", "reference", backend.Implementation(reference.enqueue_))


class KeyQueue(nn.Module):
    """First in, first out over normalised keys (MoCo, arXiv:1911.05722, section 3.2); any batch, any capacity.

    The row `tail` is the oldest, the next write goes to row (tail + filled) mod capacity. All state lies in buffers on
    the device and nothing is read back to the host, so a step can be captured in a CUDA graph.

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
        if not dtype.is_floating_point:
            raise FastsslError(f"a queue's dtype must be floating, got {dtype}")
        keys = torch.zeros(capacity, dim, device=device, dtype=dtype)
        if fill == "random":
            drawn = torch.randn(capacity, dim, generator=generator, device=generator.device if generator else device)
            keys.copy_(F.normalize(drawn, dim=1))
        self.register_buffer("keys", keys)
        self.register_buffer("tail", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("filled", torch.tensor(capacity if fill == "random" else 0, device=device))

    @property
    def capacity(self) -> int:
        """K, the number of rows."""
        return len(self.keys)

    @property
    def valid(self) -> tuple[Tensor, Tensor]:
        """(tail, filled) for ``info_nce(..., valid=queue.valid)``."""
        return self.tail, self.filled

    def enqueue_(self, keys: Tensor) -> None:
        """Normalise, cast and write `keys` (N×D) behind the newest row; of more than `capacity`, the newest stay.

        Raises:
            ValueError: `keys` is not N×D.
        """
        if keys.dim() != 2 or keys.shape[1] != self.keys.shape[1] or not keys.is_floating_point():
            raise FastsslError(
                f"keys must be N×{self.keys.shape[1]} of a floating dtype, got {tuple(keys.shape)}, {keys.dtype}"
            )
        run = backend.implementation("key_queue", self.keys.device, self.keys.dtype)
        run(self.keys, self.tail, self.filled, keys)

    def dequeue_(self, count: int) -> None:
        """Drop the `count` oldest rows; all of them if there are fewer.

        Raises:
            ValueError: `count` is negative.
        """
        if count < 0:
            raise FastsslError(f"count must be 0 or more, got {count}")
        reference.dequeue_(self.capacity, self.tail, self.filled, count)

    def extra_repr(self) -> str:
        """Capacity, dim and dtype."""
        return f"capacity={self.capacity}, dim={self.keys.shape[1]}, dtype={self.keys.dtype}"

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):  # type: ignore[no-untyped-def]
        rows = state_dict.get(prefix + "keys")
        if rows is not None and rows.shape != self.keys.shape:
            raise FastsslError(
                f"the saved queue is {tuple(rows.shape)} and this one {tuple(self.keys.shape)}: make a queue of the "
                "saved capacity, or make a new one with fill='empty' and enqueue_ the saved rows"
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
