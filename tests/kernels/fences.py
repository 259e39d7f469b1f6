"""Tensors inside larger buffers of NaN: what a kernel reads or writes outside of them shows."""

import math
from typing import Any

import torch
from torch import Tensor

FENCE = 64
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

plain_new_empty = torch.Tensor.new_empty
allocated: list[tuple[Tensor, int]] = []


def fill(dtype: torch.dtype) -> float | int:
    """A value that spoils whatever is computed with it."""
    return math.nan if dtype.is_floating_point else min(2**30, torch.iinfo(dtype).max)


def new_empty(self: Tensor, *size: Any, dtype: torch.dtype | None = None, **others: Any) -> Tensor:
    """Tensor.new_empty, but fenced and full of NaN, or of what `fill` says."""
    if others:  # the interpreter's own
        return plain_new_empty(self, *size, dtype=dtype, **others)
    shape = size[0] if size and not isinstance(size[0], int) else size
    count = math.prod(shape)
    dtype = dtype or self.dtype
    buffer = torch.full((count + 2 * FENCE,), fill(dtype), dtype=dtype, device=self.device)
    allocated.append((buffer, count))
    return buffer[FENCE : FENCE + count].view(*shape)


def check() -> None:
    """Every fence since the last call still stands."""
    for buffer, count in allocated:
        assert untouched(buffer[:FENCE]), "written before the beginning of an output"
        assert untouched(buffer[FENCE + count :]), "written behind the end of an output"
    allocated.clear()


def untouched(fence: Tensor) -> bool:
    """Whether it is still full of what `fill` says."""
    return bool((fence.isnan() if fence.is_floating_point() else fence == fill(fence.dtype)).all())


def dense(x: Tensor) -> Tensor:
    """A contiguous copy of `x` between fences, beginning at no particular alignment."""
    buffer = torch.full((x.numel() + 2 * FENCE + 1,), fill(x.dtype), dtype=x.dtype, device=DEVICE)
    inside = buffer[FENCE + 1 : FENCE + 1 + x.numel()].view(x.shape)
    return inside.copy_(x)


def gapped(x: Tensor) -> Tensor:
    """A copy of `x` whose rows, columns and matrices have NaN around them; the last stride is 1."""
    buffer = torch.full([size + 3 for size in x.shape], fill(x.dtype), dtype=x.dtype, device=DEVICE)
    return buffer[tuple(slice(2, 2 + size) for size in x.shape)].copy_(x)


def transposed(x: Tensor) -> Tensor:
    """A copy of `x` with its dimensions stored in reverse order."""
    return gapped(x.permute(*reversed(range(x.dim())))).permute(*reversed(range(x.dim())))


LAYOUTS = {"dense": dense, "gapped": gapped, "transposed": transposed}
