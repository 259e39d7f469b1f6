"""Where images come from: the embedded set, CIFAR, a folder. A source knows its images and labels, nothing random."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from fastssl.data import is_named
from fastssl.errors import DataError, FastsslError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
MEMORY_LIMIT = 2**30  # bytes of uint8 pixels that a folder of equal-sized images may take to be held in memory


@dataclass(frozen=True)
class ArrayImages:
    """Images of one size in memory."""

    pixels: Tensor  # N×3×H×W, uint8
    labels: Tensor | None  # N, int64
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.pixels)

    def subset(self, index: Tensor) -> "ArrayImages":
        """The images at `index`."""
        return ArrayImages(self.pixels[index], None if self.labels is None else self.labels[index], self.classes)


@dataclass(frozen=True)
class FolderImages:
    """Image files on disk, of any size."""

    paths: tuple[Path, ...]
    labels: Tensor | None
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.paths)

    def subset(self, index: Tensor) -> "FolderImages":
        """The images at `index`."""
        labels = None if self.labels is None else self.labels[index]
        return FolderImages(tuple(self.paths[i] for i in index.tolist()), labels, self.classes)


Images = ArrayImages | FolderImages


@dataclass(frozen=True)
class Source:
    """Images to train on and, if there are any, images held out for evaluation."""

    name: str
    train: Images
    test: Images | None


def open_source(data: str, holdout: float = 0.0, seed: int = 0) -> Source:
    """Open `data`: "embedded", "cifar10", "cifar100" (optionally "cifar10:FOLDER"), or a folder of images.

    Args:
        data: the name or the folder. A folder may hold `train` and `val` (or `test`), or sub-folders by class,
            or images without labels.
        holdout: share of the images, 0…1, taken out of training for evaluation when the source has no such images.
        seed: of the choice of the images held out.

    Raises:
        FastsslError: nothing there, nothing readable, or an unknown name.
    """
    if not 0 <= holdout < 1:
        raise FastsslError(f"holdout must be at least 0 and below 1, got {holdout}")
    if data == "embedded":
        source = embedded()
    elif is_named(data):
        source = cifar(*data.split(":", 1))
    else:
        source = folder(Path(data))
    if source.test is None and holdout:
        source = _hold_out(source, holdout, seed)
    return source


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
        pixels = torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous()
        splits.append(ArrayImages(pixels, torch.tensor(split.targets), tuple(split.classes)))
    return Source(name, *splits)


def folder(root: Path) -> Source:
    """A folder of images: with `train` and `val`/`test` folders, sub-folders by class, or flat and unlabelled."""
    if not root.exists():
        raise FastsslError(f"there is no folder '{root}': data is a folder of images, embedded, cifar10 or cifar100")
    if not root.is_dir():
        raise FastsslError(f"'{root}' is a file: data is a folder of images, embedded, cifar10 or cifar100")
    if not (root / "train").is_dir():
        return Source(str(root), _scan(root), None)
    train = _scan(root / "train")
    for name in ("val", "test"):
        if (root / name).is_dir():
            test = _scan(root / name)
            if test.classes != train.classes:
                raise FastsslError(f"'{root}/train' and '{root}/{name}' need the same class folders, and differ")
            return Source(str(root), train, test)
    return Source(str(root), train, None)


def _scan(root: Path) -> FolderImages:
    """Find the images below `root`; sub-folders of the first level that hold images are the classes."""
    files, seen = [], set()
    for folder, folders, names in os.walk(root, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:  # a link back up, or twice to the same folder
            folders.clear()
            continue
        seen.add(real)
        files += [Path(folder) / n for n in names if n.lower().endswith(EXTENSIONS) and not n.startswith(".")]
    files.sort()
    if not files:
        raise FastsslError(f"no images in '{root}': looked for {', '.join(EXTENSIONS)} in it and its sub-folders")
    parts = [path.relative_to(root).parts for path in files]
    if any(len(p) == 1 for p in parts):  # some images lie directly in the folder: unlabelled
        return FolderImages(tuple(files), None)
    classes = tuple(sorted({p[0] for p in parts}))
    index = {name: label for label, name in enumerate(classes)}
    return FolderImages(tuple(files), torch.tensor([index[p[0]] for p in parts]), classes)


def read_image(path: Path) -> Image.Image:
    """Decode one image file to RGB.

    Raises:
        DataError: the file cannot be decoded; the message names it.
    """
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I;16"):  # PIL would clip 16 bits to white
                return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"cannot read the image '{path}' ({reason}): repair it or remove it") from None


def in_memory(images: Images) -> Images:
    """Hold a folder of equal-sized images in memory if it fits below MEMORY_LIMIT; else leave it on disk.

    Looks at one image after another and stops at the first of another size, so large folders cost nothing.

    Raises:
        FastsslError: an image cannot be read.
    """
    if isinstance(images, ArrayImages):
        return images
    with_first = read_image(images.paths[0])
    width, height = with_first.size
    if 3 * width * height * len(images) > MEMORY_LIMIT:
        return images
    pixels = np.empty((len(images), height, width, 3), np.uint8)
    for index, path in enumerate(images.paths):
        image = read_image(path)
        if image.size != (width, height):
            return images
        pixels[index] = np.asarray(image)
    return ArrayImages(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), images.labels, images.classes)


def _hold_out(source: Source, share: float, seed: int) -> Source:
    order = torch.randperm(len(source.train), generator=torch.Generator().manual_seed(seed))
    count = max(1, round(share * len(order)))
    if count >= len(order):
        raise FastsslError(f"holding out {share:g} of {len(order)} images leaves none to train on")
    train, test = source.train.subset(order[count:].sort().values), source.train.subset(order[:count].sort().values)
    return Source(source.name, train, test)
