"""Encoded images on disk, in files of their own or inside shards, behind one interface. Loads torch only for labels."""

import hashlib
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastssl.data import tfrecord
from fastssl.data.decode import ImageError

if TYPE_CHECKING:
    from torch import Tensor

OPEN_FILES = 128  # of the 1,024 that a process may usually have
RUN = 1024  # records that a thread reads the labels of at a time: a future for each record would take a GB
Integers = npt.NDArray[np.int64]


class Location(NamedTuple):
    """Where an encoded image lies."""

    path: str
    offset: int = 0
    length: int = -1  # -1: the whole file
    record: bool = False  # the bytes are a tf.train.Example with the image in it


class OpenFiles:
    """Reads from files and keeps the last ones open; for any number of threads, and forked processes too."""

    def __init__(self) -> None:
        # A descriptor is closed when nobody holds it any more: threads may still read from one that left the cache.
        self._open = lru_cache(OPEN_FILES)(_Descriptor)

    def __reduce__(self) -> Any:
        return OpenFiles, ()  # another process opens them itself

    def read(self, location: Location, name: str) -> bytes:
        """The encoded image at `location`.

        Raises:
            DataError: it cannot be read; the message names it.
        """
        try:
            if location.length < 0:
                return _whole(location.path)
            file = self._open(location.path)  # held by this name while it is read from
            data = os.pread(file.number, location.length, location.offset)
        except OSError as error:
            raise ImageError(name, error.strerror or str(error)) from None
        if len(data) < location.length:
            raise ImageError(name, f"its shard '{location.path}' has become shorter since it was opened")
        if not location.record:
            return data
        try:
            return tfrecord.image(data)
        except ValueError as error:
            raise ImageError(name, str(error)) from None


class _Descriptor:
    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


def _whole(path: str) -> bytes:
    """A whole file; a pipe or a device of that name is an error and not waited for."""
    with open(path, "rb", opener=lambda p, flags: os.open(p, flags | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError("it is not a regular file")
        return file.read()


class _Stored(ABC):
    """What all kinds of images on disk share: who knows a name and a location can read."""

    _files: OpenFiles

    @abstractmethod
    def __len__(self) -> int:
        """Images."""

    @abstractmethod
    def name(self, index: int) -> str:
        """By which people know image `index`."""

    @abstractmethod
    def location(self, index: int) -> Location:
        """Where image `index` lies."""

    @property
    def digest(self) -> str:
        """Equal only if the images' names and order are."""
        return names_digest(map(self.name, range(len(self))))

    def read(self, index: int) -> bytes:
        """Image `index`, encoded.

        Raises:
            DataError: the file, its shard or the record cannot be read.
        """
        return self._files.read(self.location(index), self.name(index))


@dataclass(frozen=True)
class FolderImages(_Stored):
    """Image files on disk, of any size."""

    paths: tuple[Path, ...]
    labels: "Tensor | None"  # N, int64
    classes: tuple[str, ...] = ()
    _files: OpenFiles = field(default_factory=OpenFiles, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def groups(self) -> "Tensor | None":
        """Files lie in no shards."""
        return None

    def name(self, index: int) -> str:
        """The path of image `index`."""
        return str(self.paths[index])

    def location(self, index: int) -> Location:
        """Where image `index` lies."""
        return Location(str(self.paths[index]))

    def subset(self, index: "Tensor") -> "FolderImages":
        """The images at `index`."""
        labels = None if self.labels is None else self.labels[index]
        return FolderImages(tuple(self.paths[i] for i in index.tolist()), labels, self.classes, self._files)


@dataclass(frozen=True)
class TarImages(_Stored):
    """Images in WebDataset shards, read where they lie."""

    shards: tuple[str, ...]
    places: Integers  # 3×N: number of the shard, offset, length
    members: Sequence[str]
    labels: "Tensor | None"  # N, int64
    classes: tuple[str, ...] = ()
    _files: OpenFiles = field(default_factory=OpenFiles, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.members)

    @property
    def groups(self) -> "Tensor":
        """In which shard each image lies: N, int64."""
        return _tensor(self.places[0])

    def name(self, index: int) -> str:
        """SHARD/MEMBER of image `index`."""
        return f"{self.shards[self.places[0, index]]}/{self.members[index]}"

    def location(self, index: int) -> Location:
        """Where image `index` lies."""
        shard, offset, length = self.places[:, index].tolist()
        return Location(self.shards[shard], offset, length)

    def subset(self, index: "Tensor") -> "TarImages":
        """The images at `index`."""
        labels = None if self.labels is None else self.labels[index]
        members = [self.members[i] for i in index.tolist()]
        return TarImages(self.shards, self.places[:, index.numpy()], members, labels, self.classes, self._files)


@dataclass(frozen=True)
class RecordImages(_Stored):
    """Images in TFRecord files, one tf.train.Example each."""

    shards: tuple[str, ...]
    places: Integers  # 4×N: number of the shard, offset, length, number of the record in its shard
    classes: tuple[str, ...] = ()
    _files: OpenFiles = field(default_factory=OpenFiles, repr=False, compare=False)

    def __len__(self) -> int:
        return self.places.shape[1]

    @property
    def groups(self) -> "Tensor":
        """In which shard each image lies: N, int64."""
        return _tensor(self.places[0])

    @cached_property
    def labels(self) -> "Tensor | None":
        """N, int64; None if the first record has none.

        A label lies beside its image in the record, so this reads all of them, once and only when somebody asks.

        Raises:
            DataError: a record cannot be read, or has no label though the first has one.
        """
        if not len(self) or self._label(0) is None:
            return None
        with ThreadPoolExecutor(16) as threads:  # it is the disk that is waited for
            parts = threads.map(self._labels, range(0, len(self), RUN))
            labels = [label for part in parts for label in part]
        for index, label in enumerate(labels):
            if label is None:
                raise ImageError(self.name(index), f"it has no {tfrecord.LABEL}, and others have")
        return _tensor(np.array(labels, np.int64))

    def _labels(self, first: int) -> list[int | None]:
        return [self._label(index) for index in range(first, min(first + RUN, len(self)))]

    def _label(self, index: int) -> int | None:
        record = self._files.read(self.location(index)._replace(record=False), self.name(index))
        try:
            return tfrecord.label(record)
        except ValueError as error:
            raise ImageError(self.name(index), str(error)) from None

    def name(self, index: int) -> str:
        """FILE#NUMBER of image `index`."""
        return f"{self.shards[self.places[0, index]]}#{self.places[3, index]}"

    def location(self, index: int) -> Location:
        """Where the record of image `index` lies."""
        shard, offset, length, _ = self.places[:, index].tolist()
        return Location(self.shards[shard], offset, length, record=True)

    def subset(self, index: "Tensor") -> "RecordImages":
        """The images at `index`."""
        part = RecordImages(self.shards, self.places[:, index.numpy()], self.classes, self._files)
        if (labels := self.__dict__.get("labels")) is not None:  # read already
            part.__dict__["labels"] = labels[index]
        return part


StoredImages = FolderImages | TarImages | RecordImages


def names_digest(names: Iterable[str]) -> str:
    """Equal only if the names and their order are; it is kept in checkpoints."""
    state = hashlib.blake2b(digest_size=16)
    for number, name in enumerate(names):
        state.update(("\n" + name if number else name).encode(errors="surrogateescape"))
    return state.hexdigest()


def _tensor(numbers: Integers) -> "Tensor":
    import torch

    return torch.from_numpy(np.ascontiguousarray(numbers))
