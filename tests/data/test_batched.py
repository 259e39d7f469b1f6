"""Batched execution against torchvision: the same parameters give the same pixels, and are drawn alike."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from fastssl.data import augmentation as aug
from fastssl.data import batched
from fastssl.errors import FastsslError

N, SIDE = 24, 32


@pytest.fixture
def images() -> Tensor:
    """Smooth random pictures, 0…1."""
    noise = torch.rand(N, 3, 9, 9, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.interpolate(noise, (SIDE, SIDE), mode="bicubic").clamp_(0, 1)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [16, 32, 48])
def test_crop_and_resize(interpolation: str, size: int, images: Tensor, generator: torch.Generator) -> None:
    step = aug.RandomResizedCrop((0.1, 1.0), interpolation=interpolation)
    parameters = batched.draw(step, images, generator)
    ours = batched.apply(step, images, parameters, size)
    for image, out, (top, left, height, width) in zip(images, ours, parameters["box"].tolist(), strict=True):
        mode = v2.InterpolationMode(interpolation)
        theirs = tv.resized_crop(image, top, left, height, width, [size, size], mode, antialias=True)
        assert torch.allclose(out, theirs.clamp(0, 1), atol=1e-5)


def test_crop_boxes_are_torchvisions(images: Tensor, generator: torch.Generator) -> None:
    """Means and deviations of top, left, height and width over many draws."""
    step = aug.RandomResizedCrop((0.2, 1.0))
    ours = batched.draw(step, images.new_empty(6000, 3, SIDE, SIDE), generator)["box"].double()
    transform = v2.RandomResizedCrop(SIDE, step.area, step.aspect)
    torch.manual_seed(0)
    drawn = [transform.make_params([images[0]]) for _ in range(6000)]
    theirs = torch.tensor([[d[k] for k in ("top", "left", "height", "width")] for d in drawn], dtype=torch.float64)
    assert (ours.mean(0) - theirs.mean(0)).abs().max() < 0.35
    assert (ours.std(0) - theirs.std(0)).abs().max() < 0.25


def test_an_impossible_crop_falls_back_to_the_centre(generator: torch.Generator) -> None:
    images = torch.rand(4, 3, 8, 40)
    step = aug.RandomResizedCrop((1.0, 1.0), (1.0, 1.0))
    assert batched.draw(step, images, generator)["box"].tolist() == [[0, 16, 8, 8]] * 4


def test_shift(images: Tensor, generator: torch.Generator) -> None:
    step = aug.RandomShift(5)
    parameters = batched.draw(step, images, generator)
    assert parameters["offset"].abs().max() == 5
    for image, out, (dy, dx) in zip(
        images, batched.apply(step, images, parameters, SIDE), parameters["offset"].tolist(), strict=True
    ):
        assert torch.equal(out, tv.affine(image, 0.0, [dx, dy], 1.0, [0.0, 0.0]))


def test_flip(images: Tensor, generator: torch.Generator) -> None:
    step = aug.HorizontalFlip(0.5)
    parameters = batched.draw(step, images, generator)
    for image, out, do in zip(images, batched.apply(step, images, parameters, SIDE), parameters["do"], strict=True):
        assert torch.equal(out, tv.horizontal_flip(image) if do else image)


def test_color_jitter(images: Tensor, generator: torch.Generator) -> None:
    step = aug.ColorJitter(0.4, 0.4, 0.4, 0.3, p=0.8)
    parameters = batched.draw(step, images, generator)
    ours = batched.apply(step, images, parameters, SIDE)
    adjust = [tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue]
    names = ["brightness", "contrast", "saturation", "hue"]
    for i, image in enumerate(images):
        expected = image
        for operation in parameters["order"][i].tolist() if parameters["do"][i] else ():
            expected = adjust[operation](expected, parameters[names[operation]][i].item())
        assert torch.allclose(ours[i], expected, atol=2e-5)
    assert 0 < parameters["do"].sum() < N
    assert len({tuple(order) for order in parameters["order"].tolist()}) > 5


def test_grayscale_and_solarize(images: Tensor, generator: torch.Generator) -> None:
    for step, operation in (
        (aug.Grayscale(0.5), lambda x: tv.rgb_to_grayscale(x, 3)),
        (aug.Solarize(0.5, 0.5), lambda x: tv.solarize(x, 0.5)),
    ):
        parameters = batched.draw(step, images, generator)
        ours = batched.apply(step, images, parameters, SIDE)
        for image, out, do in zip(images, ours, parameters["do"], strict=True):
            assert torch.allclose(out, operation(image) if do else image, atol=1e-6)


def test_kernel_blur(images: Tensor, generator: torch.Generator) -> None:
    step = aug.GaussianBlur((0.1, 2.0), kernel_size=7, p=0.7)
    parameters = batched.draw(step, images, generator)
    ours = batched.apply(step, images, parameters, SIDE)
    for i, image in enumerate(images):
        sigma = parameters["sigma"][i].item()
        expected = tv.gaussian_blur(image, [7, 7], [sigma, sigma]) if parameters["do"][i] else image
        assert torch.allclose(ours[i], expected, atol=1e-5)


def test_pil_blur(images: Tensor, generator: torch.Generator) -> None:
    step = aug.GaussianBlur((0.1, 3.0), p=0.7)
    parameters = batched.draw(step, images, generator)
    integers = images.mul(255).round().byte()
    ours = batched.apply(step, integers / 255, parameters, SIDE) * 255
    for i, image in enumerate(integers):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        if parameters["do"][i]:
            picture = picture.filter(ImageFilter.GaussianBlur(parameters["sigma"][i].item()))
        theirs = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        assert (ours[i] - theirs).abs().max() < 3.1  # PIL rounds after each of six passes
        assert (ours[i] - theirs).abs().mean() < 0.8


def test_erasing_blackens_one_rectangle(images: Tensor, generator: torch.Generator) -> None:
    step = aug.RandomErasing((0.1, 0.3), p=0.5)
    images = images + 0.1
    parameters = batched.draw(step, images, generator)
    for image, out, (top, left, height, width) in zip(
        images, batched.apply(step, images, parameters, SIDE), parameters["box"].tolist(), strict=True
    ):
        assert torch.equal(out, tv.erase(image, top, left, height, width, torch.zeros(1)))
    areas = parameters["box"][:, 2] * parameters["box"][:, 3] / SIDE**2
    assert 0 < (areas > 0).sum() < N
    assert areas[areas > 0].min() > 0.08
    assert areas.max() < 0.32


@pytest.mark.parametrize("name", [n for n in aug.names() if aug.load(n).views[0].size == 32])
def test_whole_recipes_are_reproducible_and_differ_between_images(name: str) -> None:
    pixels = torch.full((8, 3, SIDE, SIDE), 90, dtype=torch.uint8)
    pixels[:, :, 8:20, 4:30] = 200
    for view in aug.load(name).views:
        one, same, other = (batched.execute(view, pixels, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
        assert one.shape == (8, 3, 32, 32)
        assert one.dtype == torch.float32
        assert torch.equal(one, same)
        assert not torch.equal(one, other)
        assert len({tuple(image.flatten().tolist()) for image in one}) > 1


@pytest.mark.parametrize("step", [s() for s in aug.STEPS.values()], ids=list(aug.STEPS))
@pytest.mark.parametrize("p", [0.0, 1.0])
def test_a_step_for_none_or_all_of_the_images(step: aug.Step, p: float, generator: torch.Generator) -> None:
    for name in ("p", "brightness"):
        if hasattr(step, name):
            step = dataclasses.replace(step, **{name: p})
    for count in (1, 3):
        pixels = torch.randint(256, (count, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator)
        view = aug.View(SIDE, (step,), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        out = batched.execute(view, pixels, generator)
        assert out.shape == pixels.shape
        if hasattr(step, "p"):
            assert torch.equal(out, pixels / 255) == (p == 0)


def test_images_of_another_size_are_resized_for_evaluation() -> None:
    view = aug.View(32, (), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    images = torch.randint(256, (2, 3, 40, 60), dtype=torch.uint8)
    out = batched.execute(view, images, torch.Generator())
    expected = tv.center_crop(tv.resize(images.float() / 255, [37], antialias=True), [32, 32])
    assert torch.allclose(out, expected)


def test_a_kernel_larger_than_the_image_is_an_error(generator: torch.Generator) -> None:
    view = aug.View(8, (aug.GaussianBlur(kernel_size=23, p=1.0),))
    with pytest.raises(FastsslError, match="23"):
        batched.execute(view, torch.zeros(1, 3, 8, 8, dtype=torch.uint8), generator)
