"""What `ema_update_` accepts: every rule of its inputs, and the error that names what breaks it."""

from numbers import Real
from typing import Any

import torch
from torch import Tensor

from fastssl import _extension
from fastssl.errors import FastsslError
from fastssl.ops import memory
from fastssl.ops.reference import HALF

TARGETS = (torch.float32, torch.float64)
SOURCES = (*TARGETS, *HALF)
STRIDED = torch.strided


def check(targets: list[Tensor], sources: list[Tensor], shadows: list[Tensor] | None, momentum: float | Tensor) -> None:
    """Raise FastsslError, a ValueError, for the first thing that does not fit; nothing is read from a device."""
    if not _fits(targets, sources, shadows, momentum):
        _look_closely(targets, sources, shadows, momentum)


def _fits(targets: list[Tensor], sources: list[Tensor], shadows: list[Tensor] | None, momentum: float | Tensor) -> bool:
    """Whether the extension sees at a glance that nothing is wrong, in a tenth of the time."""
    if not memory.known([*targets, *sources, *(shadows or ())]) or _extension.missing():
        return False
    tensor = momentum if isinstance(momentum, Tensor) else None
    fits: bool = torch.ops.fastssl.ema_update_fits(targets, sources, shadows or [], tensor)
    return fits and (not targets or shadows is None or len(shadows) == len(targets))


def _look_closely(
    targets: list[Tensor], sources: list[Tensor], shadows: list[Tensor] | None, momentum: float | Tensor
) -> None:
    """The rules one by one, in plain Python."""
    if isinstance(momentum, Tensor) and targets and momentum.device not in (targets[0].device, torch.device("cpu")):
        raise FastsslError(f"targets are on {targets[0].device} and momentum on {momentum.device}")
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
        if not (target.dtype in TARGETS and source.dtype in SOURCES and target.layout is source.layout is STRIDED):
            _check_dtypes(i, target, source)
    for i, (target, shadow) in enumerate(zip(targets, shadows or (), strict=shadows is not None and len(shadows) > 0)):
        if target.is_floating_point() != shadow.is_floating_point():
            raise FastsslError(f"target {i} is {target.dtype} and its shadow {shadow.dtype}: both floating or neither")
    read = {"source": sources, "momentum": [momentum] if isinstance(momentum, Tensor) else []}
    memory.refuse_shared({"target": targets, "shadow": shadows or []}, read)


def as_momentum(momentum: Any) -> float | Tensor:
    """`momentum` as a float or, where it lies on a GPU or is traced, as a 0-d float64 tensor."""
    if isinstance(momentum, Tensor):
        if momentum.numel() != 1 or not momentum.is_floating_point():
            raise FastsslError(
                f"momentum must be a number or a floating tensor of one element, got {momentum.dtype} of shape "
                f"{tuple(momentum.shape)}"
            )
        if momentum.device.type != "cpu" or not memory.known([momentum]):
            return momentum.detach().double().reshape(())
        momentum = momentum.item()
    if isinstance(momentum, torch.SymFloat):
        return momentum  # type: ignore[return-value]
    if not isinstance(momentum, Real) or not 0 <= float(momentum) <= 1:
        raise FastsslError(f"momentum must lie in 0…1, got {momentum!r}")
    return float(momentum)


def _check_dtypes(i: int, target: Tensor, source: Tensor) -> None:
    dtype = target.dtype
    for name, x in (("target", target), ("source", source)):
        if x.layout != STRIDED:
            raise FastsslError(f"{name} {i} is {x.layout}: only strided tensors are taken")
    if dtype in TARGETS:
        if source.dtype not in SOURCES:
            raise FastsslError(f"source {i} is {source.dtype}: a {dtype} target takes {', '.join(map(str, SOURCES))}")
    elif dtype in HALF:
        raise FastsslError(f"target {i} is {dtype}, too coarse to move at m near 1: keep targets in float32")
    elif dtype.is_floating_point or dtype.is_complex:
        raise FastsslError(f"target {i} is {dtype}; it can be float32, float64, an integer or bool")
    elif source.dtype != dtype:
        raise FastsslError(f"target {i} is {dtype} and source {i} {source.dtype}: what is copied has one dtype")
