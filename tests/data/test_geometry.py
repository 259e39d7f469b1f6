"""Crop, shift and flip are drawn as torchvision draws them, and DALI does to the pixels what torchvision does."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from fastssl.data import geometry
from fastssl.data.augmentation import HorizontalFlip, RandomResizedCrop, RandomShift, View
from tests.ops.test_augment import CRITICAL, N, kolmogorov_smirnov


@pytest.mark.parametrize(
    ("size", "area"), [((32, 32), (0.08, 1.0)), ((224, 256), (0.2, 1.0)), ((500, 120), (0.05, 0.14))]
)
def test_boxes_are_drawn_as_torchvisions(
    size: tuple[int, int], area: tuple[float, float], generator: torch.Generator
) -> None:
    step = RandomResizedCrop(area)
    ours = geometry.boxes(step, geometry.draw(View(32, (step,)), N, generator), size).float()
    transform, image = v2.RandomResizedCrop(32, area), torch.empty(3, *size, device="meta")
    torch.manual_seed(0)
    drawn = [transform.make_params([image]) for _ in range(N)]
    for column, key in zip(ours.unbind(1), ("top", "left", "height", "width"), strict=True):
        assert kolmogorov_smirnov(column, torch.tensor([float(d[key]) for d in drawn])) < CRITICAL, key


@pytest.mark.parametrize("size", [(8, 40), (40, 8), (9, 9), (1, 1), (1, 50)])
def test_an_impossible_crop_falls_back_as_torchvisions(size: tuple[int, int], generator: torch.Generator) -> None:
    for step in (RandomResizedCrop((1.0, 1.0), (1.0, 1.0)), RandomResizedCrop((1.0, 1.0), (1.3, 1.4))):
        [ours] = geometry.boxes(step, geometry.draw(View(8, (step,)), 1, generator), size).tolist()
        theirs = v2.RandomResizedCrop(8, step.area, step.aspect).make_params([torch.empty(3, *size)])
        assert ours == [theirs[key] for key in ("top", "left", "height", "width")]


def test_images_of_many_sizes_are_cropped_at_once(generator: torch.Generator) -> None:
    """Each as if it were alone; where nothing fits, rounded as Python rounds."""
    sizes = torch.randint(20, 400, (N // 20, 2), generator=generator)
    for step in (RandomResizedCrop((0.2, 1.0)), RandomResizedCrop((1.0, 1.0), (0.952, 1.05))):
        drawn = geometry.draw(View(8, (step,)), len(sizes), generator)
        together = geometry.boxes(step, drawn, sizes)
        transform = v2.RandomResizedCrop(8, step.area, step.aspect)
        for box, row, size in zip(together.tolist(), drawn, sizes.tolist(), strict=True):
            [alone] = geometry.boxes(step, row[None], size).tolist()
            assert box == alone
            if step.area[0] == 1 and not 0.9 < size[1] / size[0] < 1.1:  # what fits there fits by rounding
                theirs = transform.make_params([torch.empty(3, *size, device="meta")])
                assert box[2:] == [theirs["height"], theirs["width"]]
        assert (together[:, :2] >= 0).all()
        assert (together[:, :2] + together[:, 2:] <= sizes).all()


@pytest.mark.parametrize("extent", [1, 3, 9, 20, 32, 61, 100, 555])
def test_border_is_the_difference_between_pil_and_repeated_pixels(extent: int) -> None:
    """By resizing a row by hand, once with pixels repeated beyond its ends."""
    size, reach = 24, 3 * max(extent, 24)
    row = torch.rand(extent, dtype=torch.float64, generator=torch.Generator().manual_seed(extent))
    scale, stretch = extent / size, max(1.0, extent / size)
    at = torch.arange(-reach, extent + reach)
    repeated, pil = torch.empty(size, dtype=torch.float64), torch.empty(size, dtype=torch.float64)
    for out in range(size):
        weights = geometry._cubic((at + 0.5 - (out + 0.5) * scale) / stretch)
        inside = (at >= 0) & (at < extent)
        repeated[out] = (weights * row[at.clamp(0, extent - 1)]).sum() / weights.sum()
        pil[out] = (weights[inside] * row).sum() / weights[inside].sum()
    [before], [after], [gain] = geometry.border(torch.tensor([extent]), size)
    assert ((repeated - before * row[0] - after * row[-1]) * gain - pil).abs().max() < 1e-5
    together = geometry.border(torch.tensor([extent, 7, 3000]), size)
    assert all((one[0] - alone).abs().max() < 1e-6 for one, alone in zip(together, (before, after, gain), strict=True))


def test_the_centre_of_images_of_many_sizes_is_torchvisions() -> None:
    sizes = [(32, 50), (33, 50), (64, 32), (100, 41), (7, 300), (45, 45)]
    given = geometry.inputs(View(32, ()), torch.zeros(len(sizes), geometry.COLUMNS), torch.tensor(sizes))
    for row, size in enumerate(sizes):
        short = 32 if min(size) == 32 else 37
        image = tv.resize(torch.zeros(3, *size, dtype=torch.uint8), [short], antialias=True)
        whole = given["whole"][row].int().tolist()
        assert whole == list(image.shape[1:])
        top, left = given["corner"][row].tolist()
        assert (top, left) == tuple(round((side - 32) / 2) for side in whole)
        assert given["extent"][row].tolist() == [32, 32]


def test_flip_and_shift(generator: torch.Generator) -> None:
    drawn = geometry.draw(View(8, (HorizontalFlip(0.3), RandomShift(4))), N, generator)
    assert abs(drawn[:, 0].mean() - 0.3) < 0.012
    for column in (1, 2):
        counts = torch.bincount((drawn[:, column] + 4).long(), minlength=9) / N
        assert (counts - 1 / 9).abs().max() < 0.01
    assert not drawn[:, 3:].any()
    assert not geometry.draw(View(8, ()), 5, generator).any()


def replayed(view: View, image: Tensor, drawn: Tensor) -> Tensor:
    """The view's geometry by torchvision: 3×H×W uint8 in, 3×size×size out."""
    size = [view.size, view.size]
    crop = next((step for step in view.geometry if isinstance(step, RandomResizedCrop)), None)
    if crop:
        [box] = geometry.boxes(crop, drawn[None], image.shape[1:]).tolist()
        image = tv.resized_crop(image, *box, size, v2.InterpolationMode(crop.interpolation), antialias=True)
    else:
        short = view.size if min(image.shape[1:]) == view.size else round(view.size * 8 / 7)
        image = tv.center_crop(tv.resize(image, [short], antialias=True), size)
    if drawn[1:3].any():
        down, right = (int(x) for x in drawn[1:3])
        image = tv.affine(image, 0.0, [right, down], 1.0, [0.0, 0.0])
    return image.flip(2) if drawn[0] else image


def expected(view: View, images: Sequence[Tensor], drawn: Tensor) -> Tensor:
    """N×3×size×size uint8."""
    return torch.stack([replayed(view, image, row) for image, row in zip(images, drawn, strict=True)])
