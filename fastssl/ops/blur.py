"""Blurs as matrices: a separable blur of a line of pixels is linear, so a matrix says all of it, borders included."""

import math

import torch
from torch import Tensor

from fastssl.ops.photometric import GaussianBlur


def table(step: GaussianBlur, sigma: Tensor, side: int) -> Tensor:
    """The blur of lines of `side` pixels in the least of memory.

    With T = min(2·reach + 1, side), pixel i of the result is the product of row i - first of the table with the T
    pixels from first = clamp(i - reach, 0, side - T) on. For the blur of a long line is that of one of T pixels with
    its middle row repeated: the rows above and below it tell what happens at the borders.

    Args:
        step: the kind of blur.
        sigma: N, in pixels; 0 for images that are not blurred. None may be above the step's range.
        side: pixels of a line; more than half of kernel_size, for its border is reflected.

    Returns:
        N×T×T float32 on the device of `sigma`; the rows of images that are not blurred mean nothing.
    """
    extent = reach(step)
    rows = min(2 * extent + 1, side)
    if sigma.device.type != "cpu" or torch.compiler.is_compiling():
        return matrix(step, sigma, rows, extent).float()
    blurred = (sigma > 0).nonzero().squeeze(1)  # elsewhere that would wait for the device
    return sigma.new_zeros(len(sigma), rows, rows).index_copy_(
        0, blurred, matrix(step, sigma[blurred], rows, extent).float()
    )


def reach(step: GaussianBlur) -> int:
    """How many pixels away another one can have influence."""
    return step.kernel_size // 2 if step.kernel_size else 3 * (math.floor(_box_radius(step.sigma[1])) + 1)


def matrix(step: GaussianBlur, sigma: Tensor, side: int, extent: int) -> Tensor:
    """N×side×side float64: the whole blur of lines of `side` pixels, for an influence over `extent` pixels at most."""
    # More than the step's range would not fit into the table and darken the image.
    sigma = sigma.double().clamp(1e-3, step.sigma[1]).view(-1, 1, 1)
    if step.kernel_size:
        return _gaussian(sigma, side, extent)
    return _boxes(sigma, side, extent // 3)


def _gaussian(sigma: Tensor, side: int, half: int) -> Tensor:
    """A Gaussian of 2·half + 1 taps with reflected borders, as torchvision's gaussian_blur."""
    distance = torch.arange(half + 1, device=sigma.device)
    taps = (-0.5 * (distance / sigma) ** 2).exp()  # N×1×(half + 1)
    taps = taps / (2 * taps.sum(2, keepdim=True) - taps[:, :, :1])
    taps = torch.nn.functional.pad(taps.squeeze(1), (0, 1))  # a last one of 0 for all that is farther away
    pixel = torch.arange(side, device=sigma.device)
    row, column, last = pixel.view(-1, 1), pixel, side - 1
    # A pixel counts by itself and, but for the outermost, as its mirror images beyond the two borders.
    result = taps[:, (row - column).abs().clamp(max=half + 1)]
    result += taps[:, (row + column).clamp(max=half + 1)] * (column > 0)
    result += taps[:, (2 * last - row - column).clamp(max=half + 1)] * (column < last)
    return result


def _boxes(sigma: Tensor, side: int, extent: int) -> Tensor:
    """PIL's GaussianBlur(radius=sigma), three box blurs of fractional radius with repeated borders.

    Radius from "Fast Almost-Gaussian Filtering" (Kovesi 2010) as in Pillow's BoxBlur.c.
    """
    variance = sigma**2 / 3
    whole = ((12 * variance + 1).sqrt() / 2 - 0.5).floor()
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    radius = whole + part
    index = torch.arange(-extent, side + extent, device=sigma.device)
    distance = (index.view(1, -1) - index[extent : side + extent].view(-1, 1)).abs()
    weights = (radius + 1 - distance).clamp(0, 1) / (2 * radius + 1)
    box = _folded(weights, index.clamp(0, side - 1), side)
    return box @ box @ box


def _folded(weights: Tensor, source: Tensor, side: int) -> Tensor:
    """Give the weights of positions beyond the borders to the pixels that stand for them."""
    stands_for = source.view(-1, 1) == torch.arange(side, device=source.device)
    return weights @ stands_for.to(weights.dtype)  # a product, because GPUs add by index in any order


def _box_radius(sigma: float) -> float:
    """Kovesi's radius of one of three box blurs, its whole part exact."""
    return math.sqrt(4 * sigma**2 + 1) / 2 - 0.5
