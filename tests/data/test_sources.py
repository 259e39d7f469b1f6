"""Sources of images: named sets, folders, and what is held in memory."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastssl.data.sources import ArrayImages, FolderImages, in_memory, load_image, open_source
from fastssl.errors import FastsslError


def test_the_embedded_images_are_fashion_mnist() -> None:
    source = open_source("embedded")
    assert isinstance(source.train, ArrayImages)
    assert source.test is not None
    for images, count in ((source.train, 800), (source.test, 200)):
        assert images.labels is not None
        assert images.labels.bincount().tolist() == [count] * 10
    assert source.train.pixels.shape == (8000, 3, 32, 32)
    assert source.train.classes[0] == "t-shirt"
    # What `build` made of the original files.
    digest = hashlib.sha256(source.train.pixels.numpy().tobytes()).hexdigest()
    assert digest.startswith("ac99048dcf2208dd")


def test_a_folder_with_splits(image_folder: Path) -> None:
    source = open_source(str(image_folder))
    assert source.test is not None
    assert (len(source.train), len(source.test)) == (12, 6)
    assert source.train.classes == ("cat", "dog")
    assert source.train.labels is not None
    assert source.train.labels.tolist() == [0] * 6 + [1] * 6


def test_a_flat_folder_is_unlabelled(image_folder: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in image_folder.rglob("*.png"):
        shutil.copy(path, flat / f"{path.parent.parent.name}-{path.name}")
    source = open_source(str(flat))
    assert len(source.train) == 18
    assert source.train.labels is None
    assert source.test is None


def test_holding_out(image_folder: Path) -> None:
    source = open_source(str(image_folder / "train"), holdout=0.25, seed=1)
    assert source.test is not None
    assert (len(source.train), len(source.test)) == (9, 3)
    assert isinstance(source.train, FolderImages)
    assert isinstance(source.test, FolderImages)
    assert not set(source.train.paths) & set(source.test.paths)
    with pytest.raises(FastsslError, match="holdout"):
        open_source("embedded", holdout=1.0)


def test_cifar_is_read_through_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fake:
        data = torch.zeros(4, 32, 32, 3, dtype=torch.uint8).numpy()
        targets = (0, 1, 0, 1)
        classes = ("a", "b")

        def __init__(self, root: Path, train: bool, download: bool) -> None:
            if root.name == "offline":
                raise OSError("no route")

    monkeypatch.setattr("torchvision.datasets.CIFAR10", Fake)
    source = open_source(f"cifar10:{tmp_path}")
    assert isinstance(source.train, ArrayImages)
    assert source.train.pixels.shape == (4, 3, 32, 32)
    assert source.train.pixels.data_ptr() == Fake.data.ctypes.data
    with pytest.raises(FastsslError, match=r"no route.*--data cifar10:FOLDER"):
        open_source(f"cifar10:{tmp_path / 'offline'}")


def test_missing_and_empty_folders_are_named(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(FastsslError, match=r"there is no folder.*nowhere"):
        open_source(str(tmp_path / "nowhere"))
    with pytest.raises(FastsslError, match="is a file"):
        open_source(str(tmp_path / "notes.txt"))
    with pytest.raises(FastsslError, match=r"no images in .*\.jpg"):
        open_source(str(tmp_path))


def test_sixteen_bits_are_scaled_and_odd_modes_converted(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 0x8000, np.uint16)).save(tmp_path / "0.png")
    for number, mode in enumerate(("L", "LA", "P", "CMYK", "1"), 1):
        Image.new(mode, (3, 3)).save(tmp_path / f"{number}.{'jpg' if mode == 'CMYK' else 'png'}")
    images = open_source(str(tmp_path)).train
    assert load_image(images, 0).getpixel((0, 0)) == (128, 128, 128)
    assert [load_image(images, i).mode for i in range(6)] == ["RGB"] * 6


def test_a_link_back_up_counts_nothing_twice(image_folder: Path) -> None:
    (image_folder / "train" / "cat" / "up").symlink_to(image_folder / "train", target_is_directory=True)
    assert len(open_source(str(image_folder / "train")).train) == 12


def test_the_file_system_does_not_choose_among_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (3, 3)).save(tmp_path / "images" / "0.png")
    for name in "cab":
        (tmp_path / "root" / name).mkdir(parents=True)
        (tmp_path / "root" / name / "link").symlink_to(tmp_path / "images", target_is_directory=True)
    walk = os.walk

    def backwards(*args: Any, **how: Any) -> Iterator[tuple[str, list[str], list[str]]]:
        for found in walk(*args, **how):
            found[1].sort(reverse=True)
            yield found

    monkeypatch.setattr("os.walk", backwards)
    found = open_source(str(tmp_path / "root")).train
    assert isinstance(found, FolderImages)
    assert found.paths == (tmp_path / "root" / "a" / "link" / "0.png",)


def test_splits_with_other_classes_are_refused(image_folder: Path) -> None:
    (image_folder / "val" / "dog").rename(image_folder / "val" / "wolf")
    with pytest.raises(FastsslError, match="need the same class folders"):
        open_source(str(image_folder))


def test_equal_sizes_are_held_in_memory_and_others_are_not(image_folder: Path) -> None:
    images = open_source(str(image_folder)).train
    held = in_memory(images)
    assert isinstance(held, ArrayImages)
    assert held.pixels.shape == (12, 3, 32, 32)
    assert held.pixels.permute(0, 2, 3, 1).is_contiguous()  # as loaders want it: no second copy
    Image.new("RGB", (40, 32)).save(image_folder / "train" / "dog" / "11.png")
    assert in_memory(images) is images


def test_the_digest_is_of_every_pixel_however_they_lie() -> None:
    pixels = torch.randint(0, 256, (3000, 3, 2, 2), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    digest = ArrayImages(pixels, None).digest
    assert ArrayImages(pixels.contiguous(memory_format=torch.channels_last), None).digest == digest
    assert ArrayImages(pixels.view(3000, 3, 4, 1), None).digest != digest
    for index in (0, 1, 1024, 2999):
        other = pixels.clone()
        other[index, 1, 1, 0] ^= 1
        assert ArrayImages(other, None).digest != digest
    assert ArrayImages(pixels, None).groups is None


def test_a_corrupt_image_that_was_to_be_held_in_memory_is_named(image_folder: Path) -> None:
    bad = image_folder / "train" / "cat" / "04.png"
    bad.write_bytes(bad.read_bytes()[:300])
    with pytest.raises(FastsslError, match=r"cannot read the image .*04\.png"):
        in_memory(open_source(str(image_folder)).train)
