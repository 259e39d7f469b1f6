"""Batches of views: the order of the images and every augmentation follow from the seed, the epoch and the batch alone.

So a resumed run sees what an uninterrupted one would have seen, and no loader has a state to save.
"""

import dataclasses
from collections.abc import Generator, Iterator
from importlib.util import find_spec
from typing import Protocol

from torch import Tensor

from fastssl.data.augmentation import Augmentation, View
from fastssl.data.loading import Loading
from fastssl.data.order import LAST_BATCHES, Order
from fastssl.data.remote_shards import RemoteShards
from fastssl.data.sources import ArrayImages, Images
from fastssl.data.torchvision_loader import TorchvisionLoader
from fastssl.errors import FastsslError

COLORS = ("exact", "dali")
INSTALL_DALI = "pip install 'fastssl[dali]' (CUDA 12) or 'fastssl[dali-cu13]' (CUDA 13)"


class Loader(Protocol):
    """What the trainer needs of any loader."""

    def __len__(self) -> int:
        """Batches an epoch."""

    def batches(self, epoch: int, start: int = 0) -> Generator[list[Tensor], None, None]:
        """The batches of an epoch from number `start` on; each a list of views, N×3×size×size, normalised."""

    @property
    def executor(self) -> dict[str, str]:
        """Who makes the views: another one would make other views from the same seed."""


def make_loader(images: Images, augmentation: Augmentation, batch_size: int, options: Loading | None = None) -> Loader:
    """Make a loader that shuffles the images anew every epoch.

    Args:
        images: in memory or on disk.
        augmentation: the views to make of each image; it is decoded once.
        batch_size: images a batch of this process.
        options: how; see `Loading`.

    Raises:
        FastsslError: fewer images than one batch; an unknown option; dali is asked for and not installed.
    """
    options = options or Loading()
    _check(options)
    total = batch_size * options.world
    if total > len(images) and options.last_batch == "drop":
        raise FastsslError(
            f"batch_size {total} is larger than the {len(images)} training images: "
            f"use --batch_size {len(images)} or less"
        )
    if isinstance(images, RemoteShards) and options.last_batch != "drop":
        raise FastsslError(f"last_batch must be drop for images on s3://, got {options.last_batch!r}")
    order = Order(
        len(images), batch_size, options.seed, options.rank, options.world, options.last_batch,
        shards=None if isinstance(images, ArrayImages) else images.groups,
    )  # fmt: skip
    return _make(images, augmentation.views, order, options)


def _check(options: Loading) -> None:
    if options.last_batch not in LAST_BATCHES:
        raise FastsslError(f"last_batch must be one of {', '.join(LAST_BATCHES)}, got {options.last_batch!r}")
    if options.last_batch == "partial" and options.world > 1:
        raise FastsslError("last_batch partial is for one process: among several some would get nothing")
    if options.color not in COLORS:
        raise FastsslError(f"color must be one of {', '.join(COLORS)}, got {options.color!r}")
    if options.color == "dali" and resolved(options.kind) != "dali":
        raise FastsslError(f"--color dali needs --loader dali, and DALI installed: {INSTALL_DALI}")


def view_batches(images: Images, view: View, batch_size: int, options: Loading) -> Iterator[Tensor]:
    """One view of every image, in order: for features, kNN and retrieval."""
    order = Order(len(images), batch_size, last_batch="partial", shuffle=False)
    loader = _make(images, (view,), order, dataclasses.replace(options, rank=0, world=1))
    for [views] in loader.batches(0):
        yield views


def resolved(kind: str) -> str:
    """The loader that `kind` means here: "dali" or "torchvision".

    Raises:
        FastsslError: `kind` is unknown, or dali is asked for and not installed.
    """
    if kind not in ("auto", "dali", "torchvision"):
        raise FastsslError(f"loader must be auto, dali or torchvision, got {kind!r}")
    installed = find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None
    if kind == "dali" and not installed:
        raise FastsslError(f"--loader dali needs NVIDIA DALI: {INSTALL_DALI}, or use --loader torchvision")
    if kind == "auto":
        return "dali" if installed else "torchvision"
    return kind


def _make(images: Images, views: tuple[View, ...], order: Order, options: Loading) -> Loader:
    if resolved(options.kind) == "torchvision":
        if isinstance(images, RemoteShards):
            raise FastsslError(f"images on s3:// need --loader dali, whose client reads them: {INSTALL_DALI}")
        return TorchvisionLoader(images, views, order, options)
    from fastssl.data.dali_loader import DaliLoader  # half a second, and not installed everywhere

    return DaliLoader(images, views, order, options)
