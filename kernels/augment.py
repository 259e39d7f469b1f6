"""Photometric augmentation of a batch: a pass for mean luma, one for all colours, one for what is blurred."""

from collections.abc import Sequence

import torch
from fastssl.kernels import config, pixels
from fastssl.kernels.augment_blur import blur
from fastssl.kernels.augment_color import color
from fastssl.kernels.augment_luma import luma_sums
from torch import Tensor

JITTER, GRAYSCALE, BLUR = pixels.JITTER.value, pixels.GRAYSCALE.value, pixels.BLUR.value
Blurs = tuple[Tensor | None, Tensor | None, Tensor | None]  # planes and tables
KEPT = {f"scale_{name}": 1.0 for name in "rgb"} | {f"shift_{name}": 0.0 for name in "rgb"}


def augment(
    images: Tensor,
    out: Tensor,
    parameters: Tensor,
    blur_rows: Tensor,
    blur_columns: Tensor,
    steps: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
) -> None:
    """Write to `out`; an image's bytes are read once, once more with a jitter and a third time if it is blurred.

    Args:
        images: N×H×W×3, uint8, contiguous; not changed.
        out: N×3×H×W in channels_last order; float32, bfloat16 or float16.
        parameters: N×12 with the columns `fastssl.ops.photometric.COLUMNS`.
        blur_rows: N×T×T, as `fastssl.ops.blur.table` gives them; empty without a blur among the steps.
        blur_columns: as blur_rows, for the other direction.
        steps: positions in `fastssl.ops.photometric.PHOTOMETRIC`, each at most once.
        mean: of the three channels.
        std: of the three channels.
    """
    before: tuple[int, ...] = tuple(steps)
    after: tuple[int, ...] = ()
    planes = None
    if BLUR in before:
        at = before.index(BLUR)
        before, after = before[:at], before[at + 1 :]
        planes = _planes(images)
    blurs: Blurs = (planes, blur_rows, blur_columns)
    if JITTER in after or GRAYSCALE in after:  # which need all channels, the first of whole blurred images
        blurred = images.new_empty(images.shape)
        _augment(images, blurred, parameters, blurs, before, (), KEPT)
        images, before, after, blurs = blurred, after, (), (None, None, None)
    scales = {f"scale_{name}": 1 / (255 * s) for name, s in zip("rgb", std, strict=True)}
    shifts = {f"shift_{name}": -m / s for name, m, s in zip("rgb", mean, std, strict=True)}
    _augment(images, out, parameters, blurs, before, after, scales | shifts)


def _planes(images: Tensor) -> Tensor:
    """Room for what is to be blurred, every row at an even address; what fills it up must be finite."""
    count, height, width, _ = images.shape
    stride = config.blocks(width, 16) * 16
    if stride == width:
        return images.new_empty(count, 3, height, stride, dtype=torch.float16)
    return images.new_zeros(count, 3, height, stride, dtype=torch.float16)


def _augment(
    images: Tensor,
    out: Tensor,
    parameters: Tensor,
    blurs: Blurs,
    before: tuple[int, ...],
    after: tuple[int, ...],
    normalization: dict[str, float],
) -> None:
    """Steps before a blur, the blur if there are planes and tables for it, and those after it."""
    sums = luma_sums(images, parameters, before[: before.index(JITTER)]) if JITTER in before else None
    planes, rows, columns = blurs
    color(images, out, planes, parameters, sums, before, after, normalization)
    if planes is not None and rows is not None and columns is not None:
        blur(planes, images.shape[2], out, parameters, rows, columns, after, normalization)
