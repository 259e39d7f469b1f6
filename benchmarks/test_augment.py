"""Augmenting the colours of a batch beside torchvision's functions image by image, and beside a copy.

All replay the same parameters of MoCo v2. torchvision's chain is that of the papers' code, whose blur is PIL's; on
float32 tensors it blurs what it has rounded to 8 bits.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import ImageFilter
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from benchmarks.sides import Case, Side, grid
from fastssl.ops import ColorJitter, GaussianBlur, Grayscale, augment_
from fastssl.ops.augment import IMAGENET_MEAN, IMAGENET_STD
from fastssl.ops.photometric import COLUMNS, JITTER_ORDERS, NEUTRAL, draw_augmentation

pytestmark = pytest.mark.together("ops")

STEPS = (ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8), Grayscale(0.2), GaussianBlur((0.1, 2.0), p=0.5))
CHECKED, LARGEST = 32, 0.05
ADJUST = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)


def pictures(case: Case) -> Tensor:
    """Smooth with a little noise, because the hue of noise alone is not that of photographs; N×H×W×3."""
    torch.manual_seed(0)
    n, side = case["N"], case["side"]
    coarse = torch.rand(n, 3, side // 8, side // 8)
    smooth = torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear")
    noisy = (smooth + 0.05 * torch.randn_like(smooth)).clamp(0, 1)
    return (noisy * 255).byte().permute(0, 2, 3, 1).contiguous().to(case.device)


def parameters(case: Case) -> Tensor:
    torch.manual_seed(1)
    return draw_augmentation(STEPS, case["N"], (case["side"], case["side"]))


def place(case: Case) -> Tensor:
    shape = case["N"], 3, case["side"], case["side"]
    return torch.zeros(shape, dtype=case.dtype, device=case.device).to(memory_format=torch.channels_last)


def chain(kind: torch.dtype) -> Callable[[Case], Callable[[], Tensor]]:
    def make(case: Case) -> Callable[[], Tensor]:
        images, rows, out = pictures(case), parameters(case), place(case)

        def step() -> Tensor:
            one_by_one(images, rows, out, kind)
            return out

        return step

    return make


def one_by_one(images: Tensor, rows: Tensor, out: Tensor, dtype: torch.dtype) -> None:
    for image, row, target in zip(images, rows.tolist(), out, strict=True):
        values = dict(zip(COLUMNS, row, strict=True))
        x = tv.to_dtype(image.permute(2, 0, 1), dtype, scale=True)
        for part in JITTER_ORDERS[int(values["order"])]:
            if row[part] != NEUTRAL[part]:
                x = ADJUST[part](x, row[part])
        if values["grayscale"]:
            x = tv.rgb_to_grayscale(x, 3)
        if values["sigma"]:
            x = blur(x, values["sigma"])
        x = tv.to_dtype(x, torch.float32, scale=True)
        target.copy_(tv.normalize(x, list(IMAGENET_MEAN), list(IMAGENET_STD)))


def blur(x: Tensor, sigma: float) -> Tensor:
    """PIL's, as in the papers' code; on CUDA, where PIL is not, torchvision's of 23 taps."""
    if x.is_cuda:
        return tv.gaussian_blur(x, [23, 23], [sigma, sigma])
    blurred = tv.to_pil_image(x).filter(ImageFilter.GaussianBlur(sigma))
    return tv.to_dtype(tv.pil_to_tensor(blurred), x.dtype, scale=True)


def copy(case: Case) -> Callable[[], Any]:
    images, out = pictures(case), place(case)
    return lambda: out.copy_(images.permute(0, 3, 1, 2))


def ours(case: Case) -> Callable[[], Tensor]:
    images, rows, out = pictures(case), parameters(case).to(case.device), place(case)
    return lambda: augment_(images, STEPS, rows, dtype=case.dtype, out=out)


def check(case: Case, views: Tensor) -> None:
    """Against torchvision's chain on 32 images: the mean difference of each. 1/255 is .017 of normalised values."""
    few = Case(case.op, (("N", CHECKED), ("side", case["side"]), ("dtype", "float32")))
    rows, right = parameters(case)[:CHECKED], place(few)
    one_by_one(pictures(case)[:CHECKED].cpu(), rows, right, torch.uint8)
    difference = (views[:CHECKED].float().cpu() - right).abs().mean(dim=(1, 2, 3))
    assert difference.max() < LARGEST, f"image {int(difference.argmax())} differs by {float(difference.max()):.3f}"


def make_case(device: str, n: int, side: int, dtype: str = "float32") -> Case:
    values, width = n * 3 * side * side, 4 if dtype == "float32" else 2
    axes = (("N", n), ("side", side), ("dtype", dtype))
    return Case("augment_", axes, device, bytes=values * (1 + width), items=n, unit="images", quick=side == 32)


CPU = [make_case("cpu", 64, 224), make_case("cpu", 64, 224, "bfloat16"), make_case("cpu", 256, 32)]
CUDA = [make_case("cuda", 256, side, dtype) for side in (224, 96, 32) for dtype in ("float32", "bfloat16")]
SIDES = (
    Side("torchvision, uint8", chain(torch.uint8), when=lambda c: (c.device, c["dtype"]) == ("cpu", "float32")),
    Side("torchvision, float32", chain(torch.float32), when=lambda c: (c.device, c["dtype"]) == ("cpu", "float32")),
    Side("torchvision, float32", chain(torch.float32), differs="a Gaussian of 23 taps, not PIL's", agrees=False,
         when=lambda c: c.device == "cuda"),
    Side("copy", copy, role="bound", agrees=False),
    Side("fastssl", ours, role="ours"),
)  # fmt: skip


@pytest.mark.parametrize(("case", "side"), grid([*CPU, *CUDA], SIDES, check, graphs=("fastssl",)))
def test_augment(turns: Callable[..., None], case: Case, side: Side) -> None:
    turns(case, side)
