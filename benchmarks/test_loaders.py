"""Two augmented views of 256 images of 32 pixels in memory: whole batches at once beside torchvision image by image."""

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from fastssl.data import augmentation as aug
from fastssl.data.loader import make_loader
from fastssl.data.sources import open_source
from fastssl.engine.device import keep_freed_memory

BATCH = 256


@pytest.mark.parametrize("recipe", ["moco_v2_small", "demo"])
@pytest.mark.parametrize("loader", ["torchvision", "batched"])
def test_views(benchmark: BenchmarkFixture, loader: str, recipe: str) -> None:
    keep_freed_memory()
    images = open_source("embedded").train
    batches = make_loader(images, aug.load(recipe), BATCH, kind=loader).batches(0)
    next(batches)
    benchmark.group = f"two views, {recipe}, batch {BATCH}"
    benchmark.pedantic(lambda: next(batches), rounds=10)
