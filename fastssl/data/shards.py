"""Finds shards (WebDataset tars, TFRecord files) and indexes them without unpacking."""

import glob
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from fastssl.data import braces, tar_index, tfrecord
from fastssl.data.exclude import Exclusions, Report
from fastssl.data.stored import RecordImages, TarImages
from fastssl.errors import FastsslError

TAR, RECORD = (".tar",), (".tfrecord", ".tfrecords")
RECORD_PREFIX = "tfrecord:"  # for names such as train-00000-of-01024
NUMBERED = re.compile(r"-\d+-of-\d+$")
PACKING = ".packing"  # the folder in which `pack` works
CLASSES = "classes.txt"
EVALUATION = ("val", "test")  # how the names of shards begin that are not for training; "validation" does too

Shards = list[str]


def named(data: str) -> Shards | None:
    """The shards that `data` names: one, a glob, a brace range, or tfrecord:GLOB. None: it names none.

    Raises:
        FastsslError: a pattern that no file has, or a file missing from a brace range.
    """
    pattern = data.removeprefix(RECORD_PREFIX)
    if os.path.isdir(pattern):
        return None
    if os.path.isfile(pattern):
        return [pattern] if pattern != data or pattern.endswith(TAR + RECORD) else None
    if pattern == data and not pattern.endswith(TAR + RECORD) and not re.search(r"[*?\[{]", pattern):
        return None
    found: Shards = []
    for expanded in braces.expand(pattern):
        files = [expanded] if os.path.isfile(expanded) else sorted(filter(os.path.isfile, glob.glob(expanded)))
        if not files:
            raise FastsslError(f"there is no shard '{expanded}'" + (f", of '{data}'" if expanded != data else ""))
        found += [file for file in files if not file.endswith(".tmp")]
    return list(dict.fromkeys(found))


def within(folder: Path, records: bool = False) -> Shards:
    """The shards that lie directly in a folder; with `records` also names such as train-00000-of-01024."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise FastsslError(f"cannot list the folder '{folder}' ({error.strerror})") from None
    if PACKING in names:
        raise FastsslError(
            f"'{folder}' is half packed: wait for `python -m fastssl.data pack`, or, if it was killed, remove "
            f"'{folder / PACKING}' and pack again"
        )
    ours = [n for n in names if n.endswith(TAR + RECORD) or (records and NUMBERED.search(n))]
    return [str(folder / name) for name in ours if not name.startswith(".") and (folder / name).is_file()]


def split(shards: Shards) -> tuple[Shards, Shards]:
    """Shards to train on and those to evaluate on, if all their names begin with train, and val or test."""
    train = [s for s in shards if os.path.basename(s).startswith("train")]
    evaluation = [s for s in shards if os.path.basename(s).startswith(EVALUATION)]
    if train and evaluation and len(train) + len(evaluation) == len(shards):
        return train, evaluation
    return shards, []


def read(shards: Shards, excluded: Exclusions, report: Report) -> TarImages | RecordImages:
    """Index shards of one kind, several at a time.

    Args:
        shards: all tars, or all TFRecord files.
        excluded: shards and images to leave out.
        report: gets the shards that cannot be read and why; they are left out.

    Raises:
        FastsslError: shards of both kinds.
    """
    tars = [shard for shard in shards if shard.endswith(TAR)]
    if 0 < len(tars) < len(shards):
        raise FastsslError(f"'{tars[0]}' lies among TFRecord files: give one kind of shards")
    shards = [shard for shard in shards if shard not in excluded]
    index = _tar if tars else _records

    def attempt(shard: str) -> "_Part | str":
        try:
            return index(shard)
        except OSError as error:
            return error.strerror or str(error)
        except ValueError as error:
            return str(error)

    with ThreadPoolExecutor(16) as threads:  # on a network's disk it is waiting that takes the time
        parts = []
        for shard, part in zip(shards, threads.map(attempt, shards), strict=True):
            if isinstance(part, str):
                report(shard, part)
            else:
                parts.append(_without(excluded, shard, part))
    places = np.concatenate([_numbered(i, part) for i, part in enumerate(parts)] or [np.zeros((4, 0), np.int64)], 1)
    kept = tuple(part.shard for part in parts)
    classes = _classes(shards)
    if not tars:
        return RecordImages(kept, places, classes)
    members = [member for part in parts for member in part.members]
    labels = [label for part in parts for label in part.labels]
    return TarImages(kept, places[:3], members, _labels(labels, classes, shards), classes)


class _Part:
    """The images of one shard."""

    def __init__(
        self, shard: str, offsets: Sequence[int], lengths: Sequence[int], members: list[str], labels: list[int | None]
    ) -> None:
        self.shard, self.members, self.labels = shard, members, labels
        self.places = np.array([offsets, lengths, range(len(offsets))], np.int64).reshape(3, -1)

    def take(self, kept: list[int]) -> "_Part":
        """Only the images `kept`."""
        members, labels = ([values[i] for i in kept] if values else [] for values in (self.members, self.labels))
        part = _Part(self.shard, [], [], members, labels)  # type: ignore[arg-type]
        part.places = self.places[:, kept]
        return part


def _tar(shard: str) -> _Part:
    found = tar_index.index(shard)
    return _Part(shard, found.offsets, found.lengths, found.members, found.labels)


def _records(shard: str) -> _Part:
    return _Part(shard, *tfrecord.index(shard), [], [])


def _without(excluded: Exclusions, shard: str, part: _Part) -> _Part:
    if not excluded:
        return part
    count = part.places.shape[1]
    names = [f"{shard}/{m}" for m in part.members] or [f"{shard}#{i}" for i in range(count)]
    kept = [i for i in range(count) if names[i] not in excluded]
    return part if len(kept) == count else part.take(kept)


def _numbered(number: int, part: _Part) -> "np.ndarray[tuple[int, int], np.dtype[np.int64]]":
    """Number of the shard, offset, length, number in the shard."""
    return np.concatenate([np.full((1, part.places.shape[1]), number, np.int64), part.places])


def _classes(shards: Shards) -> tuple[str, ...]:
    """The names of the classes, where `pack` or somebody else put them beside the shards."""
    path = Path(shards[0]).parent / CLASSES if shards else None
    if path is None or not path.is_file():
        return ()
    try:
        return tuple(path.read_text("utf-8", "surrogateescape").splitlines())
    except OSError as error:
        raise FastsslError(f"cannot read the names of the classes in '{path}' ({error.strerror})") from None


def _labels(labels: list[int | None], classes: tuple[str, ...], shards: Shards) -> torch.Tensor | None:
    """None unless every image has a label."""
    known = [label for label in labels if label is not None]
    if not known or len(known) < len(labels):
        return None
    if classes and max(known) >= len(classes):
        raise FastsslError(
            f"the shards beside '{shards[0]}' have an image of class {max(known)}, and {CLASSES} there names only "
            f"{len(classes)}: classes count from 0"
        )
    return torch.tensor(known, dtype=torch.int64)
