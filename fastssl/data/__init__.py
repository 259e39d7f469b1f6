"""Images and what is done to them: sources, augmentation recipes, and the loaders that execute them."""

import os

from fastssl.errors import FastsslError

NAMED = ("embedded", "cifar10", "cifar100")


def is_named(data: str) -> bool:
    """Whether `data` names a source ("cifar10", "cifar10:FOLDER") and not a folder of images."""
    return data.split(":")[0] in NAMED


def absolute(data: str) -> str:
    """`data` as it is understood from any folder; names stay."""
    if is_named(data) or "://" in data:
        return data
    if data in ("", "tfrecord:"):
        raise FastsslError(f"data is '{data}': name a folder or shards")
    prefix, path = ("tfrecord:", data[9:]) if data.startswith("tfrecord:") else ("", data)
    return prefix + os.path.abspath(path)
