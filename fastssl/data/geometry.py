"""Crop, shift and flip of whole batches: the random numbers, and what follows from them for images of any sizes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastssl.data.augmentation import HorizontalFlip, RandomResizedCrop, RandomShift, View, margin_around
from fastssl.ops.photometric import TRIES, first_fitting

COLUMNS = 3 + 4 * TRIES  # flip (0 or 1); shift down, shift right, in pixels; area, aspect, top and left of each try


def draw(view: View, count: int, generator: torch.Generator) -> Tensor:
    """Draw what `view` does to the geometry of `count` images.

    Args:
        view: the recipe.
        count: N, images.
        generator: on the CPU.

    Returns:
        N×`COLUMNS` float32. The tries are uniform numbers in 0…1, because the box depends on the image's size.
    """
    table = torch.zeros(count, COLUMNS)
    for step in view.geometry:
        if isinstance(step, HorizontalFlip):
            table[:, 0] = (torch.rand(count, generator=generator) < step.p).float()
        elif isinstance(step, RandomShift):
            table[:, 1:3] = torch.randint(-step.pixels, step.pixels + 1, (count, 2), generator=generator).float()
        else:
            table[:, 3:] = torch.rand(count, 4 * TRIES, generator=generator)
    return table


def boxes(step: RandomResizedCrop, drawn: Tensor, sizes: Tensor | Sequence[int]) -> Tensor:
    """The crops of images, N×4 int64: top, left, height, width. torchvision's.

    Where none of the tries fits it is the largest central box within the aspects.

    Args:
        step: the crop.
        drawn: N×`COLUMNS`, by `draw`.
        sizes: height and width of each image (N×2 integers), or of all.
    """
    height, width = _sides(sizes, len(drawn))
    found = first_fitting(drawn[:, 3:].view(-1, 4, TRIES).mT, (height, width), step.area, step.aspect)
    if found[:, 2].all():
        return found
    ratio = (width.double() / height).clamp(*step.aspect)
    h, w = torch.minimum(height, (width / ratio).round().long()), torch.minimum(width, (height * ratio).round().long())
    centre = torch.stack([(height - h) // 2, (width - w) // 2, h, w], 1)
    return torch.where(found[:, 2:3] > 0, found, centre)


def inputs(view: View, drawn: Tensor, sizes: Tensor | Sequence[int]) -> dict[str, Tensor]:
    """What `dali_graph` is fed with every batch, so that it need not compute: in it a sum takes as long as a crop.

    Args:
        view: the recipe.
        drawn: N×`COLUMNS`, by `draw`.
        sizes: height and width of each image (N×2 integers), or of all.

    Returns:
        "corner" and "extent" of the pixels to take, int32; for a random crop "narrow", the size after the first of
        two resizes, and "start" and "end" of the part to resize, which runs from right to left where it is flipped;
        for a bicubic one also the corners of the crop's border columns ("first", "last", of extent "side") and of
        its lower border row ("bottom"), and for rows and columns what `border` says; without a crop
        "whole", the size to which the image is resized before; "shift" and "flip" where they come apart.
        Each N×2 but "flip", which is N, and those of `border`.
    """
    kinds = {type(step) for step in view.geometry}
    crop = next((step for step in view.geometry if isinstance(step, RandomResizedCrop)), None)
    result, apart = {}, {}
    if RandomShift in kinds:
        apart["shift"] = -drawn[:, 1:3].int()
    if HorizontalFlip in kinds and (RandomShift in kinds or crop is None):
        apart["flip"] = drawn[:, 0].int()
    if crop is None:
        result = _centre(view.size, *_sides(sizes, len(drawn)))
    else:
        box = boxes(crop, drawn, sizes)
        h, w = box[:, 2:].float().unbind(1)
        right = torch.zeros_like(w) if "flip" in apart else w * drawn[:, 0]
        result = {
            "corner": box[:, :2].int(),
            "extent": box[:, 2:].int(),
            "narrow": torch.stack([h, torch.full_like(h, view.size)], 1),
            "start": torch.stack([torch.zeros_like(h), right], 1),
            "end": torch.stack([h, w - right], 1),
        }
        if crop.interpolation == "bicubic":
            result |= _borders(box[:, 2], box[:, 3], right.long() > 0, view.size)
    return result | apart


def border(extent: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """What becomes of the weights of a bicubic resize that lie outside of the image.

    DALI gives them to the border pixel; PIL leaves them out and divides by the others (ImagingResample's
    precompute_coeffs). So PIL's pixel is (DALI's - before·first pixel - after·last pixel)·gain.

    Args:
        extent: pixels that are resized, N integers.
        size: pixels afterwards.

    Returns:
        before, after, gain: N×size float32; 0, 0 and 1 but near the border.
    """
    scale = extent.double() / size
    stretch = scale.clamp(min=1.0)  # of the filter, which is 2 pixels wide on each side
    rows = min(size, int((2 * stretch / scale).max().ceil()))  # whose window may begin before the first pixel
    centre = (torch.arange(rows) + 0.5) * scale[:, None]
    window = torch.arange(2 * int((2 * stretch).max().ceil()) + 2)
    pixel = (centre - 2 * stretch[:, None]).floor()[..., None] + window  # N×rows×taps
    weights = _cubic((pixel + 0.5 - centre[..., None]) / stretch[:, None, None])
    before = torch.zeros(len(extent), size, dtype=torch.float64)
    before[:, :rows] = torch.where(pixel < 0, weights, 0.0).sum(2) / weights.sum(2)
    after = before.flip(1)
    gain = 1 / (1 - before - after)
    return before.float(), after.float(), gain.float()


def _cubic(x: Tensor) -> Tensor:
    """PIL's bicubic filter, of Keys with a = -1/2."""
    x = x.abs()
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def _borders(height: Tensor, width: Tensor, flipped: Tensor, size: int) -> dict[str, Tensor]:
    """For `inputs`; a flipped crop's first column is its right one."""
    zero = torch.zeros_like(width)
    first, last = torch.where(flipped, width - 1, zero), torch.where(flipped, zero, width - 1)
    result = {
        "side": torch.stack([height, torch.ones_like(height)], 1).int(),
        "first": torch.stack([zero, first], 1).int(),
        "last": torch.stack([zero, last], 1).int(),
        "bottom": torch.stack([height - 1, zero], 1).int(),
    }
    for name, extent, shape in (("row", height, (-1, size, 1, 1)), ("column", width, (-1, 1, size, 1))):
        for part, values in zip(("before", "after", "gain"), border(extent, size), strict=True):
            result[f"{part}_{name}"] = values.view(shape)
    return result


def _centre(size: int, height: Tensor, width: Tensor) -> dict[str, Tensor]:
    """What a view without a random crop does: `augmentation.short_side`, then the centre."""
    smaller = torch.minimum(height, width)
    short = torch.where(smaller == size, size, margin_around(size))
    whole = torch.stack([height * short // smaller, width * short // smaller], 1)  # torchvision cuts, too
    return {
        "whole": whole.float(),
        "corner": ((whole - size) / 2).round().int(),  # a half goes to the even neighbour, as in Python
        "extent": torch.full_like(whole, size, dtype=torch.int32),
    }


def _sides(sizes: Tensor | Sequence[int], count: int) -> tuple[Tensor, Tensor]:
    """Height and width of each of `count` images, N int64 each."""
    height, width = torch.as_tensor(sizes).expand(count, 2).unbind(1)
    return height, width
