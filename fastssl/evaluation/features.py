"""Features of a set of images: a backbone's, or the raw pixels'."""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PIXEL_SIDE = 32  # larger images are shrunk to this for the raw-pixel baseline


@torch.no_grad()
def extract(backbone: nn.Module, batches: Iterable[Tensor], autocast: torch.autocast | None = None) -> Tensor:
    """Normalised features N×F, float32, on the CPU, in evaluation mode; the backbone's mode is restored.

    Args:
        backbone: images to features.
        batches: each B×3×H×W, on the backbone's device.
        autocast: a context to compute under.
    """
    was_training = backbone.training
    backbone.eval()
    try:
        return _collect(batches, backbone, autocast)
    finally:
        backbone.train(was_training)


@torch.no_grad()
def raw_pixels(batches: Iterable[Tensor]) -> Tensor:
    """Normalised pixels N×(3·side·side): the baseline that knows nothing."""

    def pixels(images: Tensor) -> Tensor:
        if images.shape[-1] > PIXEL_SIDE:
            images = F.interpolate(images, (PIXEL_SIDE, PIXEL_SIDE), mode="bilinear", antialias=True)
        return images.flatten(1)

    return _collect(batches, pixels, None)


def _collect(
    batches: Iterable[Tensor], function: Callable[[Tensor], Tensor], autocast: torch.autocast | None
) -> Tensor:
    rows = []
    for images in batches:
        if autocast is None:
            features = function(images)
        else:
            with autocast:
                features = function(images)
        rows.append(F.normalize(features.float(), dim=1).cpu())
    return torch.cat(rows)
