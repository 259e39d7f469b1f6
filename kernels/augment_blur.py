"""The blur as two matrix products a tile, the steps behind it, and the result."""

import triton
import triton.language as tl
from fastssl.kernels import config
from fastssl.kernels.launch import chip, launch
from fastssl.kernels.pixels import COLUMNS, SIGMA, stepped
from torch import Tensor

# Pixels of 8 bits less this, which float16 holds exactly. It also halves what rounding the weights to float16 costs,
# below .1 of 255: the weights of a pixel sum up to 1, and the middle is put back afterwards.
MIDDLE = tl.constexpr(128.0)
ALIGNED = tl.constexpr(8)  # pixels, which are read at once


@triton.jit(do_not_specialize=["height", "width", "row_taps", "column_taps", "down", "across"])
def augment_blur(
    planes: tl.tensor,  # N×3×height×stride of float16, pixels less MIDDLE
    out: tl.tensor,  # N×height×width×3
    parameters: tl.tensor,  # N×12
    rows: tl.tensor,  # N×row_taps×row_taps, as fastssl.ops.blur.table gives them
    columns: tl.tensor,  # N×column_taps×column_taps
    height: tl.tensor,
    width: tl.tensor,
    stride: tl.tensor,
    row_taps: tl.tensor,
    column_taps: tl.tensor,
    down: tl.tensor,  # tiles of an image
    across: tl.tensor,
    scale_r: tl.tensor,
    scale_g: tl.tensor,
    scale_b: tl.tensor,
    shift_r: tl.tensor,
    shift_g: tl.tensor,
    shift_b: tl.tensor,
    AFTER: tl.constexpr,
    TILE_ROWS: tl.constexpr,  # of the result
    TILE_COLUMNS: tl.constexpr,
    CHUNK_ROWS: tl.constexpr,  # of the pixels multiplied at once
    CHUNK_COLUMNS: tl.constexpr,
    ROW_CHUNKS: tl.constexpr,  # that a tile is made of
    COLUMN_CHUNKS: tl.constexpr,
) -> None:
    """One tile, channel by channel: rows · pixels · columnsᵀ."""
    image = (tl.program_id(0) // (down * across)).to(tl.int64)
    row = parameters + image * COLUMNS
    if tl.load(row + SIGMA) > 0:
        tile = tl.program_id(0) % (down * across)
        top, left = tile // across * TILE_ROWS, tile % across * TILE_COLUMNS
        rows += image * row_taps * row_taps
        columns += image * column_taps * column_taps
        i, j = top + tl.arange(0, TILE_ROWS), left + tl.arange(0, TILE_COLUMNS)
        first_row = first(top, row_taps, height)
        first_column = first(left, column_taps, width) // ALIGNED * ALIGNED
        y, x = first_row + tl.arange(0, CHUNK_ROWS), first_column + tl.arange(0, CHUNK_COLUMNS)
        bottom = tl.minimum(first(top + TILE_ROWS - 1, row_taps, height) + row_taps, height)
        row_weights = band(rows, i[:, None], y[None, :], row_taps, height)
        column_weights = band(columns, j[None, :], x[:, None], column_taps, width)
        inside = (i < height)[:, None] & (j < width)[None, :]
        corner = top.to(tl.int64) * width + left
        within = (tl.arange(0, TILE_ROWS) * width)[:, None] + tl.arange(0, TILE_COLUMNS)[None, :]
        out += (image * height * width + corner) * 3
        for channel in range(3):
            plane = planes + ((image * 3 + channel) * height + first_row) * stride
            result = tl.zeros((TILE_ROWS, TILE_COLUMNS), tl.float32)
            for column_chunk in range(COLUMN_CHUNKS):
                column = x + column_chunk * CHUNK_COLUMNS
                half = tl.zeros((TILE_ROWS, CHUNK_COLUMNS), tl.float32)
                for row_chunk in range(ROW_CHUNKS):
                    line = y + row_chunk * CHUNK_ROWS
                    place = plane + row_chunk * CHUNK_ROWS * stride.to(tl.int64)
                    place += (tl.arange(0, CHUNK_ROWS) * stride)[:, None] + column[None, :]
                    read = (line < bottom)[:, None] & (column < stride)[None, :]
                    if ROW_CHUNKS > 1:
                        row_weights = band(rows, i[:, None], line[None, :], row_taps, height)
                    half = tl.dot(row_weights, tl.load(place, mask=read, other=0), half)
                if COLUMN_CHUNKS > 1:
                    column_weights = band(columns, j[None, :], column[:, None], column_taps, width)
                result = tl.dot(half.to(tl.float16), column_weights, result)
            result = tl.floor(result + (MIDDLE + 0.5))
            result, _, _ = stepped(result, result, result, row, corner + within, width, 0.0, AFTER)
            scale = tl.where(channel == 0, scale_r, tl.where(channel == 1, scale_g, scale_b))
            shift = tl.where(channel == 0, shift_r, tl.where(channel == 1, shift_g, shift_b))
            result = result * scale + shift
            tl.store(out + channel + within * 3, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def first(i: tl.tensor, taps: tl.tensor, side: tl.tensor) -> tl.tensor:
    """The first of the pixels that pixel i of the result is made of."""
    return tl.minimum(tl.maximum(i - taps // 2, 0), side - taps)


@triton.jit
def band(table: tl.tensor, i: tl.tensor, y: tl.tensor, taps: tl.tensor, side: tl.tensor) -> tl.tensor:
    """The weight of pixel y in pixel i of the result, 0 where it has none; of an i beyond the last, the last one's."""
    i = tl.minimum(i, side - 1)
    start = first(i, taps, side)
    tap = y - start
    return tl.load(table + ((i - start) * taps - start) + y, mask=(tap >= 0) & (tap < taps), other=0.0).to(tl.float16)


def blur(
    planes: Tensor,
    width: int,
    out: Tensor,
    parameters: Tensor,
    rows: Tensor,
    columns: Tensor,
    after: tuple[int, ...],
    normalization: dict[str, float],
) -> None:
    """Write the images whose sigma is above 0 to `out`.

    Args:
        planes: N×3×H×stride of float16, pixels less MIDDLE; contiguous, stride a multiple of 16,
            and what lies between width and stride finite.
        width: of the images.
        out: N×H×W×3 in memory.
        parameters: N×12.
        rows: N×T×T, blurs of columns of pixels as `fastssl.ops.blur.table` gives them.
        columns: N×T×T, of rows of pixels.
        after: steps behind the blur, none that mixes channels.
        normalization: `scale_r`, `shift_r` and so on.
    """
    count, _, height, stride = planes.shape
    tile = config.blur_tile(chip(planes.device), max(rows.shape[1], columns.shape[1]))
    down, across = config.blocks(height, tile.rows), config.blocks(width, tile.columns)
    launch(
        augment_blur,
        (count * down * across,),
        tile.warps,
        1,
        planes,
        planes=planes,
        out=out,
        parameters=parameters,
        rows=rows,
        columns=columns,
        height=height,
        width=width,
        stride=stride,
        row_taps=rows.shape[1],
        column_taps=columns.shape[1],
        down=down,
        across=across,
        **normalization,
        AFTER=after,
        TILE_ROWS=tile.rows,
        TILE_COLUMNS=tile.columns,
        CHUNK_ROWS=tile.chunk_rows,
        CHUNK_COLUMNS=tile.chunk_columns,
        ROW_CHUNKS=config.blocks(min(rows.shape[1] + tile.rows - 1, height), tile.chunk_rows),
        COLUMN_CHUNKS=config.blocks(
            min(columns.shape[1] + tile.columns + ALIGNED.value - 2, width), tile.chunk_columns
        ),
    )
