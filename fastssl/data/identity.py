"""What a place in the data means: which images there are, and which views are made of them."""

import hashlib

import torch

from fastssl.data.augmentation import Augmentation
from fastssl.data.remote_shards import RemoteShards
from fastssl.data.sources import ArrayImages, Images

PIXELS_HASHED = 256  # images in memory that stand for all: they have no names


def identity(images: Images, augmentation: Augmentation) -> dict[str, int | str]:
    """Plain values that are equal only if the images and the recipe are: for the checkpoint.

    A place such as "epoch 3, batch 17" means the same views only as long as they are.
    """
    return {"images": len(images), "names": _names(images), "views": _digest(repr(augmentation.views).encode())}


def _names(images: Images) -> str:
    if isinstance(images, RemoteShards):
        return images.digest
    if isinstance(images, ArrayImages):
        chosen = torch.linspace(0, len(images) - 1, min(PIXELS_HASHED, len(images))).long()
        return _digest(images.pixels[chosen].numpy().tobytes())
    return _digest("\n".join(images.name(index) for index in range(len(images))).encode(errors="surrogateescape"))


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
