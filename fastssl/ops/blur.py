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
    return matrix(step, sigma, min(2 * reach(step) + 1, side), reach(step)).float()


def reach(step: GaussianBlur) -> int:
    """How many pixels away another one can have influence."""
    return step.kernel_size // 2 if step.kernel_size else 3 * (math.floor(_box_radius(step.sigma[1])) + 1)


def matrix(step: GaussianBlur, sigma: Tensor, side: int, extent: int) -> Tensor:
    """N×side×side float64: the whole blur of lines of `side` pixels, for an influence over `extent` pixels at most."""
    sigma = sigma.double().clamp(min=1e-3).view(-1, 1, 1)
    if step.kernel_size:
        return _gaussian(sigma, side, extent)
    return _boxes(sigma, side, extent // 3)


def _gaussian(sigma: Tensor, side: int, half: int) -> Tensor:
    """A Gaussian of 2·half + 1 taps with reflected borders, as torchvision's gaussian_blur."""
    index = torch.arange(-half, side + half, device=sigma.device)
    distance = index.view(1, -1) - index[half : side + half].view(-1, 1)  # side×(side + 2·half)
    weights = (-0.5 * (distance / sigma) ** 2).exp() * (distance.abs() <= half)
    weights = weights / weights.sum(2, keepdim=True)
    source = index.abs()
    source = torch.where(source >= side, 2 * (side - 1) - source, source)
    return _folded(weights, source, side)


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
