"""Photometric steps in DALI's own operators, for color="dali": fast, and not quite torchvision's.

What differs, and by how much, is in docs/augmentation.md: contrast is about middle grey, hue is a rotation in YIQ, and
the parts of the jitter come in one order for all images.
"""

import itertools
from typing import Any

from nvidia.dali import fn, types

from fastssl.data.augmentation import View
from fastssl.ops.photometric import COLUMNS, ColorJitter, GaussianBlur, Grayscale, RandomErasing, Solarize


def apply(view: View, images: Any, parameters: Any) -> Any:
    """Do the view's photometric steps to H×W×3 uint8 images, and normalise."""
    values = {name: parameters[index] for index, name in enumerate(COLUMNS)} if view.photometric else {}
    for together, steps in itertools.groupby(view.photometric, lambda step: isinstance(step, (ColorJitter, Grayscale))):
        if together:
            images = _twist(images, values, {type(step) for step in steps})
            continue
        for step in steps:
            images = _one(step, images, values)
    return fn.crop_mirror_normalize(
        images,
        dtype=types.FLOAT,
        output_layout="HWC",
        mean=[255 * m for m in view.mean],
        std=[255 * s for s in view.std],
    )


def _twist(images: Any, values: dict[str, Any], kinds: set[type]) -> Any:
    """Jitter and grayscale; where both come, in either order, as one: grey has no saturation and no hue to change."""
    grey = {"saturation": 1 - values["grayscale"]} if Grayscale in kinds else {}
    if ColorJitter not in kinds:
        return fn.color_twist(images, **grey)
    return fn.color_twist(
        images, brightness=values["brightness"], contrast=values["contrast"], hue=values["hue"] * 360,
        saturation=values["saturation"] * grey.get("saturation", 1.0),
    )  # fmt: skip


def _one(step: Any, images: Any, values: dict[str, Any]) -> Any:
    if isinstance(step, GaussianBlur):
        return _blur(step, images, values["sigma"])
    if isinstance(step, Solarize):
        return _solarize(images, values["threshold"])
    assert isinstance(step, RandomErasing)
    return _erase(images, values)


def _blur(step: GaussianBlur, images: Any, sigma: Any) -> Any:
    if sigma > 0:
        # Without a size DALI's window covers the Gaussian: what PIL's three boxes approximate.
        images = fn.gaussian_blur(images, sigma=sigma, window_size=step.kernel_size or None)
    return images


def _solarize(images: Any, threshold: Any) -> Any:
    if threshold <= 1:
        above = fn.cast(images >= threshold * 255, dtype=types.UINT8)
        images = images * (1 - above) + (255 - images) * above
        images = fn.cast(images, dtype=types.UINT8)
    return images


def _erase(images: Any, values: dict[str, Any]) -> Any:
    if values["height"] > 0:
        images = fn.erase(
            images, anchor=fn.stack(values["top"], values["left"]), shape=fn.stack(values["height"], values["width"]),
            axes=[0, 1], fill_value=0,
        )  # fmt: skip
    return images
