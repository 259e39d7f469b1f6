"""Executes an augmentation recipe on one image with torchvision.transforms.v2: any image size, any source."""

import math
from functools import singledispatch

import torch
from PIL import Image, ImageFilter
from torch import nn
from torchvision.transforms import v2

from fastssl.data import augmentation as aug
from fastssl.ops import photometric


class PILGaussianBlur(nn.Module):
    """MoCo v2's blur: PIL's GaussianBlur with a radius drawn from `sigma`."""

    def __init__(self, sigma: photometric.Range) -> None:
        super().__init__()
        self.sigma = sigma

    def forward(self, image: Image.Image) -> Image.Image:
        """Blur one PIL image."""
        low, high = self.sigma
        return image.filter(ImageFilter.GaussianBlur(radius=float(torch.empty(()).uniform_(low, high))))


class EvaluationResize(nn.Module):
    """Resize the short side for a centre crop to `size`; see `augmentation.short_side`."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, image: Image.Image) -> Image.Image:
        """Resize one PIL image."""
        return v2.functional.resize(image, [aug.short_side(image.size, self.size)], antialias=True)


def transform(view: aug.View) -> v2.Compose:
    """The view as a torchvision transform: PIL image in (RGB), normalised float32 3×size×size out."""
    steps: list[nn.Module] = [module(step, view.size) for step in view.steps]
    if not view.crops:
        steps = [EvaluationResize(view.size), v2.CenterCrop(view.size), *steps]
    tensor = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(view.mean), list(view.std))]
    return v2.Compose([*steps, *tensor])


@singledispatch
def module(step: photometric.Step, size: int) -> nn.Module:
    """The torchvision module that does `step` to a PIL image."""
    raise TypeError(f"per-image execution knows no step {step!r}")


@module.register
def _(step: aug.RandomResizedCrop, size: int) -> nn.Module:
    return v2.RandomResizedCrop(
        size, step.area, step.aspect, interpolation=v2.InterpolationMode(step.interpolation), antialias=True
    )


@module.register
def _(step: aug.RandomShift, size: int) -> nn.Module:
    return v2.RandomCrop(size, padding=step.pixels)


@module.register
def _(step: aug.HorizontalFlip, size: int) -> nn.Module:
    return v2.RandomHorizontalFlip(step.p)


@module.register
def _(step: photometric.ColorJitter, size: int) -> nn.Module:
    jitter = v2.ColorJitter(step.brightness, step.contrast, step.saturation, step.hue)
    return v2.RandomApply([jitter], step.p)


@module.register
def _(step: photometric.Grayscale, size: int) -> nn.Module:
    return v2.RandomGrayscale(step.p)


@module.register
def _(step: photometric.GaussianBlur, size: int) -> nn.Module:
    blur: nn.Module = PILGaussianBlur(step.sigma)
    if step.kernel_size:
        blur = v2.GaussianBlur(step.kernel_size, step.sigma)
    return v2.RandomApply([blur], step.p)


@module.register
def _(step: photometric.Solarize, size: int) -> nn.Module:
    return v2.RandomSolarize(math.ceil(255 * step.threshold), step.p)  # 0.5 is PIL's 128


class _OnTensor(nn.Module):
    """Runs a tensor-only transform on a PIL image."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, image: Image.Image) -> Image.Image:
        return v2.functional.to_pil_image(self.inner(v2.functional.pil_to_tensor(image)))


@module.register
def _(step: photometric.RandomErasing, size: int) -> nn.Module:
    return _OnTensor(v2.RandomErasing(step.p, step.area, step.aspect))
