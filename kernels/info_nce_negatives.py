"""The gradient of shared negatives: one program a tile of keys (and slice) goes over all queries; no atomics."""

import torch
import triton
import triton.language as tl
from fastssl.kernels import config
from fastssl.kernels.inverse_norms import inverse_norms_pass
from fastssl.kernels.launch import chip, launch
from fastssl.kernels.launch import precision as matmul_precision
from fastssl.kernels.rows import (
    LOG2_E,
    inverse,
    inverse_temperature,
    largest,
    narrow,
    power_of_two,
    ring,
    root,
    squares,
    through_norm,
    widen,
)
from torch import Tensor


@triton.jit(do_not_specialize=["rows", "columns"])
def info_nce_negatives(
    grad_loss: tl.tensor,  # rows
    lse: tl.tensor,  # rows
    query: tl.tensor,  # rows×DIM
    query_factors: tl.tensor,  # rows: 1/‖query‖, which every program needs for every tile
    keys: tl.tensor,  # columns×DIM
    temperature: tl.tensor,
    temperature_tensor: tl.tensor,
    first: tl.tensor,
    count: tl.tensor,
    gradient: tl.tensor,  # columns×DIM
    rows: tl.tensor,
    columns: tl.tensor,
    key_stride: tl.tensor,
    dim_stride: tl.tensor,
    DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,  # of queries
    BLOCK_COLUMNS: tl.constexpr,  # of keys
    BLOCK_DIM: tl.constexpr,
    BLOCK_PRODUCT: tl.constexpr,
    IN_PARTS: tl.constexpr,
    NORMALIZED: tl.constexpr,
    EXCLUDE_DIAGONAL: tl.constexpr,
    WIDE: tl.constexpr,
    WIDE_VALUES: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """One tile of keys against all queries."""
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    dims = tl.program_id(1) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    inverse_t = inverse_temperature(temperature, temperature_tensor)
    start, valid = ring(first, count, columns)
    inside = column < columns
    if first is not None:
        behind = column - start
        inside = inside & (tl.where(behind < 0, behind + columns, behind) < valid)
    key_row = (
        keys + (tl.minimum(column, columns - 1).to(tl.int64) * key_stride)[:, None]
    )  # others are left out at the end

    # Keys stay: scaled to elements below 2, so that no product overflows. Queries pass by as they are.
    if IN_PARTS:
        parts = tl.arange(0, BLOCK_PRODUCT)
        plain = tl.zeros((BLOCK_COLUMNS,), tl.float32)
        scaled = tl.zeros((BLOCK_COLUMNS,), tl.float32)
        most = tl.zeros((BLOCK_COLUMNS,), tl.float32)
        for at in range(0, DIM, BLOCK_PRODUCT):
            part = at + parts
            k = tl.load(key_row + (part.to(tl.int64) * dim_stride)[None, :], mask=(part < DIM)[None, :], other=0)
            more_plain, more_scaled = squares(k, 1)
            plain += more_plain
            scaled += more_scaled
            most = tl.maximum(most, largest(k, 1))
    else:
        k = tl.load(key_row + (dims.to(tl.int64) * dim_stride)[None, :], mask=(dims < DIM)[None, :], other=0)
        plain, scaled = squares(k, 1)
        most = largest(k, 1)
        k = narrow(k.to(tl.float32) * power_of_two(most)[:, None], tl.float32 if WIDE else keys.dtype.element_ty)
    norms = root(plain, scaled)
    scale = power_of_two(most)
    key_factor = 1.0 / scale
    if not NORMALIZED:
        key_factor = inverse(norms) / scale

    unit_gradient = tl.zeros((BLOCK_COLUMNS, BLOCK_DIM), tl.float32)
    along = tl.zeros((BLOCK_COLUMNS,), tl.float32)
    queries = rows
    if first is not None:
        queries = tl.where(tl.sum(inside.to(tl.int32), 0) > 0, rows, 0)
    for begin in range(0, queries, BLOCK_ROWS):
        row = begin + tl.arange(0, BLOCK_ROWS)
        query_row = query + tl.minimum(row, rows - 1).to(tl.int64)[:, None] * DIM
        query_factor = tl.load(query_factors + row, mask=row < rows, other=0)
        row_lse = tl.load(lse + row, mask=row < rows, other=0) * LOG2_E
        row_gradient = tl.load(grad_loss + row, mask=row < rows, other=0) * inverse_t  # 0 where there is no row
        if IN_PARTS:
            similarity = tl.zeros((BLOCK_COLUMNS, BLOCK_ROWS), tl.float32)
            for at in range(0, DIM, BLOCK_PRODUCT):
                part = at + parts
                k = tl.load(key_row + (part.to(tl.int64) * dim_stride)[None, :], mask=(part < DIM)[None, :], other=0)
                k = narrow(k.to(tl.float32) * scale[:, None], tl.float32 if WIDE else keys.dtype.element_ty)
                q = widen(tl.load(query_row + part[None, :], mask=(part < DIM)[None, :], other=0), WIDE)
                similarity = tl.dot(k, tl.trans(q), similarity, input_precision=PRECISION)
        q = widen(tl.load(query_row + dims[None, :], mask=(dims < DIM)[None, :], other=0), WIDE)
        if not IN_PARTS:
            similarity = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        similarity *= key_factor[:, None]
        similarity *= query_factor[None, :]
        weight = tl.exp2(similarity * (inverse_t * LOG2_E) - row_lse[None, :]) * row_gradient[None, :]
        if EXCLUDE_DIAGONAL:
            weight = tl.where(row[None, :] != column[:, None], weight, 0.0)
        if IN_PARTS:
            along += tl.sum(weight * similarity, 1)
        weight = weight * query_factor[None, :]
        weight = narrow(weight, tl.float32 if WIDE_VALUES else query.dtype.element_ty)
        unit_gradient = tl.dot(weight, widen(q, WIDE_VALUES), unit_gradient, input_precision=PRECISION)

    place = (column < columns)[:, None] & (dims < DIM)[None, :]
    if not NORMALIZED:
        # With a mask of its own, or else the compiler would keep the first load's result in registers all the while.
        k = tl.load(key_row + (dims.to(tl.int64) * dim_stride)[None, :], mask=place, other=0)
        unit = k.to(tl.float32) * scale[:, None] * key_factor[:, None]
        if not IN_PARTS:  # all columns are here
            along = tl.sum(unit_gradient * unit, 1)
        unit_gradient = through_norm(unit_gradient, unit, along[:, None], norms[:, None])
    if first is not None:
        unit_gradient = tl.where(inside[:, None], unit_gradient, 0.0)
    tl.store(gradient + column.to(tl.int64)[:, None] * DIM + dims[None, :], unit_gradient, mask=place)


def negatives_pass(
    grad_loss: Tensor,
    lse: Tensor,
    query: Tensor,
    keys: Tensor,
    temperature: float,
    temperature_tensor: Tensor | None,
    first: Tensor | None,
    count: Tensor | None,
    normalized: bool,
    exclude_diagonal: bool,
    gradient: Tensor,
) -> None:
    """Write into `gradient` (M×D, contiguous) what Σ grad_loss·loss gives the keys (M×D); queries are contiguous."""
    dim = query.shape[1]
    wide = query.dtype == torch.float32
    wide_values = query.dtype != torch.bfloat16  # weights hold grad_loss/‖q‖, which float16 need not
    precision = matmul_precision() if wide else "tf32"
    kind = precision if wide else "mixed" if wide_values else "half"
    tile = config.negatives_tile(chip(query.device), dim, kind)
    slices = triton.cdiv(dim, tile.dim)
    query_factors = inverse_norms_pass(query)
    launch(
        info_nce_negatives,
        (triton.cdiv(len(keys), tile.rows), slices),
        tile.warps,
        tile.stages,
        query,
        grad_loss=grad_loss,
        lse=lse,
        query=query,
        query_factors=query_factors,
        keys=keys,
        temperature=temperature,
        temperature_tensor=temperature_tensor,
        first=first,
        count=count,
        gradient=gradient,
        rows=len(query),
        columns=len(keys),
        key_stride=keys.stride(0),
        dim_stride=keys.stride(1),
        DIM=dim,
        BLOCK_ROWS=tile.columns,
        BLOCK_COLUMNS=tile.rows,
        BLOCK_DIM=tile.dim,
        BLOCK_PRODUCT=tile.product,
        IN_PARTS=tile.product < config.block(dim),
        NORMALIZED=normalized,
        EXCLUDE_DIAGONAL=exclude_diagonal,
        WIDE=wide,
        WIDE_VALUES=wide_values,
        PRECISION=precision,
    )
