"""Puts the splits of a pass together, always in the same order, and writes each row's loss and gradients."""

import torch
import triton
import triton.language as tl
from fastssl.kernels import config
from fastssl.kernels.launch import chip, launch
from fastssl.kernels.rows import (
    FLOOR,
    LN_2,
    inverse_temperature,
    softplus_and_sigmoid,
    through_norm,
    unit_rows,
)
from torch import Tensor


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
    BLOCK_ROWS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,  # that are read at once
    BLOCK_DIM: tl.constexpr,
    GRADIENTS: tl.constexpr,
) -> None:
    """A few rows."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    live = row < rows
    dims = tl.arange(0, BLOCK_DIM)
    place = row[:, None] * DIM + dims[None, :]
    within = live[:, None] & (dims < DIM)[None, :]
    inverse_t = inverse_temperature(temperature, temperature_tensor)
    q, query_norm = unit_rows(tl.load(query + place, mask=within, other=0).to(tl.float32))
    k, key_norm = unit_rows(tl.load(positive_key + place, mask=within, other=0).to(tl.float32))
    positive = tl.sum(q * k, 1)

    maximum = tl.full((BLOCK_ROWS,), FLOOR, tl.float32)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    attention = tl.zeros((BLOCK_ROWS, BLOCK_DIM), tl.float32)
    for begin in range(0, splits, BLOCK_SPLITS):
        split = begin + tl.arange(0, BLOCK_SPLITS)
        at = split.to(tl.int64)[None, :] * rows + row[:, None]
        there = (split < splits)[None, :] & live[:, None]
        some = tl.load(maxima + at, mask=there, other=FLOOR)
        parts = tl.load(sums + at, mask=there, other=0)
        higher = tl.maximum(maximum, tl.max(some, 1))
        decay = tl.exp2(maximum - higher)
        weight = tl.exp2(some - higher[:, None])
        total = total * decay + tl.sum(parts * weight, 1)
        maximum = higher
        if GRADIENTS:
            part = tl.load(
                accumulators + at[:, :, None] * DIM + dims[None, None, :],
                mask=there[:, :, None] & (dims < DIM)[None, None, :],
                other=0,
            )
            attention = attention * decay[:, None] + tl.sum(part * weight[:, :, None], 1)

    some_counted = total != 0  # NaN counts: it must reach the loss
    total = tl.where(some_counted, total, 1.0)
    negatives = tl.where(some_counted, (maximum + tl.log2(total)) * LN_2, -float("inf"))  # log of their sum
    row_loss, p_negative = softplus_and_sigmoid(negatives - positive * inverse_t)
    tl.store(loss + row, row_loss, mask=live)
    tl.store(lse + row, positive * inverse_t + row_loss, mask=live)

    if GRADIENTS:
        strength = (p_negative * inverse_t)[:, None]
        dq = strength * (attention / total[:, None] - k)
        dk = -strength * q
        along = tl.sum(dq * q, 1)
        tl.store(dtemperature + row, -along * inverse_t, mask=live)
        tl.store(dquery + place, through_norm(dq, q, along[:, None], query_norm[:, None]), mask=within)
        along = tl.sum(dk * k, 1)
        tl.store(dpositive + place, through_norm(dk, k, along[:, None], key_norm[:, None]), mask=within)


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
    splits, block_dim = len(maxima), config.block(dim)
    tile = config.combine_tile(chip(query.device), splits, block_dim)
    launch(
        info_nce_combine,
        (triton.cdiv(n, tile.rows),),
        tile.warps,
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
        splits=splits,
        DIM=dim,
        BLOCK_ROWS=tile.rows,
        BLOCK_SPLITS=tile.splits,
        BLOCK_DIM=block_dim,
        GRADIENTS=gradients,
    )
    return loss, lse, dquery, dpositive, dtemperature
