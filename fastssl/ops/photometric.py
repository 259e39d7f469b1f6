"""Photometric augmentations as data: what is done to the colours of an image, and the drawing of its parameters."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from fastssl.errors import FastsslError

Range = tuple[float, float]
TRIES = 10  # boxes that torchvision tries before it gives up

# The columns of a table of parameters, one row an image. Where a step is not to be done its columns hold what does
# nothing: factors 1, a turn of 0, grayscale 0, sigma 0, a threshold above 1, a rectangle of height 0.
COLUMNS = (
    "brightness", "contrast", "saturation",  # factors
    "hue",  # turns, -.5….5
    "order",  # of the four above: which of JITTER_ORDERS
    "grayscale",  # 0 or 1
    "sigma",  # of the blur, in pixels
    "threshold",  # of solarize, of 1
    "top", "left", "height", "width",  # of the rectangle to erase, in pixels
)  # fmt: skip
JITTER_ORDERS = tuple(itertools.permutations(range(4)))  # 0 brightness, 1 contrast, 2 saturation, 3 hue
NEUTRAL = (1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 2.0, 0.0, 0.0, 0.0, 0.0)


def is_number(value: object, whole: bool = False) -> bool:
    """A finite number; True and False, which Python counts as numbers, are none."""
    kinds = int if whole else (int, float)
    return isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class Step:
    """One random operation; sub-classes list its parameters in the field's usual units."""

    name: ClassVar[str]

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):
                object.__setattr__(self, field.name, tuple(value))
            if field.type in (float, int) and not is_number(value, whole=field.type is int):
                kind = "a whole number" if field.type is int else "a number"
                raise FastsslError(f"{self.name}: {field.name} must be {kind}, got {value!r}")
            if field.type == Range:
                self._check_range(field.name)
        p = getattr(self, "p", 1.0)
        if not 0 <= p <= 1:
            raise FastsslError(f"{self.name}: p must lie in 0…1, got {p!r}")

    def _check_range(self, name: str) -> None:
        bounds = getattr(self, name)
        numbers = isinstance(bounds, tuple) and len(bounds) == 2 and all(map(is_number, bounds))
        if not numbers or not 0 < bounds[0] <= bounds[1]:
            raise FastsslError(f"{self.name}: {name} must be [low, high] with 0 < low <= high, got {bounds!r}")


@dataclass(frozen=True)
class ColorJitter(Step):
    """torchvision's ColorJitter: factors from 1±x (hue: ±x of a turn), the four in random order."""

    name: ClassVar[str] = "color_jitter"
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    p: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("brightness", "contrast", "saturation"):
            if getattr(self, field) < 0:
                raise FastsslError(f"{self.name}: {field} must be 0 or more, got {getattr(self, field)!r}")
        if not 0 <= self.hue <= 0.5:
            raise FastsslError(f"{self.name}: hue must lie in 0…0.5, got {self.hue!r}")


@dataclass(frozen=True)
class Grayscale(Step):
    """Replace the colours by their luma, keeping three channels."""

    name: ClassVar[str] = "grayscale"
    p: float = 0.2


@dataclass(frozen=True)
class GaussianBlur(Step):
    """Blur with sigma drawn uniformly, in pixels.

    kernel_size 0 is PIL's GaussianBlur(radius=sigma), three box blurs, as in MoCo v2's code; an odd number is a true
    Gaussian cut to so many taps, as in BYOL's (23 at 224 pixels).
    """

    name: ClassVar[str] = "gaussian_blur"
    sigma: Range = (0.1, 2.0)
    kernel_size: int = 0
    p: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kernel_size != 0 and (self.kernel_size < 3 or self.kernel_size % 2 == 0):
            raise FastsslError(f"{self.name}: kernel_size must be 0 (PIL) or odd and >= 3, got {self.kernel_size!r}")


@dataclass(frozen=True)
class Solarize(Step):
    """Invert every value at or above the threshold (of 1)."""

    name: ClassVar[str] = "solarize"
    threshold: float = 0.5
    p: float = 0.2


@dataclass(frozen=True)
class RandomErasing(Step):
    """Blacken a random rectangle; aspect is height / width here, as in torchvision."""

    name: ClassVar[str] = "random_erasing"
    area: Range = (0.02, 0.2)
    aspect: Range = (0.3, 3.3)
    p: float = 0.5


# The position of a step here is its number in the kernels.
PHOTOMETRIC: tuple[type[Step], ...] = (ColorJitter, Grayscale, GaussianBlur, Solarize, RandomErasing)


def draw_augmentation(
    steps: Sequence[Step], count: int, size: tuple[int, int], generator: torch.Generator | None = None
) -> Tensor:
    """Draw the parameters of `steps` for `count` images, each for itself.

    Args:
        steps: photometric steps, each kind at most once.
        count: N, images.
        size: height and width of the images, in pixels.
        generator: on the CPU; the default generator without one.

    Returns:
        N×12 float32 on the CPU, with the columns `COLUMNS`: what `augment_` takes.

    Raises:
        ValueError: a step that is not photometric, or two of one kind.
    """
    check_steps(steps)
    table = torch.tensor(NEUTRAL).repeat(count, 1)
    for step in steps:
        do = torch.rand(count, generator=generator) < getattr(step, "p", 1.0)
        for name, values in _draw(step, count, size, generator).items():
            column = table[:, COLUMNS.index(name)]
            column.copy_(torch.where(do, values, column))
    return table


def check_steps(steps: Sequence[Step]) -> None:
    """Refuse what `augment_` does not know.

    Raises:
        ValueError: a step that is not photometric, or two of one kind.
    """
    for index, step in enumerate(steps):
        if type(step) not in PHOTOMETRIC:
            known = ", ".join(kind.__name__ for kind in PHOTOMETRIC)
            raise FastsslError(f"augment_ knows {known}; got {step!r}")
        if type(step) in [type(other) for other in steps[:index]]:
            raise FastsslError(f"augment_ does each kind of step once; {step.name} comes twice")


def _draw(
    step: Step, count: int, size: tuple[int, int], generator: torch.Generator | None
) -> dict[str, Tensor | float]:
    if isinstance(step, ColorJitter):
        factors = {
            name: uniform((count,), (max(0.0, 1 - getattr(step, name)), 1 + getattr(step, name)), generator)
            for name in ("brightness", "contrast", "saturation")
        }
        hue = uniform((count,), (-step.hue, step.hue), generator)
        order = torch.randint(len(JITTER_ORDERS), (count,), generator=generator).float()
        return {**factors, "hue": hue, "order": order}
    if isinstance(step, GaussianBlur):
        return {"sigma": uniform((count,), step.sigma, generator)}
    if isinstance(step, Solarize):
        return {"threshold": torch.full((count,), step.threshold)}
    if isinstance(step, RandomErasing):
        aspect = 1 / step.aspect[1], 1 / step.aspect[0]  # of the crop: width / height
        boxes = first_fitting(
            torch.rand(count, TRIES, 4, generator=generator), size, step.area, aspect, margin=1
        ).float()
        return dict(zip(("top", "left", "height", "width"), boxes.unbind(1), strict=True))
    return {"grayscale": torch.ones(count)}


def first_fitting(
    tries: Tensor, size: tuple[int | Tensor, int | Tensor], area: Range, aspect: Range, margin: int = 0
) -> Tensor:
    """The first of some random boxes that lies within the image: torchvision's sampling of crops and erasings.

    Args:
        tries: N×`TRIES`×4 uniform numbers in 0…1: area, aspect, top, left.
        size: height and width of the images, or N of each.
        area: bounds of the box's share of the image.
        aspect: bounds of width / height.
        margin: pixels by which a box must be smaller than the image: 1 for erasing.

    Returns:
        N×4 int64: top, left, height, width; all 0 where none fits.
    """
    height, width = (torch.as_tensor(side, dtype=tries.dtype).view(-1, 1) for side in size)
    areas = height * width * (area[0] + (area[1] - area[0]) * tries[..., 0])
    low, high = math.log(aspect[0]), math.log(aspect[1])
    ratios = (low + (high - low) * tries[..., 1]).exp()
    w, h = (areas * ratios).sqrt().round(), (areas / ratios).sqrt().round()
    fits = (w > 0) & (w <= width - margin) & (h > 0) & (h <= height - margin)
    top, left = (tries[..., 2] * (height - h + 1)).floor(), (tries[..., 3] * (width - w + 1)).floor()
    first = fits.int().argmax(1, keepdim=True)
    box = torch.cat([x.gather(1, first) for x in (top, left, h, w)], 1)
    return (box * fits.any(1, keepdim=True)).long()


def uniform(shape: tuple[int, ...], bounds: Range, generator: torch.Generator | None) -> Tensor:
    """Numbers drawn uniformly from `bounds`."""
    return bounds[0] + (bounds[1] - bounds[0]) * torch.rand(shape, generator=generator)
