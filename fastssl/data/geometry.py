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
        without one "whole", the size to which the image is resized before; "shift" and "flip" where they come apart.
        Each N×2 but "flip", which is N.
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
    return result | apart


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
