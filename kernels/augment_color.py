"""All steps up to the blur; of images that are not blurred also the ones behind it, and the result."""

import triton
import triton.language as tl
from fastssl.kernels import config
from fastssl.kernels.augment_blur import MIDDLE
from fastssl.kernels.launch import launch
from fastssl.kernels.pixels import COLUMNS, CONTRAST, SIGMA, load_pixels, stepped, store_pixels
from torch import Tensor


@triton.jit(do_not_specialize=["pixels", "width", "stride", "blocks", "shares"])
def augment_color(
    images: tl.tensor,  # N×pixels×3
    out: tl.tensor,  # N×pixels×3
    planes: tl.tensor,  # N×3×height×stride of float16, pixels less MIDDLE; None without a blur
    parameters: tl.tensor,  # N×12
    sums: tl.tensor,  # N×shares, of luma; None without a jitter
    pixels: tl.tensor,  # of an image
    width: tl.tensor,
    stride: tl.tensor,
    blocks: tl.tensor,  # of BLOCK pixels in an image
    shares: tl.tensor,
    scale_r: tl.tensor,
    scale_g: tl.tensor,
    scale_b: tl.tensor,
    shift_r: tl.tensor,
    shift_g: tl.tensor,
    shift_b: tl.tensor,
    BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
    PADDED: tl.constexpr,  # stride is not width
    BLOCK: tl.constexpr,
    SHARES: tl.constexpr,
) -> None:
    """One block of pixels; what is to be blurred goes to `planes`."""
    image, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    row = parameters + image * COLUMNS
    mean = 0.0
    if sums is not None:
        if tl.load(row + CONTRAST) != 1.0:
            share = tl.arange(0, SHARES)
            mean = tl.sum(tl.load(sums + image * shares + share, mask=share < shares, other=0.0), 0) / pixels
    start = tl.cast(block, pixels.dtype) * BLOCK
    pixel = start + tl.arange(0, BLOCK)
    inside = pixel < pixels
    at = (image * pixels + start) * 3
    within = tl.arange(0, BLOCK) * 3
    r, g, b = load_pixels(images + at + within, inside)
    r, g, b = stepped(r, g, b, row, pixel, width, mean, BEFORE)
    if planes is not None:
        sigma = tl.load(row + SIGMA)
        if sigma > 0:
            plane = pixels // width * stride
            place = planes + image * plane * 3
            if PADDED:
                place += pixel // width * stride + pixel % width
            else:
                place += pixel
            tl.store(place, (r - MIDDLE).to(tl.float16), mask=inside)
            tl.store(place + plane, (g - MIDDLE).to(tl.float16), mask=inside)
            tl.store(place + 2 * plane, (b - MIDDLE).to(tl.float16), mask=inside)
        inside = pixel < tl.where(sigma > 0, 0, pixels)  # not an else, which would hold all that follows
    r, g, b = stepped(r, g, b, row, pixel, width, mean, AFTER)
    store_pixels(out + at + within, r * scale_r + shift_r, g * scale_g + shift_g, b * scale_b + shift_b, inside)


def color(
    images: Tensor,
    out: Tensor,
    planes: Tensor | None,
    parameters: Tensor,
    sums: Tensor | None,
    before: tuple[int, ...],
    after: tuple[int, ...],
    normalization: dict[str, float],
) -> None:
    """Write to `out` or, with planes and where sigma is above 0, to `planes`.

    Args:
        images: N×H×W×3, contiguous.
        out: as much memory in the same order.
        planes: N×3×H×stride of float16, contiguous, if there is a blur.
        parameters: N×12.
        sums: of luma, N×shares, if there is a jitter among the steps.
        before: steps up to the blur.
        after: steps behind it.
        normalization: `scale_r`, `shift_r` and so on.
    """
    count, height, width, _ = images.shape
    blocks = config.blocks(height * width, config.PIXELS)
    shares = 1 if sums is None else sums.shape[1]
    stride = width if planes is None else planes.shape[3]
    launch(
        augment_color,
        (count * blocks,),
        config.COLOR_WARPS,
        1,
        images,
        fuse=False,  # as the CPU computes: a fused sum may fall on the other side of a whole number
        images=images,
        out=out,
        planes=planes,
        parameters=parameters,
        sums=sums,
        pixels=height * width,
        width=width,
        stride=stride,
        blocks=blocks,
        shares=shares,
        **normalization,
        BEFORE=before,
        AFTER=after,
        PADDED=stride != width,
        BLOCK=config.PIXELS,
        SHARES=config.block(shares, 1),
    )
