"""The DALI loader: torchvision's pixels, the same batches after a resume, errors that name the image."""

import gc
import random
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

pytest.importorskip("nvidia.dali", reason="needs NVIDIA DALI")

from fastssl.data import augmentation as aug
from fastssl.data import dali_graph, geometry
from fastssl.data.augmentation import HorizontalFlip, RandomResizedCrop, RandomShift, View
from fastssl.data.check import fault
from fastssl.data.dali_loader import DaliLoader
from fastssl.data.loader import make_loader, view_batches
from fastssl.data.loading import Loading
from fastssl.data.order import Order
from fastssl.data.sources import ArrayImages, FolderImages, Images, load_image, open_source
from fastssl.errors import DataError, FastsslError
from fastssl.ops import GaussianBlur, Grayscale, Solarize
from fastssl.ops.photometric import draw_augmentation
from tests.data.pictures import readable, unreadable
from tests.data.test_geometry import expected
from tests.data.test_scan import mutate
from tests.ops.test_augment import published_blur, values
from tests.ops.test_augment import replayed as replayed_color

EXACT, DALI = Loading("dali"), Loading("dali", "dali")
NEITHER = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def photographs(count: int, side: int = 32, seed: int = 0) -> Tensor:
    """As smooth as photographs are, N×3×H×W uint8."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, side // 6 + 1, side // 6 + 1, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic")
    noisy = smooth + 0.01 * torch.randn(smooth.shape, generator=generator)
    return (noisy.clamp(0, 1) * 255).round().byte()


def arrays(count: int, side: int = 32) -> ArrayImages:
    return ArrayImages(photographs(count, side), None)


def save_jpegs(root: Path, count: int, low: int = 40, high: int = 90) -> Path:
    """Photographs of different sizes, in two classes."""
    sizes = random.Random(0)
    for index in range(count):
        side = sizes.randint(low, high)
        image = to_pil_image(photographs(1, side, seed=index)[0])
        path = root / ("a", "b")[index % 2] / f"{index:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.resize((side, sizes.randint(low, high))).save(path, quality=92)
    return root


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_jpegs(tmp_path_factory.mktemp("jpegs"), 64)


def decoded(images: Images, index: int) -> Tensor:
    return torch.from_numpy(np.array(load_image(images, index))).permute(2, 0, 1)


VIEWS = {
    "crop": View(32, (RandomResizedCrop((0.2, 1.0)), HorizontalFlip(0.5)), **NEITHER),
    "bicubic": View(24, (RandomResizedCrop((0.08, 1.0), interpolation="bicubic"), HorizontalFlip(0.5)), **NEITHER),
    "enlarged": View(96, (RandomResizedCrop((0.2, 1.0)), HorizontalFlip(0.5)), **NEITHER),
    "shift": View(32, (HorizontalFlip(0.5), RandomShift(4)), **NEITHER),
    "crop and shift": View(32, (RandomResizedCrop((0.2, 1.0)), RandomShift(4), HorizontalFlip(0.5)), **NEITHER),
    "evaluation": View(32, (), **NEITHER),
}


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("stored", [False, True])
def test_geometry_is_torchvisions(name: str, stored: bool, jpegs: Path) -> None:
    images: Images = open_source(str(jpegs)).train if stored else arrays(64)
    view = VIEWS[name]
    loader = DaliLoader(images, (view,), Order(64, 64, shuffle=False), EXACT)
    [[ours]] = loader.batches(0)
    drawn = geometry.draw(view, 64, loader.generator(0, 0, 0, "geometry"))
    theirs = expected(view, [decoded(images, i) for i in range(64)], drawn)
    difference = (ours * 255 - theirs).abs()
    # Without a crop, and where bilinear shrinks, DALI repeats the pixels at a border which PIL leaves out.
    assert difference[:, :, 6:-6, 6:-6].max() <= 2
    assert difference.max() <= (2.01 if name == "bicubic" else 8)
    assert difference.mean() < (0.35 if name in ("shift", "evaluation") or stored else 0.02)


RECIPES = {
    "moco_v1": aug.load("moco_v1").views[0].steps,
    "moco_v2": aug.load("moco_v2").views[0].steps,
    "byol_t": aug.load("byol").views[0].steps,
    "byol_t_prime": aug.load("byol").views[1].steps,
    "demo": aug.load("demo").views[0].steps,
}


@pytest.mark.parametrize("name", RECIPES)
def test_whole_recipes_are_torchvisions(name: str) -> None:
    """Over 256 images each: mean difference below 1/255, and none above 8/255."""
    count, batch = 256, 128
    view, images = View(32, RECIPES[name], **NEITHER), arrays(count)
    loader = DaliLoader(images, (view,), Order(count, batch, shuffle=False), EXACT)
    total, above = 0.0, 0
    for number, [ours] in enumerate(loader.batches(0)):
        drawn = geometry.draw(view, batch, loader.generator(number, 0, 0, "geometry"))
        colors = draw_augmentation(view.photometric, batch, (32, 32), loader.generator(number, 0, 0, "color"))
        rows = range(number * batch, (number + 1) * batch)
        for row, x in enumerate(expected(view, [images.pixels[i] for i in rows], drawn)):
            for step in view.photometric:
                x = replayed_color(step, x, values(colors, row), published_blur)
            difference = (ours[row] * 255 - x).abs()
            above += int(difference.max() > 8.01)
            total += float(difference.mean())
    assert total / count < 1
    assert above == 0


@pytest.mark.parametrize(("count", "low", "high"), [(24, 30, 60)])
@pytest.mark.parametrize("color", ["exact", "dali"])
def test_views_of_one_decoding(color: str, count: int, low: int, high: int, tmp_path: Path) -> None:
    """Multi-crop: views of different sizes, each with parameters of its own; T and T' each in its place."""
    images = open_source(str(save_jpegs(tmp_path, count, low, high))).train
    t, t_prime = aug.load("byol").views
    small = View(16, (RandomResizedCrop((0.05, 0.14)), HorizontalFlip(), Grayscale(1.0)))
    views = (View(32, t.steps), View(32, (*t_prime.steps[:-1], Solarize(p=1.0))), *[small] * 3)
    [batch] = make_loader(images, aug.Augmentation(views), count, Loading("dali", color)).batches(0)
    assert [tuple(view.shape) for view in batch] == [(count, 3, 32, 32)] * 2 + [(count, 3, 16, 16)] * 3
    assert all(not torch.equal(batch[i], batch[j]) for i, j in ((0, 1), (2, 3), (3, 4)))
    grey = [view.mul(torch.tensor(v.std).view(3, 1, 1)).add(torch.tensor(v.mean).view(3, 1, 1))
            for view, v in zip(batch, views, strict=True)]  # fmt: skip
    assert (grey[2] - grey[2].mean(1, keepdim=True)).abs().max() < 0.02
    assert (grey[0] - grey[0].mean(1, keepdim=True)).abs().max() > 0.1
    assert grey[1].max() < 0.55  # solarized


def packed(folder: Path, root: Path) -> str:
    """The folder's images in shards."""
    import tarfile

    files = sorted(folder.glob("*/*.jpg"))
    root.mkdir(exist_ok=True)
    for shard in range(4):
        with tarfile.open(root / f"{shard}.tar", "w") as tar:
            for path in files[shard::4]:
                tar.add(path, f"{path.parent.name}-{path.name}")
    return str(root / "*.tar")


@pytest.fixture(scope="module")
def sources(jpegs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Images]:
    return {
        "folder": open_source(str(jpegs)).train,
        "shards": open_source(packed(jpegs, tmp_path_factory.mktemp("shards"))).train,
        "arrays": arrays(64),
    }


def make(images: Images, recipe: str = "moco_v2_small", batch: int = 4, **options: Any) -> DaliLoader:
    loader = make_loader(images, aug.load(recipe), batch, Loading("dali", **options))
    assert isinstance(loader, DaliLoader)
    return loader


def equal(one: list[list[Tensor]], other: list[list[Tensor]]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True)
    )


@pytest.mark.parametrize("color", ["exact", "dali"])
@pytest.mark.parametrize("source", ["folder", "shards", "arrays"])
def test_resumes_at_any_batch(source: str, color: str, sources: dict[str, Images]) -> None:
    """50 cut points in three epochs: every following batch is the same, bit for bit."""
    images, cut = sources[source], random.Random(0)
    whole = make(images, color=color)
    epochs = [list(whole.batches(epoch)) for epoch in range(3)]
    assert len(whole) == 16
    assert not equal(epochs[0], epochs[1])
    cuts = 50 if color == "exact" else 5
    resumed = make(images, color=color)
    for _ in range(cuts):
        epoch, start = cut.randrange(3), cut.randrange(16)
        assert equal(list(resumed.batches(epoch, start)), epochs[epoch][start:])
    assert equal(list(make(images, color=color).batches(2, 5)), epochs[2][5:])


def test_threads_and_prefetch_change_nothing(sources: dict[str, Images]) -> None:
    one, other = (list(make(sources["folder"], workers=w, prefetch=p).batches(0)) for w, p in ((1, 1), (3, 4)))
    assert equal(one, other)
    assert not equal(one, list(make(sources["folder"], seed=1).batches(0)))


def test_ranks_see_other_images_and_draw_other_augmentations(sources: dict[str, Images]) -> None:
    same = ArrayImages(photographs(1).repeat(64, 1, 1, 1), None)
    one, other = (list(make(same, rank=rank, world=2).batches(0)) for rank in (0, 1))
    assert len(one) == len(other) == 8
    assert not any(torch.equal(a[0], b[0]) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("color", ["exact", "dali"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype, color: str, sources: dict[str, Images]) -> None:
    one, full = (next(make(sources["arrays"], color=color, dtype=d).batches(0))[0] for d in (dtype, torch.float32))
    assert one.dtype == dtype
    assert one.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(one, full.to(dtype))


@pytest.mark.parametrize("source", ["folder", "arrays"])
def test_evaluation_views_are_the_torchvision_loaders(source: str, sources: dict[str, Images]) -> None:
    view = aug.load("moco_v2_small").views[0].evaluation
    ours, theirs = (
        torch.cat(list(view_batches(sources[source], view, 10, Loading(kind, workers=0))))
        for kind in ("dali", "torchvision")
    )
    assert ours.shape == theirs.shape == (64, 3, 32, 32)
    assert (ours - theirs).abs().mean() < 0.01


def test_an_epoch_abandoned_leaves_nothing_behind(sources: dict[str, Images]) -> None:
    loader = make(sources["folder"], prefetch=3)
    expected_batches = list(loader.batches(1))
    for taken in range(4):
        batches = loader.batches(0)
        for _ in range(taken):
            next(batches)
        del batches
        gc.collect()
    assert equal(list(loader.batches(1)), expected_batches)


def test_one_iterator_at_a_time(sources: dict[str, Images]) -> None:
    for kind in ("dali", "torchvision"):
        loader = make_loader(sources["arrays"], aug.load("moco_v2_small"), 4, Loading(kind, workers=0))
        first = loader.batches(0)
        next(first)
        with pytest.raises(FastsslError, match="has not come to its end"):
            next(loader.batches(1))
        del first
        assert len(list(loader.batches(1))) == 16


@pytest.mark.parametrize("where", ["_colors", "_geometry", "_take"])
def test_an_interruption_leaves_nothing_behind(
    where: str, sources: dict[str, Images], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever half of a batch was in the pipeline must not come out first the next time."""
    loader = make(sources["folder"])
    expected_batches = list(loader.batches(1))
    method, calls = getattr(DaliLoader, where), 0

    def interrupted(self: DaliLoader, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 8:
            raise KeyboardInterrupt
        return method(self, *arguments)

    monkeypatch.setattr(DaliLoader, where, interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(loader.batches(0))
    assert calls == 8
    assert equal(list(loader.batches(1)), expected_batches)


def damage(images: Images, root: Path, number: int, how: Callable[[bytes], bytes]) -> Path:
    assert isinstance(images, FolderImages)
    path = images.paths[number]
    path.write_bytes(how(path.read_bytes()))
    return path


@pytest.fixture
def copied(tmp_path: Path) -> Iterator[Path]:
    yield save_jpegs(tmp_path / "copy", 40)


@pytest.mark.parametrize(
    "how",
    [
        lambda b: b[: len(b) // 2],
        lambda b: b[:40],
        lambda b: b"",
        lambda b: b"<html></html>",
        lambda b: b[:4] + bytes(200) + b[204:],
        lambda b: random.Random(0).randbytes(5000),
    ],
    ids=["truncated", "header", "empty", "html", "zeros", "random"],
)
def test_a_damaged_image_is_named(how: Callable[[bytes], bytes], copied: Path) -> None:
    images = open_source(str(copied)).train
    paths = [str(damage(images, copied, number, how)) for number in (3, 17)]
    loader, named = make(images, batch=8), set()
    for epoch in range(8):  # DALI's decoder used to crash, now and then, with others under way
        with pytest.raises(DataError) as error:
            list(loader.batches(epoch))
        named |= {path for path in paths if path in str(error.value)}
        assert named
        assert "python -m fastssl.data scan" in str(error.value)
    assert named == set(paths)
    save_jpegs(copied, 40)
    assert len(list(loader.batches(0))) == 5  # it goes on when they are repaired


def test_a_missing_image_is_named(copied: Path) -> None:
    images = open_source(str(copied)).train
    assert isinstance(images, FolderImages)
    gone = images.paths[5]
    gone.unlink()
    with pytest.raises(DataError, match=gone.name):
        list(make(images).batches(0))


def test_odd_images_are_read(tmp_path: Path) -> None:
    """Other formats, modes and sizes; EXIF turns nothing."""
    rgb = to_pil_image(photographs(1, 40)[0])
    exif = Image.Exif()
    exif[274] = 6
    rgb.save(tmp_path / "0.jpg", exif=exif)
    rgb.resize((1, 1)).save(tmp_path / "1.jpg")
    for number, (mode, suffix) in enumerate([("CMYK", "jpg"), ("L", "jpg"), ("RGBA", "png"), ("P", "png")], 2):
        rgb.convert(mode).save(tmp_path / f"{number}.{suffix}")
    for number, suffix in enumerate(["bmp", "webp", "tif", "ppm"], 6):
        rgb.save(tmp_path / f"{number}.{suffix}")
    images = open_source(str(tmp_path)).train
    view = View(32, (), **NEITHER)
    [ours] = view_batches(images, view, 16, EXACT)
    [theirs] = view_batches(images, view, 16, Loading("torchvision", workers=0))
    assert (ours - theirs).abs().flatten(1).mean(1).max() * 255 < 1


def test_what_dali_cannot_do_is_named() -> None:
    late = View(32, (Grayscale(), RandomResizedCrop()))
    twice = View(32, (RandomResizedCrop(), GaussianBlur(), GaussianBlur()))
    for view, match in ((late, "order the steps so, or use --loader torchvision"), (twice, "comes twice")):
        with pytest.raises(FastsslError, match=match):
            make_loader(arrays(4), aug.Augmentation((view,)), 2, EXACT)
    with pytest.raises(FastsslError, match="color must be one of exact, dali, got 'exakt'"):
        make(arrays(4), color="exakt")


@pytest.mark.parametrize("color", ["exact", "dali"])
@pytest.mark.parametrize("encoded", [True, False])
def test_the_gpu_graph(encoded: bool, color: str) -> None:
    """Without a GPU it is constructed, so DALI has checked its arguments; decoding and pixels are the GPU's."""
    views = (*aug.load("byol").views, View(96, (RandomResizedCrop((0.05, 0.14)), RandomShift(2), Grayscale())))
    pipeline = dali_graph.build(
        views, 8, encoded=encoded, color=color, on_gpu=True, device_id=None, threads=2, prefetch=3
    )
    assert len(pipeline.serialize()) > 1000
    devices: dict[str, set[str]] = {}
    for operator in pipeline._ops:
        found = re.search(r"OpSpec for (\w+).*?device: (\w+)", str(operator.spec), re.DOTALL)
        assert found
        devices.setdefault(found[1], set()).add(found[2])
    assert devices["Resize"] == devices["Slice"] == {"gpu"}
    assert devices["ExternalSource"] == {"cpu"}  # files, or pixels as 8 bits: they cross the bus once
    assert devices.get("decoders__Image") == ({"mixed"} if encoded else None)
    assert all("gpu" not in devices[name] for name in ("PeekImageShape", "_Shape") if name in devices)
    if color == "dali":
        assert all(devices[name] == {"gpu"} for name in ("ColorTwist", "GaussianBlur", "CropMirrorNormalize"))


@pytest.mark.slow  # a thousand images, and a pipeline is made anew for every batch with a damaged one
def test_training_on_a_thousand_damaged_files(tmp_path: Path) -> None:
    """No crash, no hang, and every batch either has all its images or names all that it lacks."""
    draws, good = random.Random(0), readable()
    for name, encoded in {**good, **unreadable()}.items():
        (tmp_path / name).write_bytes(encoded)
    for number in range(1000):
        name = draws.choice(sorted(good))
        encoded = good[name] if number % 3 else mutate(good[name], draws)
        (tmp_path / f"{number:04d}-{name}").write_bytes(encoded)
    (tmp_path / "dangling.png").symlink_to("nowhere")
    images = open_source(str(tmp_path)).train
    assert isinstance(images, FolderImages)
    order = Order(len(images), 8, last_batch="partial")
    loader = DaliLoader(images, (VIEWS["crop"],), order, EXACT)
    batches = [[images.name(i) for i in chosen.tolist()] for _, chosen in order.batches(0)]
    damaged = {
        images.name(index) for index in range(len(images)) if fault(images.name(index), partial(images.read, index))
    }
    whole = 0
    for start, names in enumerate(batches):
        expected_names = {name for name in names if name in damaged}
        one = loader.batches(0, start)
        try:
            [views] = next(one)
            # PIL is stricter with some damages; what DALI decodes all the same is trained on.
            assert len(views) == len(names)
            whole += 1
        except DataError as error:
            assert expected_names
            assert all(name in str(error) for name in expected_names)
        del one
    assert 10 < whole < len(batches) - 10
