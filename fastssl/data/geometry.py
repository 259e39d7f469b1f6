"""The random numbers behind crop, shift and flip, drawn here for whole batches and turned into boxes by DALI."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastssl.data.augmentation import HorizontalFlip, RandomResizedCrop, RandomShift, View
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


def boxes(step: RandomResizedCrop, drawn: Tensor, size: Sequence[int]) -> Tensor:
    """The crops of images of one size, N×4 int64: top, left, height, width. torchvision's, to replay them there.

    Where none of the tries fits it is the largest central box within the aspects.
    """
    height, width = size
    found = first_fitting(drawn[:, 3:].reshape(-1, 4, TRIES).mT, (height, width), step.area, step.aspect)
    ratio = min(max(width / height, step.aspect[0]), step.aspect[1])
    h, w = min(height, round(width / ratio)), min(width, round(height * ratio))
    return torch.where(found[:, 2:3] > 0, found, torch.tensor([(height - h) // 2, (width - w) // 2, h, w]))
