"""augment_ against torchvision and PIL: the same parameters give the same pixels, and are drawn alike.

What of it is `native` or `triton` only is in test_augment_native.py and tests/kernels.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from PIL import ImageFilter
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from fastssl.data import per_image
from fastssl.errors import FastsslError
from fastssl.ops import (
    ColorJitter,
    GaussianBlur,
    Grayscale,
    RandomErasing,
    Solarize,
    augment_,
    backend,
    blur,
    use_backend,
)
from fastssl.ops.photometric import COLUMNS, JITTER_ORDERS, NEUTRAL, Step, draw_augmentation

ADJUST = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
JITTER, ERASING = ColorJitter(0.4, 0.4, 0.4, 0.3, p=0.8), RandomErasing((0.1, 0.4))
SINGLE: dict[str, Step] = {
    "brightness": ColorJitter(brightness=0.8),
    "contrast": ColorJitter(contrast=0.8),
    "saturation": ColorJitter(saturation=0.8),
    "hue": ColorJitter(hue=0.5),
    "jitter": JITTER,
    "grayscale": Grayscale(0.5),
    "pil_blur": GaussianBlur((0.1, 3.0), p=0.7),
    "kernel_blur": GaussianBlur((0.1, 2.0), 23, p=0.7),
    "solarize": Solarize(0.5, 0.5),
    "solarize_high": Solarize(0.7, 0.5),
    "erasing": ERASING,
}
RECIPES: dict[str, tuple[Step, ...]] = {
    "moco_v1": (Grayscale(0.2), ColorJitter(0.4, 0.4, 0.4, 0.4)),
    "moco_v2": (ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8), Grayscale(0.2), GaussianBlur((0.1, 2.0), p=0.5)),
    "byol": (ColorJitter(0.4, 0.4, 0.2, 0.1, p=0.8), Grayscale(0.2), GaussianBlur((0.1, 2.0), 23, p=0.8), Solarize()),
    "demo": (ColorJitter(0.6, 0.6, p=0.8), GaussianBlur((0.1, 1.5)), ERASING),
}
ALL = {**{name: (step,) for name, step in SINGLE.items()}, **RECIPES}


def pictures(count: int, side: int = 32, seed: int = 0) -> Tensor:
    """Smooth shapes with some noise, N×H×W×3 uint8; black, white, grey and saturated ones among them."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, side // 4 + 1, side // 4 + 1, generator=generator)
    images = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic") * 1.3 - 0.15
    images += 0.05 * torch.randn(count, 3, side, side, generator=generator)
    images[::16] = images[::16].mean(1, keepdim=True)
    images[1::16] = images[1::16].round()
    return (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).contiguous()


@pytest.fixture(params=["reference", "native", "triton"])
def name(request: pytest.FixtureRequest) -> Iterator[str]:
    if why := backend._implementations["augment_"][request.param].refuses(torch.device("cpu"), torch.float32):
        pytest.skip(why)
    with use_backend(request.param):
        yield request.param


def values(parameters: Tensor, image: int) -> dict[str, float]:
    return dict(zip(COLUMNS, parameters[image].tolist(), strict=True))


def replayed(step: Step, x: Any, v: dict[str, float], blur: Callable[[Any, GaussianBlur, float], Any]) -> Any:
    """`step` by torchvision's functional operations, on a tensor 3×H×W of uint8 or of float in 0…1."""
    if isinstance(step, ColorJitter):
        for part in JITTER_ORDERS[int(v["order"])]:
            if v[COLUMNS[part]] != NEUTRAL[part]:
                x = ADJUST[part](x, v[COLUMNS[part]])
    elif isinstance(step, Grayscale):
        x = tv.rgb_to_grayscale(x, 3) if v["grayscale"] else x
    elif isinstance(step, GaussianBlur):
        x = blur(x, step, v["sigma"]) if v["sigma"] else x
    elif isinstance(step, Solarize):
        x = torch.where(x >= 255 * v["threshold"], 255 - x, x)
    elif v["height"]:
        x = tv.erase(x, *(int(v[key]) for key in ("top", "left", "height", "width")), v=torch.zeros(3, 1, 1).to(x))
    return x


def published_blur(x: Tensor, step: GaussianBlur, sigma: float) -> Tensor:
    """As the papers' code does it, on 8-bit pixels."""
    if step.kernel_size:
        return tv.gaussian_blur(x, [step.kernel_size] * 2, [sigma] * 2)
    return tv.pil_to_tensor(tv.to_pil_image(x).filter(ImageFilter.GaussianBlur(sigma)))


def augmented(images: Tensor, steps: tuple[Step, ...], parameters: Tensor, dtype: torch.dtype) -> Tensor:
    """In 0…1, N×3×H×W."""
    return augment_(images.clone(), steps, parameters, mean=(0, 0, 0), std=(1, 1, 1), dtype=dtype)


@pytest.mark.parametrize("recipe", ALL)
def test_equal_to_torchvision(recipe: str, name: str) -> None:
    """Torchvision's kernels for uint8 tensors, operations and whole recipes over 2,048 images.

    Equal but for values that fall within float32's rounding of a whole number; PIL's blur rounds after each of its six
    passes where `augment_` rounds once.
    """
    count = {"triton": 12, "reference": 100, "native": 2048}[name]
    images, steps = pictures(count), ALL[recipe]
    parameters = draw_augmentation(steps, count, (32, 32), torch.Generator().manual_seed(1))
    ours = augmented(images, steps, parameters, torch.float32) * 255
    theirs = []
    for image, row in zip(images, range(count), strict=True):
        x = image.permute(2, 0, 1)
        for step in steps:
            x = replayed(step, x, values(parameters, row), published_blur)
        theirs.append(x)
    difference = (ours - torch.stack(theirs)).abs()
    rounds = any(isinstance(step, GaussianBlur) and not step.kernel_size for step in steps)
    assert difference.max() <= (4.01 if rounds else 3.01)
    # Triton's blur has weights of float16, so one value in a hundred is rounded to the neighbour.
    assert difference.mean() <= (0.25 if rounds else 0.02 if name == "triton" else 0.001)


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 0.7, 1.0])
def test_all_executors_solarize_alike(threshold: float) -> None:
    ramp = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).repeat(1, 1, 1, 3)
    step = Solarize(threshold, p=1.0)
    picture = per_image.module(step, 16)(tv.to_pil_image(ramp[0].permute(2, 0, 1)))
    theirs = tv.pil_to_tensor(picture)
    assert torch.equal(
        (augmented(ramp, (step,), draw_augmentation((step,), 1, (16, 16)), torch.float32)[0] * 255).round().byte(),
        theirs,
    )


def test_a_sigma_beyond_the_range_darkens_nothing(name: str) -> None:
    """On a GPU and inside torch.compile it is not checked."""
    step, flat = GaussianBlur((0.1, 2.0), p=1.0), torch.full((1, 32, 32, 3), 200, dtype=torch.uint8)
    assert torch.allclose(blur.table(step, torch.tensor([9.0]), 32).sum(2), torch.ones(1), atol=1e-6)
    out = augmented(flat, (step,), draw_augmentation((step,), 1, (32, 32)), torch.float32)
    assert ((out * 255).round() == 200).all()


def test_normalises_and_casts(name: str) -> None:
    images = pictures(5, 20)
    mean, std = (0.4, 0.5, 0.6), (0.1, 0.2, 0.3)
    expected = v2.Normalize(mean, std)(images.permute(0, 3, 1, 2) / 255)
    # Triton's interpreter cuts bfloat16 off where GPUs round it.
    coarse = 0.04 if name == "triton" else 0.02
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, coarse), (torch.float16, 0.003)):
        out = augment_(images.clone(), (), mean=mean, std=std, dtype=dtype)
        assert out.dtype == dtype
        assert out.is_contiguous(memory_format=torch.channels_last)
        assert (out.float() - expected).abs().max() < tolerance
    buffer = torch.empty(5, 3, 20, 20).to(memory_format=torch.channels_last)
    assert augment_(images.clone(), (), mean=mean, std=std, out=buffer) is buffer
    assert torch.allclose(buffer, expected, atol=1e-5)
    assert augment_(images, (), out=torch.empty_like(buffer, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert augment_(images[:0], RECIPES["byol"]).shape == (0, 3, 20, 20)


def test_float64_is_the_references() -> None:
    assert augment_(pictures(2), RECIPES["moco_v2"], dtype=torch.float64).dtype == torch.float64


def test_non_contiguous_images(name: str) -> None:
    images = pictures(4)
    planes = images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    steps = RECIPES["moco_v2"]
    parameters = draw_augmentation(steps, 4, (32, 32), torch.Generator().manual_seed(3))
    assert torch.equal(augment_(planes, steps, parameters), augment_(images.clone(), steps, parameters))


def test_drawn_from_the_generator(generator: torch.Generator) -> None:
    images, steps = pictures(6), RECIPES["byol"]
    one, same, other = (augment_(images.clone(), steps, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    torch.manual_seed(7)
    default = augment_(images.clone(), steps)
    torch.manual_seed(7)
    assert torch.equal(default, augment_(images.clone(), steps))


def kolmogorov_smirnov(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference of the two empirical distribution functions."""
    grid = torch.cat([ours, theirs]).sort().values
    a, b = (torch.searchsorted(x.sort().values, grid, right=True) / len(x) for x in (ours, theirs))
    return float((a - b).abs().max())


N = 20_000
CRITICAL = 1.949 * (2 / N) ** 0.5  # of two samples of N at the level .001


def test_jitter_is_drawn_as_torchvisions(generator: torch.Generator) -> None:
    ours = draw_augmentation([JITTER], N, (32, 32), generator)
    transform = v2.ColorJitter(0.4, 0.4, 0.4, 0.3)
    torch.manual_seed(0)
    drawn = [transform.make_params([]) for _ in range(N)]
    done = ours[:, 0] != 1
    assert abs(done.float().mean() - 0.8) < 0.01
    assert torch.equal(ours[~done], torch.tensor(NEUTRAL).expand(int((~done).sum()), -1))
    for index, key in enumerate(("brightness_factor", "contrast_factor", "saturation_factor", "hue_factor")):
        theirs = torch.tensor([d[key] for d in drawn])
        n = int(done.sum())
        assert kolmogorov_smirnov(ours[done, index], theirs[:n]) < 1.949 * (2 / n) ** 0.5, key
    orders = {order: i for i, order in enumerate(JITTER_ORDERS)}
    theirs = torch.tensor([orders[tuple(int(i) for i in d["fn_idx"])] for d in drawn])
    counts = torch.stack([torch.bincount(x.long(), minlength=24) / len(x) for x in (ours[done, 4], theirs)])
    assert (counts - 1 / 24).abs().max() < 0.007


def test_the_rest_is_drawn_as_torchvisions(generator: torch.Generator) -> None:
    steps = [Grayscale(0.2), GaussianBlur((0.1, 2.0), p=0.5), Solarize(0.5, 0.2), RandomErasing(p=0.5)]
    ours = dict(zip(COLUMNS, draw_augmentation(steps, N, (32, 32), generator).T, strict=True))
    assert abs(ours["grayscale"].mean() - 0.2) < 0.01
    assert abs((ours["threshold"] == 0.5).float().mean() - 0.2) < 0.01
    sigma = ours["sigma"][ours["sigma"] > 0]
    assert abs(len(sigma) / N - 0.5) < 0.015
    assert kolmogorov_smirnov(sigma, torch.empty(N).uniform_(0.1, 2.0, generator=generator)) < 0.025
    transform = v2.RandomErasing(1.0, (0.02, 0.2))
    torch.manual_seed(0)
    drawn = [transform.make_params([torch.zeros(3, 32, 32)]) for _ in range(N)]
    erased = ours["height"] > 0
    assert abs(erased.float().mean() - 0.5) < 0.015
    for key, theirs in (("top", "i"), ("left", "j"), ("height", "h"), ("width", "w")):
        distance = kolmogorov_smirnov(ours[key][erased], torch.tensor([float(d[theirs]) for d in drawn]))
        assert distance < 1.949 * (1.5 / (N / 2)) ** 0.5, key


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"images": torch.zeros(2, 8, 8, 3)}, r"N×H×W×3 of uint8, got \(2, 8, 8, 3\) of torch.float32"),
        ({"images": torch.zeros(2, 3, 8, 8, dtype=torch.uint8)}, r"got \(2, 3, 8, 8\)"),
        ({"steps": [Grayscale(), Grayscale()]}, "grayscale comes twice"),
        ({"steps": ["blur"]}, "augment_ knows ColorJitter"),
        ({"parameters": torch.zeros(2, 11)}, "2×12 of float32"),
        ({"parameters": torch.zeros(2, 12, device="meta")}, "parameters are on meta, the images on cpu"),
        ({"parameters": torch.tensor(NEUTRAL).repeat(2, 1) + 3}, "a sigma of 3 lies above the step's 2"),
        ({"std": (1, 0, 1)}, "std"),
        ({"parameters": torch.tensor(NEUTRAL).repeat(2, 1), "generator": torch.Generator()}, "not both"),
        ({"dtype": torch.int32}, "dtype must be one of"),
        ({"out": torch.zeros(2, 3, 32, 32)}, "channels_last"),
        ({"steps": [GaussianBlur(kernel_size=65)]}, "kernel_size 65 needs images of more than 32 pixels, got 32×32"),
    ],
)
def test_what_does_not_fit_is_named(arguments: dict[str, Any], match: str) -> None:
    given = {"images": pictures(2), "steps": RECIPES["moco_v2"], **arguments}
    with pytest.raises(FastsslError, match=match):
        augment_(given.pop("images"), given.pop("steps"), **given)


def test_opcheck_and_compile(name: str) -> None:
    if name == "reference":
        pytest.skip("plain PyTorch")
    steps = RECIPES["byol"]
    parameters = draw_augmentation(steps, 2, (24, 24), torch.Generator().manual_seed(0))
    images = pictures(2, 24)
    expected = augment_(images.clone(), steps, parameters)
    compiled = torch.compile(lambda x, p: augment_(x, steps, p) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(images.clone(), parameters), expected * 2)
    out = torch.empty(2, 3, 24, 24).to(memory_format=torch.channels_last)
    table = torch.rand(2, 23, 23)
    arguments = (images, out, parameters, table, table, [0, 1, 2, 3], [0.5, 0.5, 0.5], [0.2, 0.2, 0.2])
    torch.library.opcheck(getattr(torch.ops.fastssl, f"augment_{name}").default, arguments)
