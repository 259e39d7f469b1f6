"""Which tensors share memory: what an op that writes in place must know of its arguments."""

from collections.abc import Iterable
from itertools import combinations, pairwise
from math import gcd
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastssl.errors import FastsslError

PLAIN = frozenset({Tensor, nn.Parameter, nn.Buffer})  # not the subclasses that stand for tensors elsewhere


class Extent(NamedTuple):
    """The memory between the first and the last element of a tensor, and what the tensor is called."""

    begin: int
    end: int
    tensor: Tensor
    name: str
    written: bool


def span(x: Tensor) -> tuple[int, int]:
    """The addresses of the first byte and of the one behind the last; tensors without elements lie nowhere."""
    begin = x.data_ptr()
    if x.is_contiguous():
        return begin, begin + x.nbytes
    if not x.numel():
        return begin, begin
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return begin, begin + (1 + last) * x.element_size()


def refuse_shared(written: dict[str, list[Tensor]], read: dict[str, list[Tensor]]) -> None:
    """Raise FastsslError if a tensor that is written shares memory with another one, or its elements with each other.

    Args:
        written: lists of tensors, by what one of them is called.
        read: likewise; tensors that are only read may share.
    """
    writes = [x for tensors in written.values() for x in tensors]
    reads = [x for tensors in read.values() for x in tensors]
    if not known([*writes, *reads]):
        return
    spans = sorted([*map(span, writes), *set(map(span, reads))])
    if all(a[1] <= b[0] for a, b in pairwise(spans)) and all(map(_apart, writes)):
        return  # the usual case, at the least cost
    neighbours: list[Extent] = []  # whose extents overlap
    end = 0
    for extent in sorted(_extents(written, True) + _extents(read, False), key=attrgetter("begin")):
        if extent.begin >= end:
            _check_neighbours(neighbours)
            neighbours = []
        neighbours.append(extent)
        end = max(end, extent.end)
    _check_neighbours(neighbours)


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether the extents of two tensors overlap."""
    if not known([a, b]):
        return False
    (a_begin, a_end), (b_begin, b_end) = span(a), span(b)
    return a_begin < b_end and b_begin < a_end


def known(tensors: Iterable[Tensor]) -> bool:
    """Whether the tensors have memory of their own: not those that are traced, fake, on meta or wrapped."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return all(type(x) in PLAIN and not x.is_meta for x in tensors)


def _extents(tensors: dict[str, list[Tensor]], written: bool) -> list[Extent]:
    return [
        Extent(*span(x), x, f"{name} {i}", written)
        for name, group in tensors.items()
        for i, x in enumerate(group)
        if x.numel()
    ]


def _check_neighbours(extents: list[Extent]) -> None:
    if not any(extent.written for extent in extents):
        return
    if len(extents) == 1 and _apart(extents[0].tensor):
        return
    for a, b in combinations(extents, 2):
        if (a.written or b.written) and b.begin < a.end and a.tensor.is_contiguous() and b.tensor.is_contiguous():
            raise _shared(a, b)
    _check_elements(extents)


def _apart(x: Tensor) -> bool:
    """Whether the strides alone show that no two elements of `x` are in one place."""
    if x.is_contiguous():
        return True
    reach = 0  # the last element of the dimensions so far
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return False
            reach += stride * (size - 1)
    return True


def _check_elements(extents: list[Extent]) -> None:
    """The exact answer for tensors with gaps, such as the columns of one matrix: who owns each place."""
    start = extents[0].begin
    sizes = [extent.tensor.element_size() for extent in extents]
    unit = gcd(*sizes, *(extent.begin - start for extent in extents))  # bytes of a place
    owner = torch.full(((max(extent.end for extent in extents) - start) // unit,), -1, dtype=torch.int32)
    for at, extent in sorted(enumerate(extents), key=lambda item: not item[1].written):
        x, size = extent.tensor, sizes[at] // unit
        strides = [stride * size for stride in x.stride()]
        place = owner.as_strided((*x.shape, size), (*strides, 1), (extent.begin - start) // unit)
        highest = int(place.max())
        if highest >= 0:
            raise _shared(extent, extents[highest])
        if extent.written:
            place.fill_(at)
            if int((owner == at).sum()) < x.numel() * size:
                raise FastsslError(f"{extent.name}, of strides {x.stride()}, has several elements in one place")


def _shared(a: Extent, b: Extent) -> FastsslError:
    return FastsslError(f"{a.name} and {b.name} share memory, and one of them is written: give each its own")
