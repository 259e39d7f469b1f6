"""The gradient of paired negatives: every key is read once and its gradient written once."""

import triton
import triton.language as tl
from fastssl.kernels import config
from fastssl.kernels.launch import chip, launch
from fastssl.kernels.rows import (
    LOG2_E,
    inverse,
    inverse_temperature,
    largest,
    norm,
    power_of_two,
    through_norm,
    unit_row,
)
from torch import Tensor


@triton.jit(do_not_specialize=["columns"])
def info_nce_paired_negatives(
    grad_loss: tl.tensor,  # rows
    lse: tl.tensor,  # rows
    query: tl.tensor,  # rows×DIM
    keys: tl.tensor,  # rows×columns×DIM
    temperature: tl.tensor,
    temperature_tensor: tl.tensor,
    gradient: tl.tensor,  # rows×columns×DIM
    columns: tl.tensor,
    row_stride: tl.tensor,
    key_stride: tl.tensor,
    dim_stride: tl.tensor,
    DIM: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    NORMALIZED: tl.constexpr,
) -> None:
    """One tile of one query's keys."""
    tiles = tl.cdiv(columns, BLOCK_COLUMNS)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    column = (tl.program_id(0) % tiles) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS).to(tl.int64)
    dims = tl.arange(0, BLOCK_DIM)
    mask = (column < columns)[:, None] & (dims < DIM)[None, :]
    inverse_t = inverse_temperature(temperature, temperature_tensor)
    q, _ = unit_row(tl.load(query + row * DIM + dims, mask=dims < DIM, other=0).to(tl.float32))
    place = keys + row * row_stride + (column * key_stride)[:, None] + (dims.to(tl.int64) * dim_stride)[None, :]
    k = tl.load(place, mask=mask, other=0).to(tl.float32)
    if not NORMALIZED:
        norms = norm(k, 1)
        scale = power_of_two(largest(k, 1))
        k = (k * scale[:, None]) * (inverse(norms) / scale)[:, None]
    similarity = tl.sum(k * q[None, :], 1)
    weight = tl.exp2((similarity * inverse_t - tl.load(lse + row)) * LOG2_E) * tl.load(grad_loss + row) * inverse_t
    result = weight[:, None] * q[None, :]
    if not NORMALIZED:
        result = through_norm(result, k, (weight * similarity)[:, None], norms[:, None])
    tl.store(gradient + (row * columns + column)[:, None] * DIM + dims[None, :], result, mask=mask)


def paired_negatives_pass(
    grad_loss: Tensor,
    lse: Tensor,
    query: Tensor,
    keys: Tensor,
    temperature: float,
    temperature_tensor: Tensor | None,
    normalized: bool,
    gradient: Tensor,
) -> None:
    """Write into `gradient` (N×M×D, contiguous) what Σ grad_loss·loss gives the keys; queries are contiguous."""
    n, m, dim = keys.shape
    block_dim = config.block(dim)
    at_once = config.rows_at_once(chip(query.device), block_dim)
    launch(
        info_nce_paired_negatives,
        (n * triton.cdiv(m, at_once),),
        config.row_warps(block_dim),
        1,
        query,
        grad_loss=grad_loss,
        lse=lse,
        query=query,
        keys=keys,
        temperature=temperature,
        temperature_tensor=temperature_tensor,
        gradient=gradient,
        columns=m,
        row_stride=keys.stride(0),
        key_stride=keys.stride(1),
        dim_stride=keys.stride(2),
        DIM=dim,
        BLOCK_COLUMNS=at_once,
        BLOCK_DIM=block_dim,
        NORMALIZED=normalized,
    )
