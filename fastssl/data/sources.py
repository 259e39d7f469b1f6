"""Where images come from: the embedded set, CIFAR, folders, shards. A source knows its images, nothing random."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastssl.data import is_named, shards
from fastssl.data.decode import EXTENSIONS, decode
from fastssl.data.exclude import Exclusions, Report, refuse
from fastssl.data.folder import find
from fastssl.data.remote_shards import RemoteImages, RemoteShards, expand
from fastssl.data.stored import FolderImages, RecordImages, StoredImages, TarImages
from fastssl.errors import FastsslError

__all__ = [
    "ArrayImages",
    "FolderImages",
    "Images",
    "RecordImages",
    "Source",
    "StoredImages",
    "TarImages",
    "in_memory",
    "is_remote",
    "load_image",
    "not_on_disk",
    "open_source",
    "open_stored",
]

KINDS = (
    "a folder of images or shards, shards (SHARD.tar, 'GLOB/*.tar', tfrecord:GLOB, s3://BUCKET/…), "
    "embedded, cifar10 or cifar100"
)
REMOTE_PREFIX = "s3://"
HASHED_TOGETHER = 1024  # images that may have to be copied for it
MEMORY_LIMIT = 2**30  # bytes of uint8 pixels that stored images of equal size may take to be held in memory


@dataclass(frozen=True)
class ArrayImages:
    """Images of one size in memory."""

    pixels: Tensor  # N×3×H×W, uint8; in memory usually a view of N×H×W×3
    labels: Tensor | None  # N, int64
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def groups(self) -> None:
        """They lie in no shards."""
        return None

    @property
    def digest(self) -> str:
        """Equal only if the pixels are, all of them: images in memory have no names."""
        state = hashlib.blake2b(f"{tuple(self.pixels.shape)}".encode(), digest_size=16)
        for some in self.pixels.permute(0, 2, 3, 1).split(HASHED_TOGETHER):
            state.update(some.contiguous().numpy())
        return state.hexdigest()

    def subset(self, index: Tensor) -> "ArrayImages":
        """The images at `index`."""
        return ArrayImages(self.pixels[index], None if self.labels is None else self.labels[index], self.classes)


Images = ArrayImages | StoredImages | RemoteShards | RemoteImages


@dataclass(frozen=True)
class Source:
    """Images to train on and, if there are any, images held out for evaluation."""

    name: str
    train: Images
    test: Images | None


def open_source(data: str, holdout: float = 0.0, seed: int = 0, exclude: Path | str | None = None) -> Source:
    """Open `data`: a name, a folder of images, or shards. Nothing is decoded.

    Args:
        data: "embedded", "cifar10", "cifar100" (optionally "cifar10:FOLDER"); a folder, see `open_stored`; a shard,
            "shards/*.tar", "shards/train-{000..099}.tar", "tfrecord:GLOB", "s3://BUCKET/train-{000..099}.tar".
        holdout: share of the images, 0…1, taken out of training for evaluation when the source has no such images.
        seed: of the choice of the images held out.
        exclude: a file with the names of images and shards to leave out, one a line.

    Raises:
        FastsslError: nothing there, nothing left, an unknown name, or a list of names that are not there.
        DataError: a shard or a folder cannot be read; a list given as `exclude` may leave it out.
    """
    if not 0 <= holdout < 1:
        raise FastsslError(f"holdout must be at least 0 and below 1, got {holdout}")
    if is_remote(data):
        if holdout:
            raise FastsslError("--holdout is not for s3://, which is read in long runs and not here and there")
        excluded = Exclusions(None if exclude is None else Path(exclude), "")
        source = Source(data, RemoteShards(expand(data), excluded), None)
        excluded.check(data)
        return source
    if is_named(data):
        if exclude is not None:
            raise FastsslError(f"--exclude is for folders and shards of images, and the data are {data}")
        source = embedded() if data == "embedded" else cifar(*data.split(":", 1))
    else:
        source = _stored_source(data, None if exclude is None else Path(exclude))
    if source.test is None and holdout:
        source = _hold_out(source, holdout, seed)
    return source


def _stored_source(data: str, exclude: Path | None) -> Source:
    excluded = Exclusions(exclude, root_of(data))
    train, test = open_stored(data, excluded, refuse)
    excluded.check(data)
    for images in (train, test):
        if images is not None and not len(images):
            raise FastsslError(
                f"'{exclude}' leaves no images of '{data}'"
                if exclude
                else f"no images in '{data}': looked for {', '.join(EXTENSIONS)}, sub-folders and shards too"
            )
    if test is not None and test.classes != train.classes:
        raise FastsslError(f"the two parts of '{data}', train and val or test, need the same class folders, and differ")
    return Source(data, train, test)


def open_stored(data: str, excluded: Exclusions, report: Report) -> tuple[StoredImages, StoredImages | None]:
    """The images to train on, and those held out if there are any; either may be empty.

    A folder may hold `train` and `val` (or `test`), each with images or shards; or shards and no images (if their
    names begin with train and val or test, they are told apart by that); or sub-folders by class; or images
    without labels.

    Args:
        data: a folder or shards.
        excluded: what to leave out.
        report: gets what cannot be read, without decoding anything.
    """
    found = shards.named(data)
    if found is None:
        records = data.startswith(shards.RECORD_PREFIX)
        root = Path(data.removeprefix(shards.RECORD_PREFIX))
        if not root.exists():
            raise FastsslError(f"there is no folder '{root}': data is {KINDS}")
        if not root.is_dir():
            raise FastsslError(f"'{root}' is a file: data is {KINDS}")
        for name in ("val", "test"):
            if (root / "train").is_dir() and (root / name).is_dir():
                train, test = (_part(root / n, records, excluded, report) for n in ("train", name))
                return train, test
        if (root / "train").is_dir():
            return _part(root / "train", records, excluded, report), None
        found = _shards_instead_of_images(root, records)
    if found:
        train_shards, test_shards = shards.split(found)
        train = shards.read(train_shards, excluded, report)
        return train, shards.read(test_shards, excluded, report) if test_shards else None
    return find(root, excluded, report), None


def _part(root: Path, records: bool, excluded: Exclusions, report: Report) -> StoredImages:
    """All that lies in a folder `train`, `val` or `test`."""
    if found := _shards_instead_of_images(root, records):
        return shards.read(found, excluded, report)
    return find(root, excluded, report)


def _shards_instead_of_images(root: Path, records: bool) -> shards.Shards:
    """The shards in a folder unless images lie in it too: those may be what an archive beside them was unpacked to."""
    found = shards.within(root, records)
    return found if found and (records or not len(find(root, Exclusions(), lambda name, reason: None))) else []


def not_on_disk(command: str, data: str) -> FastsslError:
    """The error of a command that is for images on disk, and got others."""
    if is_remote(data):
        return FastsslError(f"{command} works on local data: download the shards of '{data}' first")
    return FastsslError(f"{command} is for folders and shards of images, and {data} lies in memory")


def is_remote(data: str) -> bool:
    """Whether `data` names shards that are fetched."""
    return data.startswith(REMOTE_PREFIX)


def root_of(data: str) -> str:
    """The folder that names in a list of exclusions may be relative to."""
    data = data.removeprefix(shards.RECORD_PREFIX)
    return data if os.path.isdir(data) else os.path.dirname(data)


def embedded() -> Source:
    """10,000 images of Fashion-MNIST (arXiv:1708.07747), 8,000 to train and 2,000 to test, padded to 32×32 RGB."""
    root = Path(__file__).parent / "embedded"
    return Source("embedded", _sheets(root / "train"), _sheets(root / "test"))


def _sheets(root: Path, side: int = 28) -> ArrayImages:
    paths = sorted(root.glob("*.png"))
    images = []
    for path in paths:
        sheet = torch.from_numpy(np.array(Image.open(path)))
        tiles = sheet.view(sheet.shape[0] // side, side, sheet.shape[1] // side, side).transpose(1, 2)
        images.append(tiles.reshape(-1, side, side))
    pixels = torch.nn.functional.pad(torch.cat(images), (2, 2, 2, 2)).unsqueeze(1).expand(-1, 3, -1, -1).contiguous()
    labels = torch.cat([torch.full((len(tiles),), label) for label, tiles in enumerate(images)])
    return ArrayImages(pixels, labels, tuple(path.stem.split("-", 1)[1] for path in paths))


def cifar(name: str, root: str = "") -> Source:
    """CIFAR-10 or CIFAR-100 through torchvision, downloaded to `root` (default ~/.cache/fastssl) if absent."""
    from torchvision import datasets

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    folder = Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fastssl"
    splits = []
    for train in (True, False):
        try:
            split = kind(folder, train=train, download=True)
        except (OSError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise FastsslError(
                f"cannot download {name} to {folder} ({reason}): put torchvision's files there by hand, "
                f"or name their folder: --data {name}:FOLDER"
            ) from None
        pixels = torch.from_numpy(split.data).permute(0, 3, 1, 2)
        splits.append(ArrayImages(pixels, torch.tensor(split.targets), tuple(split.classes)))
    return Source(name, *splits)


def load_image(images: Images, index: int) -> Image.Image:
    """Image `index` in RGB.

    Raises:
        DataError: it cannot be read or decoded; the message names it.
    """
    if isinstance(images, ArrayImages):
        return Image.fromarray(images.pixels[index].permute(1, 2, 0).numpy())
    return decode(images.read(index), images.name(index))


def in_memory(images: Images) -> Images:
    """Hold stored images of equal size in memory if it fits below MEMORY_LIMIT; else leave it on disk.

    Looks at one image after another and stops at the first of another size, so large sets cost nothing.

    Raises:
        FastsslError: an image cannot be read.
    """
    if isinstance(images, (ArrayImages, RemoteShards, RemoteImages)):
        return images
    width, height = load_image(images, 0).size
    if 3 * width * height * len(images) > MEMORY_LIMIT:
        return images
    pixels = np.empty((len(images), height, width, 3), np.uint8)
    for index in range(len(images)):
        image = load_image(images, index)
        if image.size != (width, height):
            return images
        pixels[index] = np.asarray(image)
    # A view: loaders want N×H×W×3, as it lies here, and a copy would take as much memory again.
    return ArrayImages(torch.from_numpy(pixels).permute(0, 3, 1, 2), images.labels, images.classes)


def _hold_out(source: Source, share: float, seed: int) -> Source:
    order = torch.randperm(len(source.train), generator=torch.Generator().manual_seed(seed))
    count = max(1, round(share * len(order)))
    if count >= len(order):
        raise FastsslError(f"holding out {share:g} of {len(order)} images leaves none to train on")
    train, test = source.train.subset(order[count:].sort().values), source.train.subset(order[:count].sort().values)
    return Source(source.name, train, test)
