"""One pass of queries over a share of the keys: running maximum, sum and Σ exp(s/T - m)·k̂ for one split and slice."""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from fastssl.kernels import config
from fastssl.kernels.inverse_norms import inverse_norms_pass
from fastssl.kernels.launch import autotuning, chip, launch
from fastssl.kernels.launch import precision as matmul_precision
from fastssl.kernels.rows import (
    FLOOR,
    LOG2_E,
    inverse,
    inverse_temperature,
    largest,
    narrow,
    power_of_two,
    ring,
    root,
    squares,
    widen,
)
from torch import Tensor


@triton.jit(do_not_specialize=["rows", "columns"])
def info_nce_split(
    query: tl.tensor,  # rows×DIM
    keys: tl.tensor,  # columns×DIM
    key_factors: tl.tensor,  # columns: 1/‖key‖; None if they have length 1
    temperature: tl.tensor,
    temperature_tensor: tl.tensor,
    first: tl.tensor,
    count: tl.tensor,
    maxima: tl.tensor,  # splits×rows, of logits/T in base 2
    sums: tl.tensor,  # splits×rows
    accumulators: tl.tensor,  # splits×rows×DIM
    rows: tl.tensor,
    columns: tl.tensor,
    key_stride: tl.tensor,
    dim_stride: tl.tensor,
    DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,  # of the accumulator
    BLOCK_PRODUCT: tl.constexpr,  # columns of q·k at once, if IN_PARTS
    IN_PARTS: tl.constexpr,
    NORMALIZED: tl.constexpr,
    EXCLUDE_DIAGONAL: tl.constexpr,
    GRADIENTS: tl.constexpr,
    WIDE: tl.constexpr,  # products in float32
    WIDE_VALUES: tl.constexpr,  # the second product at least
    HEADROOM: tl.constexpr,  # p may reach 2 to this: float16 keeps digits of small ones so
    PRECISION: tl.constexpr,
) -> None:
    """One block of queries against one split of the keys."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    split, splits = tl.program_id(1), tl.num_programs(1)
    dims = tl.program_id(2) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    query_row = query + row.to(tl.int64)[:, None] * DIM
    live = (row < rows)[:, None]
    if not IN_PARTS:  # loaded while the ring is, before anything waits
        q = tl.load(query_row + dims[None, :], mask=live & (dims < DIM)[None, :], other=0).to(tl.float32)
    start, valid = ring(first, count, columns)
    tiles = tl.cdiv(valid, BLOCK_COLUMNS)
    share, more = tiles // splits, tiles % splits
    begin = share * split + tl.minimum(split, more)
    end = begin + share + (split < more).to(tl.int32)
    to_base_2 = inverse_temperature(temperature, temperature_tensor) * LOG2_E
    sign = tl.where(to_base_2 < 0, -1.0, 1.0)

    # Raw rows are multiplied, for q̂ rounded to half would be off; norms come in afterwards, in float32.
    if IN_PARTS:
        parts = tl.arange(0, BLOCK_PRODUCT)
        plain = tl.zeros((BLOCK_ROWS,), tl.float32)
        scaled = tl.zeros((BLOCK_ROWS,), tl.float32)
        most = tl.zeros((BLOCK_ROWS,), tl.float32)
        for at in range(0, DIM, BLOCK_PRODUCT):
            q = tl.load(query_row + (at + parts)[None, :], mask=live & (at + parts < DIM)[None, :], other=0)
            more_plain, more_scaled = squares(q, 1)
            plain += more_plain
            scaled += more_scaled
            most = tl.maximum(most, largest(q, 1))
    else:
        plain, scaled = squares(q, 1)
        most = largest(q, 1)
    norms = root(plain, scaled)
    # T's sign goes to the query: the row's factor is positive, and the largest product makes the largest logit.
    scale = power_of_two(most) * sign
    row_factor = tl.maximum(inverse(norms) / scale * to_base_2, 1e-30)  # not 0 at T = ∞: keys left out are at -∞
    if not IN_PARTS:
        q = narrow(q * scale[:, None], tl.float32 if WIDE else query.dtype.element_ty)

    maximum = tl.full((BLOCK_ROWS,), FLOOR, tl.float32)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    accumulator = tl.zeros((BLOCK_ROWS, BLOCK_DIM), tl.float32)
    for tile in range(begin, end):
        # Beyond the last key stands the last one again: it changes no maximum, and -∞ takes it out of the sums.
        at, left = tl.arange(0, BLOCK_COLUMNS), valid - tile * BLOCK_COLUMNS
        beyond = tl.where(at < left, 0.0, -float("inf"))
        column = tile * BLOCK_COLUMNS + tl.minimum(at, left - 1)
        if first is not None:
            column -= columns - start  # which does not overflow
            column = tl.where(column < 0, column + columns, column)
        key_row = keys + (column.to(tl.int64) * key_stride)[:, None]
        if IN_PARTS:
            products = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
            for at in range(0, DIM, BLOCK_PRODUCT):
                part = at + parts
                q = tl.load(query_row + part[None, :], mask=live & (part < DIM)[None, :], other=0).to(tl.float32)
                q = narrow(q * scale[:, None], tl.float32 if WIDE else query.dtype.element_ty)
                k = tl.load(key_row + (part.to(tl.int64) * dim_stride)[None, :], mask=(part < DIM)[None, :], other=0)
                k = widen(k, WIDE)
                products = tl.dot(q, tl.trans(k), products, input_precision=PRECISION)
        k = tl.load(key_row + (dims.to(tl.int64) * dim_stride)[None, :], mask=(dims < DIM)[None, :], other=0)
        k = widen(k, WIDE)
        if not IN_PARTS:
            products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        # Norms of keys come from another kernel: if registers read this tile too, Triton (3.6 to 3.8) has a buffer too
        # few for it, and the copy of a later tile overwrites it while the second product still reads it.
        if not NORMALIZED:
            key_factor = tl.load(key_factors + column)
            products *= key_factor[None, :]
        if EXCLUDE_DIAGONAL:
            products = tl.where(row[:, None] != column[None, :], products, -float("inf"))
        # One multiply-add for each logit; -∞ in its addend costs less than choosing among the products.
        higher = tl.maximum(maximum, tl.max(products, 1) * row_factor - HEADROOM)
        p = tl.exp2(products * row_factor[:, None] + (beyond[None, :] - higher[:, None]))
        decay = tl.exp2(maximum - higher)
        total = total * decay + tl.sum(p, 1)
        maximum = higher
        if GRADIENTS:
            if not NORMALIZED:
                p *= key_factor[None, :]
            k = widen(k, WIDE_VALUES)
            p = narrow(p, tl.float32 if WIDE_VALUES else keys.dtype.element_ty)
            accumulator = tl.dot(p, k, accumulator * decay[:, None], input_precision=PRECISION)

    at_row = split.to(tl.int64) * rows + row
    if tl.program_id(2) == 0:
        tl.store(maxima + at_row, maximum, mask=row < rows)
        tl.store(sums + at_row, total, mask=row < rows)
    if GRADIENTS:
        place = accumulators + at_row[:, None] * DIM + dims[None, :]
        tl.store(place, accumulator, mask=live & (dims < DIM)[None, :])


@cache
def tuned(where: config.Chip, tile: config.Tile) -> Any:
    """The kernel that tries the candidates at its first call of each shape, and then keeps the fastest."""
    tries = [
        triton.Config({"BLOCK_ROWS": t.rows, "BLOCK_COLUMNS": t.columns}, num_warps=t.warps, num_stages=t.stages)
        for t in config.candidates(where, tile)
    ]
    return triton.autotune(tries, key=["rows", "columns", "DIM", "NORMALIZED", "GRADIENTS"])(info_nce_split)


def split_pass(
    query: Tensor,
    keys: Tensor,
    temperature: float,
    temperature_tensor: Tensor | None,
    first: Tensor | None,
    count: Tensor | None,
    normalized: bool,
    exclude_diagonal: bool,
    gradients: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Maxima and sums (splits×N) and accumulators (splits×N×D) of contiguous queries over all keys (M×D)."""
    (n, dim), m = query.shape, len(keys)
    wide = query.dtype == torch.float32
    wide_values = wide or (keys.dtype == torch.float16 and not normalized)
    precision = matmul_precision() if wide else "tf32"
    where = chip(query.device)
    tile = config.split_tile(where, dim, precision if wide else "half", normalized)
    row_blocks = triton.cdiv(n, tile.rows)
    slices = triton.cdiv(dim, tile.dim) if gradients else 1
    splits = config.splits(where, row_blocks * slices, m, tile)
    maxima, sums = query.new_empty(2, splits, n, dtype=torch.float32)
    accumulators = query.new_empty(splits, n if gradients else 0, dim, dtype=torch.float32)
    kernel, blocks = info_nce_split, {"BLOCK_ROWS": tile.rows, "BLOCK_COLUMNS": tile.columns}
    if autotuning():
        kernel, blocks = tuned(where, tile), {}
    launch(
        kernel,
        lambda meta: (triton.cdiv(n, meta["BLOCK_ROWS"]), splits, slices),
        tile.warps,
        tile.stages,
        query,
        query=query,
        keys=keys,
        key_factors=None if normalized else inverse_norms_pass(keys),
        temperature=temperature,
        temperature_tensor=temperature_tensor,
        first=first,
        count=count,
        maxima=maxima,
        sums=sums,
        accumulators=accumulators,
        rows=n,
        columns=m,
        key_stride=keys.stride(0),
        dim_stride=keys.stride(1),
        DIM=dim,
        BLOCK_DIM=tile.dim,
        BLOCK_PRODUCT=tile.product,
        IN_PARTS=tile.product < config.block(dim),
        NORMALIZED=normalized,
        EXCLUDE_DIAGONAL=exclude_diagonal,
        GRADIENTS=gradients,
        WIDE=wide,
        WIDE_VALUES=wide_values,
        HEADROOM=14 if keys.dtype == torch.float16 and not wide_values else 0,
        PRECISION=precision,
        **blocks,
    )
    return maxima, sums, accumulators
