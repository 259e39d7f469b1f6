"""What `ema_update_` accepts: every rule of its inputs, and the error that names what breaks it."""

from itertools import combinations, pairwise
from numbers import Real
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastssl.errors import FastsslError
from fastssl.ops.reference import HALF

TARGETS = (torch.float32, torch.float64)
SOURCES = (*TARGETS, *HALF)


def check(targets: list[Tensor], sources: list[Tensor], shadows: list[Tensor] | None, momentum: float | Tensor) -> None:
    """Raise FastsslError, a ValueError, for the first thing that does not fit; nothing is read from a device."""
    _check_momentum(momentum, targets)
    lists = [("sources", sources)] if shadows is None else [("sources", sources), ("shadows", shadows)]
    for name, tensors in lists:
        if len(tensors) != len(targets):
            raise FastsslError(f"{len(targets)} targets and {len(tensors)} {name}: give as many of both")
        for i, (target, other) in enumerate(zip(targets, tensors, strict=True)):
            if target.shape != other.shape or target.device != other.device:
                raise FastsslError(
                    f"tensor {i}: target is {tuple(target.shape)} on {target.device}, "
                    f"{name} {tuple(other.shape)} on {other.device}"
                )
    for i, (target, source) in enumerate(zip(targets, sources, strict=True)):
        if target.device != targets[0].device:
            raise FastsslError(f"target 0 is on {targets[0].device} and target {i} on {target.device}: one call each")
        _check_dtypes(i, target, source)
    for i, (target, shadow) in enumerate(zip(targets, shadows or (), strict=bool(shadows))):
        if target.is_floating_point() != shadow.is_floating_point():
            raise FastsslError(f"target {i} is {target.dtype} and its shadow {shadow.dtype}: both floating or neither")
    if not torch.compiler.is_compiling():  # a tensor that is being traced has no memory yet
        _check_memory(targets, sources, shadows or [])


def _check_momentum(momentum: Any, targets: list[Tensor]) -> None:
    if isinstance(momentum, Tensor):
        if momentum.numel() != 1 or not momentum.is_floating_point():
            raise FastsslError(
                f"momentum must be a number or a floating tensor of one element, got {momentum.dtype} of shape "
                f"{tuple(momentum.shape)}"
            )
        if targets and momentum.device != targets[0].device and momentum.device.type != "cpu":
            raise FastsslError(f"targets are on {targets[0].device} and momentum on {momentum.device}")
    elif isinstance(momentum, torch.SymFloat):
        return
    elif not isinstance(momentum, Real) or not 0 <= float(momentum) <= 1:
        raise FastsslError(f"momentum must lie in 0…1, got {momentum!r}")


def _check_dtypes(i: int, target: Tensor, source: Tensor) -> None:
    dtype = target.dtype
    if dtype in TARGETS:
        if source.dtype not in SOURCES:
            raise FastsslError(f"source {i} is {source.dtype}: a {dtype} target takes {', '.join(map(str, SOURCES))}")
    elif dtype in HALF:
        raise FastsslError(f"target {i} is {dtype}, too coarse to move at m near 1: keep targets in float32")
    elif dtype.is_floating_point or dtype.is_complex:
        raise FastsslError(f"target {i} is {dtype}; it can be float32, float64, an integer or bool")
    elif source.dtype != dtype:
        raise FastsslError(f"target {i} is {dtype} and source {i} {source.dtype}: what is copied has one dtype")


class _Extent(NamedTuple):
    """The memory between the first and the last element of a tensor."""

    begin: int
    end: int
    tensor: Tensor
    name: str
    at: int

    @property
    def written(self) -> bool:
        return self.name != "source"

    def __str__(self) -> str:
        return f"{self.name} {self.at}"


def _check_memory(targets: list[Tensor], sources: list[Tensor], shadows: list[Tensor]) -> None:
    """No tensor that is written may share memory with another, or with itself."""
    spans = sorted([_span(x) for x in (*targets, *sources, *shadows)])
    if all(a[1] <= b[0] for a, b in pairwise(spans)) and all(map(_apart, targets)) and all(map(_apart, shadows)):
        return  # the usual case, at the least cost
    extents = [
        _Extent(*_span(x), x, name, i)
        for name, tensors in (("target", targets), ("source", sources), ("shadow", shadows))
        for i, x in enumerate(tensors)
        if x.numel()
    ]
    extents.sort(key=attrgetter("begin"))
    neighbours: list[_Extent] = []  # whose extents overlap
    end = 0
    for extent in extents:
        if extent.begin >= end:
            _check_neighbours(neighbours)
            neighbours = []
        neighbours.append(extent)
        end = max(end, extent.end)
    _check_neighbours(neighbours)


def _span(x: Tensor) -> tuple[int, int]:
    """The addresses of the first byte and of the one behind the last; tensors without elements lie nowhere."""
    begin = x.data_ptr()
    if x.is_contiguous():
        return begin, begin + x.nbytes
    if not x.numel():
        return begin, begin
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return begin, begin + (1 + last) * x.element_size()


def _check_neighbours(extents: list[_Extent]) -> None:
    if not any(extent.written for extent in extents):
        return
    if len(extents) == 1 and _apart(extents[0].tensor):
        return
    for a, b in combinations(extents, 2):
        if (a.written or b.written) and b.begin < a.end and a.tensor.is_contiguous() and b.tensor.is_contiguous():
            raise _shared(a, b)
    _check_bytes(extents)


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


def _check_bytes(extents: list[_Extent]) -> None:
    """The exact answer for tensors with gaps, such as the columns of one matrix: who owns each byte."""
    start = extents[0].begin
    owner = torch.full((max(extent.end for extent in extents) - start,), -1)
    for at, extent in sorted(enumerate(extents), key=lambda item: not item[1].written):
        x, size = extent.tensor, extent.tensor.element_size()
        strides = [stride * size for stride in x.stride()]
        place = owner.as_strided((*x.shape, size), (*strides, 1), extent.begin - start)
        taken = place[place >= 0]
        if len(taken):
            raise _shared(extent, extents[int(taken[0])])
        if extent.written:
            place.fill_(at)
            if int((owner == at).sum()) < x.numel() * size:
                raise FastsslError(f"{extent}, of strides {x.stride()}, has several elements in one place")


def _shared(a: _Extent, b: _Extent) -> FastsslError:
    return FastsslError(f"{a} and {b} share memory, and one of them is written: give each its own")
