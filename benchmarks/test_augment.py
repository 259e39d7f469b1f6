"""Augmenting the colours of 256 images on the CPU beside torchvision's functions image by image, and beside a copy.

All replay the same parameters of MoCo v2. torchvision's chain is that of the papers' code, whose blur is PIL's; on
float32 tensors it blurs what it has rounded to 8 bits.
"""

from collections.abc import Callable

import pytest
import torch
from PIL import ImageFilter
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from fastssl.ops import ColorJitter, GaussianBlur, Grayscale, augment_
from fastssl.ops.augment import IMAGENET_MEAN, IMAGENET_STD
from fastssl.ops.photometric import COLUMNS, JITTER_ORDERS, NEUTRAL, draw_augmentation

N = 256
STEPS = (ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8), Grayscale(0.2), GaussianBlur((0.1, 2.0), p=0.5))
ADJUST = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
WRITTEN = {"copy": 4, "normalise": 4, "float32": 4, "bfloat16": 2, "float16": 2}  # bytes a value


def pictures(side: int) -> Tensor:
    """Smooth, because the hue of noise is not that of photographs; N×H×W×3."""
    coarse = torch.rand(N, 3, side // 8, side // 8)
    smooth = torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear")
    return (smooth * 255).byte().permute(0, 2, 3, 1).contiguous()


def one_by_one(images: Tensor, parameters: Tensor, out: Tensor, dtype: torch.dtype) -> None:
    for image, row, place in zip(images, parameters.tolist(), out, strict=True):
        values = dict(zip(COLUMNS, row, strict=True))
        x = tv.to_dtype(image.permute(2, 0, 1), dtype, scale=True)
        for part in JITTER_ORDERS[int(values["order"])]:
            if row[part] != NEUTRAL[part]:
                x = ADJUST[part](x, row[part])
        if values["grayscale"]:
            x = tv.rgb_to_grayscale(x, 3)
        if values["sigma"]:
            blurred = tv.to_pil_image(x).filter(ImageFilter.GaussianBlur(values["sigma"]))
            x = tv.to_dtype(tv.pil_to_tensor(blurred), dtype, scale=True)
        x = tv.to_dtype(x, torch.float32, scale=True)
        place.copy_(tv.normalize(x, list(IMAGENET_MEAN), list(IMAGENET_STD)))


@pytest.mark.parametrize("side", [224, 32])
@pytest.mark.parametrize(
    "which", ["copy", "normalise", "float32", "bfloat16", "float16", "torchvision-uint8", "torchvision-float32"]
)
def test_augment(benchmark: BenchmarkFixture, which: str, side: int) -> None:
    torch.manual_seed(0)
    images, parameters = pictures(side), draw_augmentation(STEPS, N, (side, side))
    dtype = getattr(torch, which) if which.endswith("16") else torch.float32
    out = torch.zeros(N, 3, side, side, dtype=dtype).to(memory_format=torch.channels_last)
    call: Callable[[], object]
    if which == "copy":
        call = lambda: out.copy_(images.permute(0, 3, 1, 2))  # noqa: E731
    elif which.startswith("torchvision"):
        kind = torch.uint8 if which.endswith("uint8") else torch.float32
        call = lambda: one_by_one(images, parameters, out, kind)  # noqa: E731
    else:
        steps = () if which == "normalise" else STEPS
        call = lambda: augment_(images, steps, parameters, dtype=dtype, out=out)  # noqa: E731
    benchmark.group = f"augment_, {N} images of {side}, MoCo v2"
    benchmark.pedantic(call, rounds=3 if which.startswith("torchvision") else 20, warmup_rounds=1)
    median = benchmark.stats["median"]
    moved = images.numel() * (1 + WRITTEN.get(which, 4))  # at least: every byte once read, every value once written
    benchmark.extra_info |= {
        "threads": torch.get_num_threads(),
        "images_per_second": round(N / median),
        "bytes": moved,
        "gigabytes_per_second": round(moved / median / 1e9, 2),
    }


def test_the_peer_computes_the_same() -> None:
    torch.manual_seed(0)
    images, parameters = pictures(32)[:64], draw_augmentation(STEPS, 64, (32, 32))
    out = torch.empty(64, 3, 32, 32)
    one_by_one(images, parameters, out, torch.uint8)
    assert (augment_(images, STEPS, parameters) - out).abs().mean() < 0.01
