"""Puts the splits of a pass together, always in the same order, and writes each row's loss and gradients."""

import torch
import triton
import triton.language as tl
from fastssl.kernels import config
from fastssl.kernels.launch import launch
from fastssl.kernels.rows import (
    FLOOR,
    LN_2,
    inverse,
    inverse_temperature,
    norm,
    power_of_two,
    softplus_and_sigmoid,
    through_norm,
)
from torch import Tensor

SPLITS = 64  # maxima that are read at once


@triton.jit
def unit_row(x: tl.tensor) -> tl.tensor:
    """x/‖x‖ and ‖x‖ of one row; scaled first, for the inverse of a huge norm would be a denormal."""
    length = norm(x, 0)
    scale = power_of_two(length)
    return (x * scale) * (inverse(length) / scale), length


@triton.jit(do_not_specialize=["rows", "splits"])
def info_nce_combine(
    query: tl.tensor,  # rows×DIM
    positive_key: tl.tensor,  # rows×DIM
    temperature: tl.tensor,
    temperature_tensor: tl.tensor,
    maxima: tl.tensor,
    sums: tl.tensor,
    accumulators: tl.tensor,
    loss: tl.tensor,
    lse: tl.tensor,
    dquery: tl.tensor,
    dpositive: tl.tensor,
    dtemperature: tl.tensor,
    rows: tl.tensor,
    splits: tl.tensor,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_MAXIMA: tl.constexpr,
    GRADIENTS: tl.constexpr,
) -> None:
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, BLOCK_DIM)
    within = dims < DIM
    inverse_t = inverse_temperature(temperature, temperature_tensor)
    q, query_norm = unit_row(tl.load(query + row * DIM + dims, mask=within, other=0).to(tl.float32))
    k, key_norm = unit_row(tl.load(positive_key + row * DIM + dims, mask=within, other=0).to(tl.float32))
    positive = tl.sum(q * k, 0)

    maximum = tl.full((), FLOOR, tl.float32)
    total = tl.zeros((), tl.float32)
    for begin in range(0, splits, BLOCK_MAXIMA):
        split = begin + tl.arange(0, BLOCK_MAXIMA)
        some = tl.load(maxima + split.to(tl.int64) * rows + row, mask=split < splits, other=FLOOR)
        parts = tl.load(sums + split.to(tl.int64) * rows + row, mask=split < splits, other=0)
        higher = tl.maximum(maximum, tl.max(some, 0))
        total = total * tl.exp2(maximum - higher) + tl.sum(parts * tl.exp2(some - higher), 0)
        maximum = higher

    some_counted = total > 0
    total = tl.where(some_counted, total, 1.0)
    negatives = tl.where(some_counted, (maximum + tl.log2(total)) * LN_2, -float("inf"))  # log of their sum
    row_loss, p_negative = softplus_and_sigmoid(negatives - positive * inverse_t)
    tl.store(loss + row, row_loss)
    tl.store(lse + row, positive * inverse_t + row_loss)

    if GRADIENTS:
        attention = tl.zeros((BLOCK_DIM,), tl.float32)
        for begin in range(0, splits, BLOCK_SPLITS):
            split = begin + tl.arange(0, BLOCK_SPLITS)
            at = split.to(tl.int64) * rows + row
            weight = tl.exp2(tl.load(maxima + at, mask=split < splits, other=FLOOR) - maximum)
            place = accumulators + at[:, None] * DIM + dims[None, :]
            part = tl.load(place, mask=(split < splits)[:, None] & within[None, :], other=0)
            attention += tl.sum(part * weight[:, None], 0)
        attention /= total
        strength = p_negative * inverse_t
        dq = strength * (attention - k)
        dk = -strength * q
        along = tl.sum(dq * q, 0)
        tl.store(dtemperature + row, -along * inverse_t)
        tl.store(dquery + row * DIM + dims, through_norm(dq, q, along, query_norm), mask=within)
        dk = through_norm(dk, k, tl.sum(dk * k, 0), key_norm)
        tl.store(dpositive + row * DIM + dims, dk, mask=within)


def combine(
    query: Tensor,
    positive_key: Tensor,
    temperature: float,
    temperature_tensor: Tensor | None,
    partials: tuple[Tensor, Tensor, Tensor],
    gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, log-sum-exp, and the gradients to query, positive key and temperature, of contiguous rows."""
    maxima, sums, accumulators = partials
    n, dim = query.shape
    shapes = [(n,), (n,)] + ([(n, dim), (n, dim), (n,)] if gradients else [(0,)] * 3)
    loss, lse, dquery, dpositive, dtemperature = (query.new_empty(shape, dtype=torch.float32) for shape in shapes)
    block_dim = config.block(dim)
    launch(
        info_nce_combine,
        (n,),
        config.row_warps(block_dim),
        1,
        query,
        query=query,
        positive_key=positive_key,
        temperature=temperature,
        temperature_tensor=temperature_tensor,
        maxima=maxima,
        sums=sums,
        accumulators=accumulators,
        loss=loss,
        lse=lse,
        dquery=dquery,
        dpositive=dpositive,
        dtemperature=dtemperature,
        rows=n,
        splits=len(maxima),
        DIM=dim,
        BLOCK_DIM=block_dim,
        BLOCK_SPLITS=max(1, 2048 // block_dim),
        BLOCK_MAXIMA=SPLITS,
        GRADIENTS=gradients,
    )
    return loss, lse, dquery, dpositive, dtemperature
