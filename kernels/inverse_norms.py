"""1/‖x‖ of every row, for kernels in which a tile of rows must not leave shared memory (see `info_nce_split`)."""

import torch
import triton
import triton.language as tl
from fastssl.kernels import config
from fastssl.kernels.launch import chip, launch
from fastssl.kernels.rows import inverse, norm
from torch import Tensor


@triton.jit(do_not_specialize=["rows"])
def inverse_norms(
    x: tl.tensor,  # rows×DIM
    result: tl.tensor,  # rows
    rows: tl.tensor,
    row_stride: tl.tensor,
    dim_stride: tl.tensor,
    DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
) -> None:
    """A few rows."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    dims = tl.arange(0, BLOCK_DIM)
    within = (row < rows)[:, None] & (dims < DIM)[None, :]
    place = x + (row * row_stride)[:, None] + (dims.to(tl.int64) * dim_stride)[None, :]
    tl.store(result + row, inverse(norm(tl.load(place, mask=within, other=0), 1)), mask=row < rows)


def inverse_norms_pass(x: Tensor) -> Tensor:
    """1/max(‖x‖, eps) of the rows of N×D, in float32 (N)."""
    rows, dim = x.shape
    result = x.new_empty(rows, dtype=torch.float32)
    block_dim = config.block(dim)
    at_once = config.rows_at_once(chip(x.device), block_dim)
    launch(
        inverse_norms,
        (triton.cdiv(rows, at_once),),
        config.row_warps(block_dim),
        1,
        x,
        x=x,
        result=result,
        rows=rows,
        row_stride=x.stride(0),
        dim_stride=x.stride(1),
        DIM=dim,
        BLOCK_ROWS=at_once,
        BLOCK_DIM=block_dim,
    )
    return result
