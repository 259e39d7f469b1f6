"""Two views an image, by each loader, on two threads or in two processes: 32 pixels in memory, and JPEG files.

The recipe is MoCo v2's; torchvision also runs it with the true Gaussian of 23 taps that many re-implementations use.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from fastssl.data import augmentation as aug
from fastssl.data.loader import make_loader
from fastssl.data.loading import Loading
from fastssl.data.sources import ArrayImages, FolderImages, Images
from fastssl.engine.device import keep_freed_memory
from fastssl.ops import GaussianBlur

BATCHES = 4  # a round
LOADERS = {
    "torchvision": Loading("torchvision", workers=2),
    "torchvision, 23 taps": Loading("torchvision", workers=2),
    "DALI alone": Loading("dali", "dali", workers=2),
    "exact": Loading("dali", "exact", workers=2),
}


def photographs(count: int, side: int) -> Tensor:
    """N×3×side×side uint8, as smooth and as noisy as photographs are."""
    generator = torch.Generator().manual_seed(0)
    images = torch.zeros(count, 3, side, side)
    for cells in (4, 12, 32):
        coarse = torch.rand(count, 3, min(cells, side), min(cells, side), generator=generator)
        images += torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic") / 3
    images += 0.02 * torch.randn(images.shape, generator=generator)
    return (images.clamp(0, 1) * 255).byte()


@pytest.fixture(scope="module")
def in_memory() -> Images:
    return ArrayImages(photographs(8192, 32), None)


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory: pytest.TempPathFactory) -> Images:
    root = tmp_path_factory.mktemp("jpegs")
    paths: list[Path] = []
    for number, image in enumerate(photographs(512, 256)):
        paths.append(root / f"{number}.jpg")
        to_pil_image(image).save(paths[-1], quality=90)
    return FolderImages(tuple(paths), None)


def recipe(size: int, taps: bool) -> aug.Augmentation:
    """MoCo v2's two views."""

    def changed(step: aug.Step) -> aug.Step:
        blurs = taps and isinstance(step, GaussianBlur)
        return dataclasses.replace(step, kernel_size=23) if blurs else step  # type: ignore[call-arg]

    views = aug.load("moco_v2").views
    return aug.Augmentation(tuple(aug.View(size, tuple(map(changed, view.steps))) for view in views))


def endless(images: Images, augmentation: aug.Augmentation, batch: int, options: Loading) -> Iterator[list[Tensor]]:
    loader = make_loader(images, augmentation, batch, options)
    return itertools.chain.from_iterable(loader.batches(epoch) for epoch in itertools.count())


def run(benchmark: BenchmarkFixture, images: Images, size: int, batch: int, name: str) -> None:
    keep_freed_memory()
    batches = endless(images, recipe(size, "taps" in name), batch, LOADERS[name])

    def some() -> None:
        for _ in range(BATCHES):
            next(batches)

    benchmark.pedantic(some, rounds=7, warmup_rounds=1)
    benchmark.extra_info["images_per_second"] = round(BATCHES * batch / benchmark.stats.stats.median)


@pytest.mark.parametrize("name", LOADERS)
def test_small_images_in_memory(benchmark: BenchmarkFixture, name: str, in_memory: Images) -> None:
    benchmark.group = f"two views, 32 pixels in memory, {BATCHES} batches of 256"
    run(benchmark, in_memory, 32, 256, name)


@pytest.mark.parametrize("name", LOADERS)
def test_jpegs(benchmark: BenchmarkFixture, name: str, jpegs: Images) -> None:
    benchmark.group = f"two views, JPEG of 256 pixels to 224, {BATCHES} batches of 32"
    run(benchmark, jpegs, 224, 32, name)
