"""Packs a folder of images into WebDataset shards.

The images are shuffled once, here: a training reads each shard in long runs, because that is what disks and networks
do fast, so neighbours in a shard come into neighbouring batches; classes packed in order would come class by class.
"""

import errno
import io
import os
import re
import shutil
import tarfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import torch

from fastssl.data import shards, wds_index
from fastssl.data.decode import EXTENSIONS, ImageError
from fastssl.data.sources import Source, not_on_disk
from fastssl.data.stored import StoredImages
from fastssl.errors import FastsslError
from fastssl.files import atomic_write, write_text

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Shard:
    """One shard to write."""

    name: str
    images: StoredImages
    index: list[int]  # of its images
    first: int  # the number of its first sample in its split


def size(text: str) -> int:
    """Bytes, from "256MB" and the like.

    Raises:
        FastsslError: it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]I?B)?", text.strip().upper())
    if not match or not float(match[1]):
        raise FastsslError(f"shard_size must be a size such as 256MB or 1GiB, got '{text}'")
    return max(1, int(float(match[1]) * UNITS[match[2] or ""]))


def plan(source: Source, shard_bytes: int | None, images_per_shard: int | None, seed: int) -> tuple[list[Shard], int]:
    """Which image goes into which shard, and the bytes of all.

    Raises:
        DataError: an image file is not there any more.
    """
    planned, total = [], 0
    for split, images in (("train", source.train), ("val", source.test)):
        if images is None:
            continue
        if not isinstance(images, StoredImages):
            raise not_on_disk("pack", source.name)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).tolist()
        parts, current, filled = [], list[int](), tarfile.RECORDSIZE  # a tar's end is padded to that
        for index in order:
            taken = _bytes(images, index)
            full = shard_bytes is not None and filled + taken > shard_bytes
            if current and (full or len(current) == images_per_shard):
                parts.append(current)
                current, filled = [], tarfile.RECORDSIZE
            current.append(index)
            filled, total = filled + taken, total + taken
        parts.append(current)
        first = 0
        for number, part in enumerate(parts):
            planned.append(Shard(f"{split}-{number:06d}.tar", images, part, first))
            first += len(part)
    return planned, total


def pack(
    source: Source,
    out: Path,
    *,
    shard_bytes: int | None = None,
    images_per_shard: int | None = None,
    workers: int = 4,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, all: None,
) -> int:
    """Write the images of `source`, their bytes unchanged, to shards.

    They are OUT/train-000000.tar … and, if some are held out, OUT/val-000000.tar …, each with an index .idx beside it.
    All shards are written to a folder within OUT first and moved at the end: what is interrupted leaves none.

    Args:
        source: images on disk.
        out: a folder without shards; made if it is not there.
        shard_bytes: most bytes of a shard; one image may be more.
        images_per_shard: most images of a shard.
        workers: shards written at a time, each by a thread.
        seed: of the order.
        progress: gets how many images were written, and how many there are.

    Returns:
        The number of shards.

    Raises:
        FastsslError: `out` has shards already, or the disk is full.
        DataError: an image cannot be read.
    """
    if not 0 <= seed < 2**63:
        raise FastsslError(f"seed must lie in 0…2^63-1, got {seed}")
    planned, total = plan(source, shard_bytes, images_per_shard, seed)
    out.mkdir(parents=True, exist_ok=True)
    if found := shards.within(out, records=True):
        raise FastsslError(f"'{out}' has shards already, such as '{found[0]}': give another folder, or remove them")
    if total > shutil.disk_usage(out).free:
        raise _full(out, total)
    work = out / shards.PACKING
    work.mkdir()
    names: list[str] = []
    try:
        _write_all(planned, work, workers, progress)
        if source.train.classes:
            write_text(work / shards.CLASSES, "".join(f"{name}\n" for name in source.train.classes))
        names = sorted(os.listdir(work))
        for name in names:
            os.replace(work / name, out / name)
        work.rmdir()
    except BaseException as error:
        # What has been moved goes first and the mark last: interrupted even here, it is not taken for a whole.
        for name in names:
            if not (work / name).exists():
                (out / name).unlink(missing_ok=True)
        shutil.rmtree(work, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _full(out, total) from None
        raise
    return len(planned)


def _write_all(planned: list[Shard], work: Path, workers: int, progress: Callable[[int, int], None]) -> None:
    count, done, stop, lock = sum(len(shard.index) for shard in planned), 0, threading.Event(), threading.Lock()

    def written() -> None:
        nonlocal done
        with lock:
            done += 1
            progress(done, count)
        if stop.is_set():
            raise InterruptedError

    progress(0, count)
    with ThreadPoolExecutor(workers) as threads:
        futures = [threads.submit(_write, shard, work / shard.name, written) for shard in planned]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            stop.set()
            threads.shutdown(cancel_futures=True)
            raise


def _write(shard: Shard, path: Path, written: Callable[[], None]) -> None:
    images = shard.images
    samples: list[list[str]] = []
    with atomic_write(path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number, index in enumerate(shard.index, shard.first):
            encoded = images.read(index)
            members = [_add(tar, f"{number:08d}{_extension(images.name(index), encoded)}", encoded)]
            if images.labels is not None:
                members.append(_add(tar, f"{number:08d}.cls", str(int(images.labels[index])).encode()))
            samples.append(members)
            written()
    write_text(Path(wds_index.path_of(str(path))), wds_index.text(samples))


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> str:
    """Add a file; returns its entry in the index."""
    info = tarfile.TarInfo(name)  # of no owner and no time: the same images and seed give the same bytes
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))
    return wds_index.entry(name, tar.offset - -(-len(content) // 512) * 512, len(content))


def _bytes(images: StoredImages, index: int) -> int:
    """What an image and its label take in a tar."""
    location = images.location(index)
    try:
        length = os.stat(location.path).st_size if location.length < 0 else location.length
    except OSError as error:
        raise ImageError(images.name(index), error.strerror or str(error)) from None
    return 512 + -(-length // 512) * 512 + 1024 * (images.labels is not None)


def _extension(name: str, encoded: bytes) -> str:
    """Of the image's name; a TFRecord's images have none and are told by their first bytes."""
    extension = os.path.splitext(name)[1].lower()
    if extension in EXTENSIONS:
        return extension
    return ".png" if encoded.startswith(b"\x89PNG") else ".jpg"


def _full(out: Path, total: int) -> FastsslError:
    return FastsslError(f"no space for the shards in '{out}': they take {total / 1e9:,.3f} GB, and nothing was kept")
