"""Makes the contact sheets beside this file from the original Fashion-MNIST files.

    apt-get download dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist_*.deb unpacked
    python -m fastssl.data.embedded.build unpacked/usr/share/datasets/fashion-mnist

The first 800 images of every class in the training file and the first 200 in the test file, in file order, as
sheets of 40 images a row. Lossless, so anybody can rebuild them and compare.
"""

import argparse
import gzip
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot")
SIDE = 28  # pixels of one image in a sheet
COLUMNS = 40
COUNTS = {"train": ("train", 800), "test": ("t10k", 200)}


def read_idx(path: Path) -> np.ndarray:
    """Read a gzipped IDX file of unsigned bytes (http://yann.lecun.com/exdb/mnist)."""
    raw = gzip.decompress(path.read_bytes())
    dims = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(raw[3])]
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * len(dims)).reshape(dims)


def sheet(images: np.ndarray) -> np.ndarray:
    """Lay M images of SIDE x SIDE out in rows of COLUMNS."""
    rows = len(images) // COLUMNS
    return images.reshape(rows, COLUMNS, SIDE, SIDE).swapaxes(1, 2).reshape(rows * SIDE, COLUMNS * SIDE)


def build(source: Path, target: Path) -> None:
    """Write target/<split>/<index>-<class>.png for every split and class."""
    for split, (prefix, count) in COUNTS.items():
        images = read_idx(source / f"{prefix}-images-idx3-ubyte.gz")
        labels = read_idx(source / f"{prefix}-labels-idx1-ubyte.gz")
        (target / split).mkdir(parents=True, exist_ok=True)
        for index, name in enumerate(CLASSES):
            chosen = images[labels == index][:count]
            Image.fromarray(sheet(chosen)).save(target / split / f"{index}-{name}.png", optimize=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder with the four .gz files")
    parser.add_argument("--target", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args()
    build(arguments.source, arguments.target)
