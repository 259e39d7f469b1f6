"""BYOL's ‖p̂ − ẑ‖² = 2 − 2·cos per row with its gradient: one program a row reads both once."""

import torch
import triton
import triton.language as tl
from fastssl.kernels import config
from fastssl.kernels.launch import launch
from fastssl.kernels.rows import through_norm, unit_row
from torch import Tensor


@triton.jit
def normalized_mse(
    prediction: tl.tensor,  # rows×DIM
    target: tl.tensor,  # rows×DIM
    loss: tl.tensor,
    gradient: tl.tensor,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    GRADIENTS: tl.constexpr,
) -> None:
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, BLOCK_DIM)
    mask = dims < DIM
    at = row * DIM + dims
    p, p_norm = unit_row(tl.load(prediction + at, mask=mask, other=0).to(tl.float32))
    z, _ = unit_row(tl.load(target + at, mask=mask, other=0).to(tl.float32))
    difference = p - z  # 2 - 2·cos would cancel near 0
    tl.store(loss + row, tl.sum(difference * difference, 0))
    if GRADIENTS:
        along = tl.sum(difference * p, 0)
        tl.store(gradient + at, 2.0 * through_norm(difference, p, along, p_norm), mask=mask)


def forward(prediction: Tensor, target: Tensor, gradients: bool) -> tuple[Tensor, Tensor]:
    """Loss (N) and its gradient to the prediction (N×D, or empty if not wanted), in float32."""
    prediction, target = prediction.contiguous(), target.contiguous()
    n, dim = prediction.shape
    loss = prediction.new_empty(n, dtype=torch.float32)
    gradient = prediction.new_empty((n, dim) if gradients else (0,), dtype=torch.float32)
    block_dim = config.block(dim)
    if n:
        launch(
            normalized_mse,
            (n,),
            config.row_warps(block_dim),
            1,
            prediction,
            prediction=prediction,
            target=target,
            loss=loss,
            gradient=gradient,
            DIM=dim,
            BLOCK_DIM=block_dim,
            GRADIENTS=gradients,
        )
    return loss, gradient
