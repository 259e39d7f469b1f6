"""Executes an augmentation recipe on a whole batch at once, on any device, every image with parameters of its own.

The same operations as torchvision.transforms.v2 on float images (the tests replay one through the other), several
times faster on small images: everything separable (crop, resize, blur) is a pair of small matrices an image, and so
two batched matrix products. `draw` and `apply` are apart so that parameters can be replayed.
"""

import math
from functools import singledispatch

import torch
import torchvision.transforms.v2.functional as tv
from torch import Tensor

from fastssl.data import augmentation as aug
from fastssl.errors import FastsslError

Parameters = dict[str, Tensor]  # each N or N×…, on the CPU


def execute(view: aug.View, images: Tensor, generator: torch.Generator) -> Tensor:
    """Make one view of every image.

    Args:
        view: the recipe.
        images: N×3×H×W, uint8, on any device.
        generator: on the CPU; the parameters are drawn from it, so that all devices make the same views.

    Returns:
        N×3×size×size, float32, normalised, on the device of `images`.
    """
    x = images.float().div_(255)
    if not view.crops:
        x = resize(x, view.size)
    for step in view.steps:
        x = apply(step, x, draw(step, x, generator), view.size)
    mean = torch.tensor(view.mean, device=x.device).view(3, 1, 1)
    std = torch.tensor(view.std, device=x.device).view(3, 1, 1)
    return (x - mean).div_(std)


def resize(x: Tensor, size: int) -> Tensor:
    """What a view does to images when it has no random crop: torchvision's evaluation resize and centre crop."""
    short = aug.short_side(x.shape[-2:], size)
    return tv.center_crop(tv.resize(x, [short], antialias=True), [size, size])


@singledispatch
def draw(step: aug.Step, x: Tensor, generator: torch.Generator) -> Parameters:
    """Draw the parameters of `step` for every image of the batch `x`."""
    raise TypeError(f"batched execution knows no step {step!r}")


@singledispatch
def apply(step: aug.Step, x: Tensor, parameters: Parameters, size: int) -> Tensor:
    """Do `step` to the batch `x` (N×3×H×W, float in 0…1) with the given parameters."""
    raise TypeError(f"batched execution knows no step {step!r}")


# --- crop ---------------------------------------------------------------------------------------------------------


@draw.register
def _(step: aug.RandomResizedCrop, x: Tensor, generator: torch.Generator) -> Parameters:
    boxes = _boxes(len(x), x.shape[-2:], step.area, step.aspect, generator)
    # As in torchvision: where ten tries found no box, the largest central one within the aspects.
    height, width = x.shape[-2:]
    ratio = min(max(width / height, step.aspect[0]), step.aspect[1])
    h, w = min(height, round(width / ratio)), min(width, round(height * ratio))
    fallback = torch.tensor([(height - h) // 2, (width - w) // 2, h, w])
    return {"box": torch.where(boxes[:, 2:3] > 0, boxes, fallback)}


@apply.register
def _(step: aug.RandomResizedCrop, x: Tensor, parameters: Parameters, size: int) -> Tensor:
    top, left, height, width = parameters["box"].to(x.device).unbind(1)
    rows = _resampling(top, height, x.shape[-2], size, step.interpolation)
    columns = _resampling(left, width, x.shape[-1], size, step.interpolation)
    return _separable(x, rows, columns).clamp_(0, 1)


def _boxes(count: int, shape: torch.Size, area: aug.Range, aspect: aug.Range, generator: torch.Generator) -> Tensor:
    """N boxes (top, left, height, width); height 0 where ten tries found none. torchvision's sampling, vectorised."""
    height, width = shape
    areas = height * width * _uniform((count, 10), area, generator)
    ratios = _uniform((count, 10), (math.log(aspect[0]), math.log(aspect[1])), generator).exp()
    w, h = (areas * ratios).sqrt().round(), (areas / ratios).sqrt().round()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.int().argmax(1, keepdim=True)
    w, h = w.gather(1, first), h.gather(1, first)
    top = (torch.rand(count, 1, generator=generator) * (height - h + 1)).floor()
    left = (torch.rand(count, 1, generator=generator) * (width - w + 1)).floor()
    return (torch.cat([top, left, h, w], 1) * fits.any(1, keepdim=True)).long()


def _resampling(start: Tensor, length: Tensor, side: int, size: int, interpolation: str) -> Tensor:
    """N×size×side: the antialiased resize of the interval [start, start+length) to `size`, as a matrix an image."""
    scale = (length / size).view(-1, 1, 1)
    stretch = scale.clamp(min=1)  # the filter widens when shrinking and keeps its width when enlarging
    centre = (torch.arange(size, device=start.device) + 0.5).view(1, -1, 1) * scale
    position = torch.arange(side, device=start.device).view(1, 1, -1) - start.view(-1, 1, 1)
    distance = (position + 0.5 - centre).abs() / stretch
    if interpolation == "bilinear":
        weights = (1 - distance).clamp_(min=0)
    else:  # Keys' cubic with a = -0.5, PIL's and torchvision's antialiased bicubic
        near = (1.5 * distance - 2.5) * distance * distance + 1
        far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
        weights = torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))
    inside = (position >= 0) & (position < length.view(-1, 1, 1))
    weights = weights * inside
    return weights / weights.sum(2, keepdim=True)


def _separable(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """rows · image · columnsᵀ for every image and channel: N×3×H×W, N×h×H, N×w×W -> N×3×h×w."""
    count, channels, height, width = x.shape
    h, w = rows.shape[1], columns.shape[1]
    x = torch.bmm(x.reshape(count, channels * height, width), columns.mT).view(count, channels, height, w)
    x = torch.bmm(rows, x.transpose(1, 2).reshape(count, height, channels * w))
    return x.view(count, h, channels, w).transpose(1, 2)


@draw.register
def _(step: aug.RandomShift, x: Tensor, generator: torch.Generator) -> Parameters:
    span = 2 * step.pixels + 1
    return {"offset": torch.randint(span, (len(x), 2), generator=generator) - step.pixels}


@apply.register
def _(step: aug.RandomShift, x: Tensor, parameters: Parameters, size: int) -> Tensor:
    dy, dx = parameters["offset"].to(x.device).unbind(1)

    def moved(delta: Tensor, side: int) -> Tensor:  # a shift is a matrix with one diagonal
        index = torch.arange(side, device=x.device)
        return (index.view(1, -1, 1) - delta.view(-1, 1, 1) == index.view(1, 1, -1)).to(x.dtype)

    return _separable(x, moved(dy, x.shape[-2]), moved(dx, x.shape[-1]))


@draw.register
def _(step: aug.HorizontalFlip, x: Tensor, generator: torch.Generator) -> Parameters:
    return {"do": _chance(len(x), step.p, generator)}


@apply.register
def _(step: aug.HorizontalFlip, x: Tensor, parameters: Parameters, size: int) -> Tensor:
    return torch.where(_per_image(parameters["do"], x), x.flip(-1), x)


# --- colour -------------------------------------------------------------------------------------------------------


@draw.register
def _(step: aug.ColorJitter, x: Tensor, generator: torch.Generator) -> Parameters:
    count = len(x)
    parameters = {
        "do": _chance(count, step.p, generator),
        "order": torch.rand(count, 4, generator=generator).argsort(1),
        "hue": _uniform((count,), (-step.hue, step.hue), generator),
    }
    for name in ("brightness", "contrast", "saturation"):
        spread = getattr(step, name)
        parameters[name] = _uniform((count,), (max(0.0, 1 - spread), 1 + spread), generator)
    return parameters


@apply.register
def _(step: aug.ColorJitter, x: Tensor, parameters: Parameters, size: int) -> Tensor:
    x = x.clone()
    operations = [("brightness", _brightness), ("contrast", _contrast), ("saturation", _saturation), ("hue", _hue)]
    for position in range(4):
        for index, (name, operation) in enumerate(operations):
            if not getattr(step, name):
                continue
            chosen = (parameters["do"] & (parameters["order"][:, position] == index)).nonzero().squeeze(1)
            factor = parameters[name][chosen].to(x)
            chosen = chosen.to(x.device)
            x[chosen] = operation(x[chosen], factor.view(-1, 1, 1, 1))
    return x


def _blend(x: Tensor, other: Tensor | float, factor: Tensor) -> Tensor:
    return (x * factor + other * (1 - factor)).clamp_(0, 1)


def _luma(x: Tensor) -> Tensor:
    r, g, b = x.unbind(1)
    return r.mul(0.2989).add_(g, alpha=0.587).add_(b, alpha=0.114).unsqueeze(1)


def _brightness(x: Tensor, factor: Tensor) -> Tensor:
    return _blend(x, 0.0, factor)


def _contrast(x: Tensor, factor: Tensor) -> Tensor:
    return _blend(x, _luma(x).mean((1, 2, 3), keepdim=True), factor)


def _saturation(x: Tensor, factor: Tensor) -> Tensor:
    return _blend(x, _luma(x), factor)


def _hue(x: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue in HSV by `turn` of a circle; value and chroma stay."""
    r, g, b = x.split(1, dim=1)
    value = x.amax(1, keepdim=True)
    chroma = value - x.amin(1, keepdim=True)
    safe = torch.where(chroma > 0, chroma, 1.0)
    sector = torch.where(value == r, (g - b) / safe, torch.where(value == g, (b - r) / safe + 2, (r - g) / safe + 4))
    # HSV to RGB in one formula: channel(n) = V - C·max(0, min(k, 4-k, 1)), k = (n + H) mod 6, n = 5, 3, 1.
    n = torch.tensor([5.0, 3.0, 1.0], device=x.device).view(1, 3, 1, 1)
    k = (n + sector + 6 * turn).remainder(6)
    return value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1)


@draw.register
def _(step: aug.Grayscale, x: Tensor, generator: torch.Generator) -> Parameters:
    return {"do": _chance(len(x), step.p, generator)}


@apply.register
def _(step: aug.Grayscale, x: Tensor, parameters: Parameters, size: int) -> Tensor:
    return torch.where(_per_image(parameters["do"], x), _luma(x), x)


@draw.register
def _(step: aug.Solarize, x: Tensor, generator: torch.Generator) -> Parameters:
    return {"do": _chance(len(x), step.p, generator)}


@apply.register
def _(step: aug.Solarize, x: Tensor, parameters: Parameters, size: int) -> Tensor:
    return torch.where(_per_image(parameters["do"], x) & (x >= step.threshold), 1 - x, x)


# --- blur and erasing ---------------------------------------------------------------------------------------------


@draw.register
def _(step: aug.GaussianBlur, x: Tensor, generator: torch.Generator) -> Parameters:
    return {"do": _chance(len(x), step.p, generator), "sigma": _uniform((len(x),), step.sigma, generator)}


@apply.register
def _(step: aug.GaussianBlur, x: Tensor, parameters: Parameters, size: int) -> Tensor:
    chosen = parameters["do"].nonzero().squeeze(1)
    sigma = parameters["sigma"][chosen].to(x).view(-1, 1)
    blur = _kernel_blur if step.kernel_size else _pil_blur
    rows, columns = (blur(sigma, side, step.kernel_size) for side in x.shape[-2:])
    chosen = chosen.to(x.device)
    return x.index_copy(0, chosen, _separable(x[chosen], rows, columns))


def _kernel_blur(sigma: Tensor, side: int, taps: int) -> Tensor:
    """N×side×side: a Gaussian of `taps` taps with reflected borders, as torchvision's gaussian_blur."""
    half = taps // 2
    offsets = torch.arange(-half, half + 1, device=sigma.device)
    kernel = (-0.5 * (offsets / sigma) ** 2).exp()
    kernel = kernel / kernel.sum(1, keepdim=True)  # N×taps
    if half >= side:
        raise FastsslError(f"gaussian_blur: kernel_size {taps} needs images of more than {half} pixels, got {side}")
    source = (torch.arange(side, device=sigma.device).view(-1, 1) + offsets).abs()
    source = torch.where(source >= side, 2 * (side - 1) - source, source)  # side×taps
    matrix = kernel.new_zeros(len(sigma), side, side)
    return matrix.scatter_add_(
        2, source.expand(len(sigma), -1, -1), kernel.unsqueeze(1).expand(-1, side, -1).contiguous()
    )


def _pil_blur(sigma: Tensor, side: int, _: int) -> Tensor:
    """N×side×side: PIL's GaussianBlur(radius=sigma), three box blurs of fractional radius with repeated borders.

    Radius from "Fast Almost-Gaussian Filtering" (Kovesi 2010) as in Pillow's BoxBlur.c.
    """
    variance = sigma**2 / 3
    whole = ((12 * variance + 1).sqrt() / 2 - 0.5).floor()
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    radius = (whole + part).view(-1, 1, 1)
    reach = int(whole.max()) + 1 if len(sigma) else 0
    index = torch.arange(-reach, side + reach, device=sigma.device)
    distance = (index.view(1, 1, -1) - index[reach : side + reach].view(1, -1, 1)).abs()
    box = (radius + 1 - distance).clamp(0, 1) / (2 * radius + 1)  # N×side×(side + 2·reach)
    box[:, :, reach] += box[:, :, :reach].sum(2)
    box[:, :, side + reach - 1] += box[:, :, side + reach :].sum(2)
    box = box[:, :, reach : side + reach]
    return box @ box @ box


@draw.register
def _(step: aug.RandomErasing, x: Tensor, generator: torch.Generator) -> Parameters:
    do = _chance(len(x), step.p, generator)
    aspect = 1 / step.aspect[1], 1 / step.aspect[0]  # torchvision's erasing means height / width
    return {"box": _boxes(len(x), x.shape[-2:], step.area, aspect, generator) * do.view(-1, 1)}


@apply.register
def _(step: aug.RandomErasing, x: Tensor, parameters: Parameters, size: int) -> Tensor:
    top, left, height, width = parameters["box"].to(x.device).view(-1, 4, 1, 1).unbind(1)
    y = torch.arange(x.shape[-2], device=x.device).view(1, -1, 1)
    z = torch.arange(x.shape[-1], device=x.device).view(1, 1, -1)
    inside = (y >= top) & (y < top + height) & (z >= left) & (z < left + width)
    return x.masked_fill(inside.unsqueeze(1), 0.0)


# --- drawing ------------------------------------------------------------------------------------------------------


def _uniform(shape: tuple[int, ...], bounds: aug.Range, generator: torch.Generator) -> Tensor:
    return bounds[0] + (bounds[1] - bounds[0]) * torch.rand(shape, generator=generator)


def _chance(count: int, p: float, generator: torch.Generator) -> Tensor:
    return torch.rand(count, generator=generator) < p


def _per_image(mask: Tensor, x: Tensor) -> Tensor:
    return mask.to(x.device).view(-1, 1, 1, 1)
