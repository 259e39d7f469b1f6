"""What holds for every loader; test_dali_loader.py has what only DALI's does."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastssl.data import augmentation as aug
from fastssl.data import loader as loaders
from fastssl.data.identity import identity
from fastssl.data.loader import make_loader, view_batches
from fastssl.data.loading import Loading
from fastssl.data.sources import in_memory, open_source
from fastssl.errors import DataError, FastsslError

INSTALLED = find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None
KINDS = ["torchvision", pytest.param("dali", marks=pytest.mark.skipif(not INSTALLED, reason="needs NVIDIA DALI"))]


def epoch(folder: Path, kind: str, number: int = 0, start: int = 0, held: bool = False, **options: int) -> list[Tensor]:
    """The first views of the batches of four."""
    images = open_source(str(folder)).train
    loading = Loading(kind, **{"workers": 0, **options})  # type: ignore[arg-type]
    batches = make_loader(in_memory(images) if held else images, aug.load("moco_v2_small"), 4, loading)
    return [views[0] for views in batches.batches(number, start)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("held", [False, True])
def test_a_resumed_epoch_goes_on_as_if_uninterrupted(kind: str, held: bool, image_folder: Path) -> None:
    whole = epoch(image_folder, kind, 1, held=held)
    assert [tuple(view.shape) for view in whole] == [(4, 3, 32, 32)] * 3
    assert all(map(torch.equal, whole[1:], epoch(image_folder, kind, 1, start=1, held=held)))
    for other in (epoch(image_folder, kind, 2, held=held), epoch(image_folder, kind, 1, held=held, seed=1)):
        assert not torch.equal(whole[0], other[0])


@pytest.mark.slow  # starts two processes
def test_the_number_of_processes_changes_nothing(image_folder: Path) -> None:
    assert all(map(torch.equal, epoch(image_folder, "torchvision"), epoch(image_folder, "torchvision", workers=2)))


@pytest.mark.parametrize("kind", KINDS)
def test_both_views_of_an_image_differ(kind: str, image_folder: Path) -> None:
    images = open_source(str(image_folder)).train
    one, other = next(iter(make_loader(images, aug.load("moco_v2_small"), 4, Loading(kind, workers=0)).batches(0)))
    assert not torch.equal(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_batch(kind: str, image_folder: Path) -> None:
    images = open_source(str(image_folder)).train
    for policy, sizes in (("drop", [5, 5]), ("fill", [5, 5, 5]), ("partial", [5, 5, 2])):
        loader = make_loader(images, aug.load("moco_v2_small"), 5, Loading(kind, workers=0, last_batch=policy))
        assert [len(views[0]) for views in loader.batches(0)] == sizes


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_views_agree_between_memory_and_files(kind: str, image_folder: Path) -> None:
    images = open_source(str(image_folder)).train
    view = aug.load("moco_v2_small").views[0].evaluation
    files, memory = (
        torch.cat(list(view_batches(x, view, 5, Loading(kind, workers=0)))) for x in (images, in_memory(images))
    )
    assert files.shape == (12, 3, 32, 32)
    assert torch.allclose(files, memory, atol=1e-6)


def test_a_corrupt_image_is_named_by_worker_processes_too(image_folder: Path) -> None:
    bad = image_folder / "train" / "cat" / "04.png"
    bad.write_bytes(bad.read_bytes()[:300])
    for workers in (0, 1):
        with pytest.raises(DataError, match=r"cannot read the image .*04\.png"):
            epoch(image_folder, "torchvision", workers=workers)


@pytest.mark.slow  # starts interpreters that start a process
def test_the_interpreter_ends_with_batches_under_way(image_folder: Path) -> None:
    script = """
import sys
from fastssl.data import augmentation as aug
from fastssl.data.loader import make_loader
from fastssl.data.loading import Loading
from fastssl.data.sources import open_source
images = open_source(sys.argv[1]).train
batches = make_loader(images, aug.load("moco_v2_small"), 2, Loading(sys.argv[2], workers=1)).batches(0)
print(next(batches)[0].shape)
"""
    command = [sys.executable, "-c", script, str(image_folder)]
    kinds = ["torchvision", *["dali"] * INSTALLED]  # at the same time: most of it goes into imports
    for process in [
        subprocess.Popen([*command, kind], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for kind in kinds
    ]:
        with process:
            out, errors = process.communicate(timeout=90)
        assert process.returncode == 0, errors
        assert "[2, 3, 32, 32]" in out
        assert "Traceback" not in errors


def test_what_cannot_be_loaded_is_named(image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, recipe = open_source(str(image_folder)).train, aug.load("demo")
    with pytest.raises(FastsslError, match=r"batch_size 13 .* 12 training images"):
        make_loader(images, recipe, 13)
    with pytest.raises(FastsslError, match=r"batch_size 14 .* 12 training images"):
        make_loader(images, recipe, 7, Loading(world=2))
    with pytest.raises(FastsslError, match="last_batch must be one of drop, fill, partial, got 'pad'"):
        make_loader(images, recipe, 4, Loading(last_batch="pad"))
    with pytest.raises(FastsslError, match="partial is for one process"):
        make_loader(images, recipe, 4, Loading(last_batch="partial", world=2))
    with pytest.raises(FastsslError, match="--color dali needs --loader dali"):
        make_loader(images, recipe, 4, Loading("torchvision", "dali"))
    with pytest.raises(FastsslError, match="loader must be auto, dali or torchvision, got 'batched'"):
        make_loader(images, recipe, 4, Loading("batched"))
    monkeypatch.setattr(loaders, "find_spec", lambda name: None)
    assert loaders.resolved("auto") == "torchvision"
    with pytest.raises(FastsslError, match=r"pip install 'fastssl\[dali\]'.*--loader torchvision"):
        make_loader(images, recipe, 4, Loading("dali"))


def test_identity_tells_images_and_recipes_apart(image_folder: Path) -> None:
    images, moco, byol = open_source(str(image_folder)).train, aug.load("moco_v2"), aug.load("byol")
    assert identity(images, moco) == identity(open_source(str(image_folder)).train, aug.load("moco_v2"))
    assert identity(images, moco)["views"] != identity(images, byol)["views"]
    held, others = (in_memory(images.subset(torch.arange(start, start + 11))) for start in (0, 1))
    assert identity(held, moco)["names"] != identity(others, moco)["names"]
    (image_folder / "train" / "cat" / "00.png").rename(image_folder / "train" / "cat" / "99.png")
    assert identity(images, moco)["names"] != identity(open_source(str(image_folder)).train, moco)["names"]
