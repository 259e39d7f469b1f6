"""Sources of images and the loaders over them."""

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastssl.data import augmentation as aug
from fastssl.data.loader import Loader, epoch_order, make_loader, view_batches
from fastssl.data.sources import ArrayImages, FolderImages, Images, in_memory, open_source, read_image
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
    path = tmp_path / "deep.png"
    Image.fromarray(np.full((4, 4), 0x8000, np.uint16)).save(path)
    assert read_image(path).getpixel((0, 0)) == (128, 128, 128)
    for mode in ("L", "LA", "P", "CMYK", "1"):
        odd = tmp_path / f"{mode}.{'jpg' if mode == 'CMYK' else 'png'}"
        Image.new(mode, (3, 3)).save(odd)
        assert read_image(odd).mode == "RGB"


def test_a_link_back_up_counts_nothing_twice(image_folder: Path) -> None:
    (image_folder / "train" / "cat" / "up").symlink_to(image_folder / "train", target_is_directory=True)
    assert len(open_source(str(image_folder / "train")).train) == 12


def test_splits_with_other_classes_are_refused(image_folder: Path) -> None:
    (image_folder / "val" / "dog").rename(image_folder / "val" / "wolf")
    with pytest.raises(FastsslError, match="need the same class folders"):
        open_source(str(image_folder))


def test_equal_sizes_are_held_in_memory_and_others_are_not(image_folder: Path) -> None:
    images = open_source(str(image_folder)).train
    held = in_memory(images)
    assert isinstance(held, ArrayImages)
    assert held.pixels.shape == (12, 3, 32, 32)
    Image.new("RGB", (40, 32)).save(image_folder / "train" / "dog" / "11.png")
    assert in_memory(images) is images


@pytest.mark.parametrize("kind", ["batched", "torchvision"])
def test_a_corrupt_image_is_named(kind: str, image_folder: Path) -> None:
    bad = image_folder / "train" / "cat" / "04.png"
    bad.write_bytes(bad.read_bytes()[:300])
    images = open_source(str(image_folder)).train
    with pytest.raises(FastsslError, match=r"cannot read the image .*04\.png"):
        if kind == "batched":
            in_memory(images)
        else:
            list(make_loader(images, aug.load("demo"), 4, kind=kind, workers=1).batches(0))


def loader(images: Images, kind: str, seed: int = 0, workers: int = 0) -> Loader:
    return make_loader(images, aug.load("moco_v2_small"), 4, kind=kind, workers=workers, seed=seed)


@pytest.mark.parametrize("kind", ["batched", "torchvision"])
def test_a_resumed_epoch_goes_on_as_if_uninterrupted(kind: str, image_folder: Path) -> None:
    images = in_memory(open_source(str(image_folder)).train)
    whole = list(loader(images, kind).batches(epoch=1))
    rest = list(loader(images, kind).batches(epoch=1, start=1))
    assert len(whole) == 3
    assert whole[0][0].shape == (4, 3, 32, 32)
    for one, same in zip(whole[1:], rest, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    for other in (loader(images, kind, seed=1).batches(1), loader(images, kind).batches(2)):
        assert not torch.equal(whole[0][0], next(iter(other))[0])


def test_the_number_of_workers_changes_nothing(image_folder: Path) -> None:
    images = open_source(str(image_folder)).train
    alone, two = (list(loader(images, "torchvision", workers=w).batches(0)) for w in (0, 2))
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(alone, two, strict=True))


def test_both_views_of_an_image_differ(image_folder: Path) -> None:
    for kind in ("batched", "torchvision"):
        images = in_memory(open_source(str(image_folder)).train)
        one, other = next(iter(loader(images, kind).batches(0)))
        assert not torch.equal(one, other)


def test_every_image_is_seen_once_an_epoch() -> None:
    assert sorted(epoch_order(10, 0, 3).tolist()) == list(range(10))
    assert epoch_order(10, 0, 3).tolist() != epoch_order(10, 0, 4).tolist()


def test_evaluation_views_agree_between_memory_and_files(image_folder: Path) -> None:
    images = open_source(str(image_folder)).train
    view = aug.load("moco_v2_small").views[0].evaluation
    cpu = torch.device("cpu")
    files = torch.cat(list(view_batches(images, view, 5, device=cpu)))
    memory = torch.cat(list(view_batches(in_memory(images), view, 5, device=cpu)))
    assert torch.allclose(files, memory, atol=1e-6)


def test_what_cannot_be_loaded_is_named(image_folder: Path) -> None:
    images = open_source(str(image_folder)).train
    with pytest.raises(FastsslError, match=r"batch_size 13 .* 12 training images"):
        make_loader(images, aug.load("demo"), 13)
    with pytest.raises(FastsslError, match="--loader torchvision"):
        make_loader(images, aug.load("demo"), 4, kind="batched")
