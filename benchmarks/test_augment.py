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

from benchmarks.sides import Case, Side, grid, unavailable
from fastssl.ops import ColorJitter, GaussianBlur, Grayscale, augment_
from fastssl.ops.augment import IMAGENET_MEAN, IMAGENET_STD
from fastssl.ops.photometric import COLUMNS, JITTER_ORDERS, NEUTRAL, draw_augmentation

STEPS = (ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8), Grayscale(0.2), GaussianBlur((0.1, 2.0), p=0.5))
ADJUST = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)


def pictures(case: Case) -> Tensor:
    """Smooth, because the hue of noise is not that of photographs; N×H×W×3."""
    torch.manual_seed(0)
    n, side = case["N"], case["side"]
    coarse = torch.rand(n, 3, side // 8, side // 8)
    smooth = torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear")
    return (smooth * 255).byte().permute(0, 2, 3, 1).contiguous().to(case.device)


def parameters(case: Case) -> Tensor:
    torch.manual_seed(1)
    return draw_augmentation(STEPS, case["N"], (case["side"], case["side"]))


def place(case: Case) -> Tensor:
    shape = case["N"], 3, case["side"], case["side"]
    return torch.zeros(shape, dtype=case.dtype, device=case.device).to(memory_format=torch.channels_last)


def chain(kind: torch.dtype) -> Callable[[Case], Callable[[], Tensor]]:
    def make(case: Case) -> Callable[[], Tensor]:
        if case.device != "cpu":
            unavailable("the papers' blur is PIL's, which runs on the CPU")
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
            blurred = tv.to_pil_image(x).filter(ImageFilter.GaussianBlur(values["sigma"]))
            x = tv.to_dtype(tv.pil_to_tensor(blurred), dtype, scale=True)
        x = tv.to_dtype(x, torch.float32, scale=True)
        target.copy_(tv.normalize(x, list(IMAGENET_MEAN), list(IMAGENET_STD)))


def copy(case: Case) -> Callable[[], Any]:
    images, out = pictures(case), place(case)
    return lambda: out.copy_(images.permute(0, 3, 1, 2))


def ours(case: Case) -> Callable[[], Tensor]:
    images, rows, out = pictures(case), parameters(case).to(case.device), place(case)
    return lambda: augment_(images, STEPS, rows, dtype=case.dtype, out=out)


def check(case: Case, views: Tensor) -> None:
    """Against torchvision's chain on 8 images; normalised values, of which 1/255 is .017."""
    few = Case(case.op, (("N", 8), *case.axes[1:]))
    rows, right = parameters(case)[:8].cpu(), place(few).float()
    one_by_one(pictures(case)[:8].cpu(), rows, right, torch.uint8)
    assert (views[:8].float().cpu() - right).abs().mean() < 0.03


def make_case(device: str, n: int, side: int, dtype: str = "float32") -> Case:
    values, width = n * 3 * side * side, 4 if dtype == "float32" else 2
    axes = (("N", n), ("side", side), ("dtype", dtype))
    return Case("augment_", axes, device, bytes=values * (1 + width), items=n, unit="images", quick=side == 32)


CPU = [make_case("cpu", 64, 224), make_case("cpu", 64, 224, "bfloat16"), make_case("cpu", 256, 32)]
CUDA = [make_case("cuda", 256, side, dtype) for side in (224, 96, 32) for dtype in ("float32", "bfloat16")]
SIDES = (
    Side("torchvision, uint8", chain(torch.uint8), when=lambda c: c["dtype"] == "float32"),
    Side("torchvision, float32", chain(torch.float32), when=lambda c: c["dtype"] == "float32"),
    Side("copy", copy, role="bound", agrees=False),
    Side("fastssl", ours, role="ours"),
)


@pytest.mark.parametrize(("case", "side"), grid([*CPU, *CUDA], SIDES, graphs=("fastssl",)))
def test_augment(turns: Callable[..., None], case: Case, side: Side) -> None:
    turns(case, side, check)
