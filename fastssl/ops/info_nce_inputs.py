"""What `info_nce` accepts: every rule of its inputs, and the error that names what breaks it."""

import operator
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from fastssl.errors import FastsslError
from fastssl.ops import library
from fastssl.ops.reference import HALF, Valid

SMALLEST = torch.finfo(torch.float32).tiny  # below, a temperature is 0 in float32


def beyond_the_kernels(query: Tensor, temperature: float | Tensor) -> str | None:
    """Why only plain PyTorch computes this, or None."""
    if library.functorch():
        return "inside a functorch transform"
    if query.shape[1] == 0:
        return "the vectors have no components"
    if isinstance(temperature, Tensor):
        if temperature.numel() != 1:
            return f"temperature has {temperature.numel()} elements"
        if temperature.dim() > 0 and temperature.dtype != query.dtype:
            return f"temperature is {temperature.dtype} and not a scalar, which may widen the loss"
    return None


def check(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None,
    temperature: float | Tensor,
    reduction: str,
    negative_mode: str,
    valid: Valid | None,
) -> None:
    """Raise FastsslError, a ValueError, for the first thing that does not fit; nothing is read from a device."""
    if reduction not in ("mean", "sum", "none"):
        raise FastsslError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if negative_mode not in ("unpaired", "paired"):
        raise FastsslError(f"negative_mode must be 'unpaired' or 'paired', got {negative_mode!r}")
    if not query.is_floating_point():
        raise FastsslError(f"<query> must be of a floating dtype, got {query.dtype}")
    if query.dim() != 2:
        raise FastsslError(f"<query> must have 2 dimensions, got shape {tuple(query.shape)}")
    if positive_key.dim() != 2:
        raise FastsslError(f"<positive_key> must have 2 dimensions, got shape {tuple(positive_key.shape)}")
    if query.shape[0] != positive_key.shape[0]:
        rows = f"<query> has {query.shape[0]} rows, <positive_key> {positive_key.shape[0]}"
        raise FastsslError(f"{rows}: give one key a query")
    if query.shape[1] != positive_key.shape[1]:
        raise FastsslError(f"<query> has {query.shape[1]} components and <positive_key> {positive_key.shape[1]}")
    if query.dtype != positive_key.dtype:
        raise FastsslError(f"<query> is {query.dtype}, <positive_key> {positive_key.dtype}: give both the same dtype")
    if query.device != positive_key.device:
        raise FastsslError(f"<query> is on {query.device} and <positive_key> on {positive_key.device}")
    if negative_keys is not None:
        _check_negatives(query, negative_keys, negative_mode)
    _check_temperature(query, negative_keys, temperature)
    if valid is not None:
        _check_valid(negative_keys, negative_mode, valid)


def _check_negatives(query: Tensor, negative_keys: Tensor, negative_mode: str) -> None:
    dimensions = 2 if negative_mode == "unpaired" else 3
    if negative_keys.dim() != dimensions:
        shape = tuple(negative_keys.shape)
        raise FastsslError(f"{negative_mode} <negative_keys> must have {dimensions} dimensions, got shape {shape}")
    if negative_mode == "paired" and negative_keys.shape[0] != query.shape[0]:
        raise FastsslError(f"paired <negative_keys> has {negative_keys.shape[0]} rows for {query.shape[0]} queries")
    if negative_keys.shape[-1] != query.shape[-1]:
        raise FastsslError(f"<query> has {query.shape[-1]} components and <negative_keys> {negative_keys.shape[-1]}")
    half_queue = query.dtype == torch.float32 and negative_keys.dtype in HALF
    if negative_keys.dtype != query.dtype and not half_queue:
        raise FastsslError(
            f"<query> is {query.dtype} and <negative_keys> {negative_keys.dtype}: give both the same dtype "
            "(only a float32 query may have bfloat16 or float16 negatives)"
        )
    if query.device != negative_keys.device:
        raise FastsslError(f"<query> is on {query.device} and <negative_keys> on {negative_keys.device}")


def _check_temperature(query: Tensor, negative_keys: Tensor | None, temperature: Any) -> None:
    if isinstance(temperature, torch.SymFloat):
        return
    if not isinstance(temperature, Tensor):
        real: Any = temperature if isinstance(temperature, Real) else 0
        if not real >= SMALLEST:
            raise FastsslError(f"temperature must be a number above 0 or a tensor, got {temperature!r}")
        return
    if temperature.is_complex() or temperature.dtype == torch.bool:
        raise FastsslError(f"temperature must be real, got a tensor of {temperature.dtype}")
    if temperature.device != query.device and (temperature.dim() > 0 or temperature.device.type != "cpu"):
        raise FastsslError(f"<query> is on {query.device} and temperature on {temperature.device}")
    columns = query.shape[0] if negative_keys is None else 1 + negative_keys.shape[-2]
    shape = (query.shape[0], columns)  # of the logits
    sizes = temperature.shape
    if len(sizes) > 2 or any(size not in (1, full) for size, full in zip(sizes[::-1], shape[::-1], strict=False)):
        raise FastsslError(f"temperature of shape {tuple(sizes)} cannot be broadcast to the logits' shape {shape}")


def _check_valid(negative_keys: Tensor | None, negative_mode: str, valid: Valid) -> None:
    if negative_keys is None or negative_mode == "paired":
        raise FastsslError("valid=(first, count) needs unpaired <negative_keys>")
    if not isinstance(valid, tuple) or len(valid) != 2 or not all(map(_is_index, valid)):
        raise FastsslError(
            f"valid must be the pair (first, count) of ints or integer tensors of 1 element, got {valid!r}"
        )
    count = valid[1]
    if not isinstance(count, Tensor) and not 0 <= count <= negative_keys.shape[0]:
        raise FastsslError(f"valid: count must lie in 0…{negative_keys.shape[0]}, got {count}")


def _is_index(value: object) -> bool:
    if isinstance(value, Tensor):
        whole = not value.is_floating_point() and not value.is_complex() and value.dtype != torch.bool
        return whole and value.numel() == 1
    return isinstance(value, (Integral, torch.SymInt)) and not isinstance(value, bool)


def widened(query: Tensor, positive_key: Tensor, negative_keys: Tensor | None) -> tuple[Tensor, Tensor]:
    """Query and positive key in the widest dtype of all, which rounds nothing: autocast leaves a mixture of them."""
    dtype = torch.promote_types(query.dtype, positive_key.dtype)
    if negative_keys is not None and negative_keys.dtype != dtype and dtype != torch.float32:
        dtype = torch.promote_types(dtype, negative_keys.dtype)
    return query.to(dtype), positive_key.to(dtype)


def reduced(valid: Valid, rows: int) -> Valid:
    """The same range with a plain int `first` in 0…M-1, so that any int will do."""
    first, count = (v if isinstance(v, (Tensor, torch.SymInt)) else operator.index(v) for v in valid)
    return (first if isinstance(first, Tensor) else first % max(rows, 1)), count
