"""The gradient of shared negatives: one program a tile of keys (and slice) goes over all queries; no atomics."""

import torch
import triton
import triton.language as tl
from fastssl.kernels import config
from fastssl.kernels.launch import chip, launch
from fastssl.kernels.launch import precision as matmul_precision
from fastssl.kernels.rows import (
    LOG2_E,
    inverse,
    inverse_temperature,
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
    column = tl.program_id(0).to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    dims = tl.program_id(1) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    inverse_t = inverse_temperature(temperature, temperature_tensor)
    start, valid = ring(first, count, columns)
    inside = column < columns
    place = (column < columns)[:, None] & (dims < DIM)[None, :]
    if first is not None:
        behind = column - start
        inside = inside & (tl.where(behind < 0, behind + columns, behind) < valid)
    key_row = keys + (column * key_stride)[:, None]
    live = inside[:, None]

    # Keys stay: scaled to lengths of 1 to 2, so that no product overflows. Queries pass by as they are.
    if IN_PARTS:
        parts = tl.arange(0, BLOCK_PRODUCT)
        plain = tl.zeros((BLOCK_COLUMNS,), tl.float32)
        scaled = tl.zeros((BLOCK_COLUMNS,), tl.float32)
        for at in range(0, DIM, BLOCK_PRODUCT):
            part = at + parts
            k = tl.load(key_row + (part.to(tl.int64) * dim_stride)[None, :], mask=live & (part < DIM)[None, :], other=0)
            more_plain, more_scaled = squares(k, 1)
            plain += more_plain
            scaled += more_scaled
        norms = root(plain, scaled)
    else:
        k = tl.load(key_row + (dims.to(tl.int64) * dim_stride)[None, :], mask=live & (dims < DIM)[None, :], other=0)
        plain, scaled = squares(k, 1)
        norms = root(plain, scaled)
        k = narrow(k.to(tl.float32) * power_of_two(norms)[:, None], tl.float32 if WIDE else keys.dtype.element_ty)
    scale = power_of_two(norms)
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
        present = (row < rows)[:, None]
        query_row = query + row.to(tl.int64)[:, None] * DIM
        if IN_PARTS:
            similarity = tl.zeros((BLOCK_COLUMNS, BLOCK_ROWS), tl.float32)
            query_plain = tl.zeros((BLOCK_ROWS,), tl.float32)
            query_scaled = tl.zeros((BLOCK_ROWS,), tl.float32)
            for at in range(0, DIM, BLOCK_PRODUCT):
                part = at + parts
                k = tl.load(
                    key_row + (part.to(tl.int64) * dim_stride)[None, :], mask=live & (part < DIM)[None, :], other=0
                )
                k = narrow(k.to(tl.float32) * scale[:, None], tl.float32 if WIDE else keys.dtype.element_ty)
                q = widen(tl.load(query_row + part[None, :], mask=present & (part < DIM)[None, :], other=0), WIDE)
                similarity = tl.dot(k, tl.trans(q), similarity, input_precision=PRECISION)
                more_plain, more_scaled = squares(q, 1)
                query_plain += more_plain
                query_scaled += more_scaled
        q = widen(tl.load(query_row + dims[None, :], mask=present & (dims < DIM)[None, :], other=0), WIDE)
        if not IN_PARTS:
            similarity = tl.dot(k, tl.trans(q), input_precision=PRECISION)
            query_plain, query_scaled = squares(q, 1)
        query_factor = inverse(root(query_plain, query_scaled))
        similarity *= key_factor[:, None]
        similarity *= query_factor[None, :]
        row_lse = tl.load(lse + row, mask=row < rows, other=0)
        row_gradient = tl.load(grad_loss + row, mask=row < rows, other=0) * inverse_t
        counted = live & (row < rows)[None, :]
        if EXCLUDE_DIAGONAL:
            counted = counted & (row[None, :] != column[:, None])
        weight = tl.exp2((similarity * inverse_t - row_lse[None, :]) * LOG2_E) * row_gradient[None, :]
        weight = tl.where(counted, weight, 0.0)
        along += tl.sum(weight * similarity, 1)
        weight = weight * query_factor[None, :]
        weight = narrow(weight, tl.float32 if WIDE_VALUES else query.dtype.element_ty)
        unit_gradient = tl.dot(weight, widen(q, WIDE_VALUES), unit_gradient, input_precision=PRECISION)

    if not NORMALIZED:
        k = tl.load(key_row + (dims.to(tl.int64) * dim_stride)[None, :], mask=live & (dims < DIM)[None, :], other=0)
        unit = k.to(tl.float32) * scale[:, None] * key_factor[:, None]
        unit_gradient = through_norm(unit_gradient, unit, along[:, None], norms[:, None])
    tl.store(gradient + column[:, None] * DIM + dims[None, :], unit_gradient, mask=place)


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
    tile = config.negatives_tile(chip(query.device), dim, precision if wide else "half")
    slices = triton.cdiv(dim, tile.dim)
    launch(
        info_nce_negatives,
        (triton.cdiv(len(keys), tile.rows), slices),
        tile.warps,
        tile.stages,
        query,
        grad_loss=grad_loss,
        lse=lse,
        query=query,
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
