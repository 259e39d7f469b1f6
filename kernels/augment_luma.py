"""Sums of luma over parts of each image, as it is when the contrast is to be changed, which is about their mean."""

import triton
import triton.language as tl
from fastssl.kernels import config
from fastssl.kernels.launch import chip, launch
from fastssl.kernels.pixels import COLUMNS, CONTRAST, jitter_order, jittered, load_pixels, luma, stepped
from torch import Tensor


@triton.jit(do_not_specialize=["pixels", "width", "blocks", "shares"])
def augment_luma(
    images: tl.tensor,  # N×pixels×3
    parameters: tl.tensor,  # N×12
    sums: tl.tensor,  # N×shares
    pixels: tl.tensor,  # of an image
    width: tl.tensor,
    blocks: tl.tensor,  # of BLOCK pixels in an image
    shares: tl.tensor,  # programs of an image
    STEPS: tl.constexpr,  # those before the jitter
    BLOCK: tl.constexpr,
) -> None:
    """One share of an image."""
    image, share = (tl.program_id(0) // shares).to(tl.int64), tl.program_id(0) % shares
    row = parameters + image * COLUMNS
    if tl.load(row + CONTRAST) != 1.0:
        sequence, parts = jitter_order(row)
        total = 0.0
        for block in range(share, blocks, shares):
            start = tl.cast(block, pixels.dtype) * BLOCK
            pixel = start + tl.arange(0, BLOCK)
            inside = pixel < pixels
            place = images + (image * pixels + start) * 3 + tl.arange(0, BLOCK) * 3
            r, g, b = load_pixels(place, inside)
            r, g, b = stepped(r, g, b, row, pixel, width, 0.0, STEPS)
            r, g, b = jittered(r, g, b, row, sequence, parts, 0.0)
            total += tl.sum(tl.where(inside, luma(r, g, b), 0.0), 0)
        tl.store(sums + image * shares + share, total)


def luma_sums(images: Tensor, parameters: Tensor, before: tuple[int, ...]) -> Tensor:
    """N×shares of float32; those of images whose contrast stays are not written.

    Args:
        images: N×H×W×3, contiguous.
        parameters: N×12.
        before: the steps before the jitter.
    """
    count, height, width, _ = images.shape
    blocks = config.blocks(height * width, config.PIXELS)
    shares = config.luma_shares(chip(images.device), blocks)
    sums = parameters.new_empty(count, shares)
    launch(
        augment_luma,
        (count * shares,),
        config.LUMA_WARPS,
        1,
        images,
        fuse=False,  # as the CPU computes: a fused sum may fall on the other side of a whole number
        images=images,
        parameters=parameters,
        sums=sums,
        pixels=height * width,
        width=width,
        blocks=blocks,
        shares=shares,
        STEPS=before,
        BLOCK=config.PIXELS,
    )
    return sums
