"""One pass of each query over a share of its own negatives: the same partial results as `info_nce_split`."""

import torch
import triton
import triton.language as tl
from fastssl.kernels import config
from fastssl.kernels.launch import chip, launch
from fastssl.kernels.rows import FLOOR, LOG2_E, inverse, inverse_temperature, norm, unit_row
from torch import Tensor


@triton.jit(do_not_specialize=["rows", "columns"])
def info_nce_paired(
    query: tl.tensor,  # rows×DIM
    keys: tl.tensor,  # rows×columns×DIM
    temperature: tl.tensor,
    temperature_tensor: tl.tensor,
    maxima: tl.tensor,  # splits×rows, of logits/T in base 2
    sums: tl.tensor,  # splits×rows
    accumulators: tl.tensor,  # splits×rows×DIM
    rows: tl.tensor,
    columns: tl.tensor,
    row_stride: tl.tensor,
    key_stride: tl.tensor,
    dim_stride: tl.tensor,
    DIM: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    NORMALIZED: tl.constexpr,
    GRADIENTS: tl.constexpr,
) -> None:
    """One query against one split of its keys."""
    row = tl.program_id(0).to(tl.int64)
    split, splits = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    dims = tl.arange(0, BLOCK_DIM)
    within = dims < DIM
    to_base_2 = inverse_temperature(temperature, temperature_tensor) * LOG2_E
    q, _ = unit_row(tl.load(query + row * DIM + dims, mask=within, other=0).to(tl.float32))
    place = keys + row * row_stride + (dims.to(tl.int64) * dim_stride)[None, :]
    tiles = tl.cdiv(columns, BLOCK_COLUMNS)

    maximum = tl.full((), FLOOR, tl.float32)
    total = tl.zeros((), tl.float32)
    accumulator = tl.zeros((BLOCK_DIM,), tl.float32)
    for tile in range((split * tiles // splits).to(tl.int32), ((split + 1) * tiles // splits).to(tl.int32)):
        column = tile * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        inside = column < columns
        k = tl.load(
            place + (column.to(tl.int64) * key_stride)[:, None], mask=inside[:, None] & within[None, :], other=0
        ).to(tl.float32)
        logits = tl.sum(k * q[None, :], 1)
        if not NORMALIZED:  # first of all, for a huge key's product with 1/T could overflow
            factor = inverse(norm(k, 1))
            logits *= factor
        logits *= to_base_2
        logits = tl.where(inside, logits, -float("inf"))
        higher = tl.maximum(maximum, tl.max(logits, 0))
        p = tl.exp2(logits - higher)
        decay = tl.exp2(maximum - higher)
        total = total * decay + tl.sum(p, 0)
        maximum = higher
        if GRADIENTS:
            if not NORMALIZED:
                p *= factor
            accumulator = accumulator * decay + tl.sum(k * p[:, None], 0)

    at_row = split * rows + row
    tl.store(maxima + at_row, maximum)
    tl.store(sums + at_row, total)
    if GRADIENTS:
        tl.store(accumulators + at_row * DIM + dims, accumulator, mask=within)


def paired_pass(
    query: Tensor,
    keys: Tensor,
    temperature: float,
    temperature_tensor: Tensor | None,
    normalized: bool,
    gradients: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Maxima and sums (splits×N) and accumulators (splits×N×D) of contiguous queries over their keys (N×M×D)."""
    n, m, dim = keys.shape
    block_dim = config.block(dim)
    where = chip(query.device)
    at_once = config.rows_at_once(where, block_dim)
    splits = config.paired_splits(where, n, m, at_once)
    maxima, sums = query.new_empty(2, splits, n, dtype=torch.float32)
    accumulators = query.new_empty(splits, n if gradients else 0, dim, dtype=torch.float32)
    launch(
        info_nce_paired,
        (n, splits),
        config.row_warps(block_dim),
        2,
        query,
        query=query,
        keys=keys,
        temperature=temperature,
        temperature_tensor=temperature_tensor,
        maxima=maxima,
        sums=sums,
        accumulators=accumulators,
        rows=n,
        columns=m,
        row_stride=keys.stride(0),
        key_stride=keys.stride(1),
        dim_stride=keys.stride(2),
        DIM=dim,
        BLOCK_COLUMNS=at_once,
        BLOCK_DIM=block_dim,
        NORMALIZED=normalized,
        GRADIENTS=gradients,
    )
    return maxima, sums, accumulators
