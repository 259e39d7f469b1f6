"""WebDataset shards on s3://, read in pieces while the training goes on: neither disk nor memory holds a whole one.

DALI's S3 client reads them: its WebDataset reader fetches any range that an index names, so a piece (some MB of
neighbouring images) is one request. The pieces of all shards are permuted every epoch, the images of a group of pieces
are mixed in memory, and the sequence that this gives is cut into one stretch a rank. All of it follows from
(seed, epoch, batch, rank, world) alone, so a run goes on anywhere by fetching the one group that it stands in.
"""

import hashlib
import re
import tarfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastssl.data import braces, s3, tar_index, wds_index
from fastssl.data.decode import EXTENSIONS
from fastssl.data.exclude import Exclusions
from fastssl.data.order import mixed_generator
from fastssl.data.s3 import Bytes
from fastssl.data.stored import names_digest
from fastssl.data.tar_index import BLOCK, Image
from fastssl.errors import DataError, FastsslError

Integers = npt.NDArray[np.int64]

PIECE = 2**23  # bytes of a request: latency hardly shows, and a broken one is soon repeated
GROUP = 64  # pieces whose images are mixed: 0.5 GB; the next group is fetched meanwhile, so a rank holds 1 GB


def expand(data: str) -> list[str]:
    """The shards that `data` names: s3://BUCKET/KEY with braces as in the shell, {000..255} and {a,b}; several by "::".

    Raises:
        FastsslError: it is no such name, has a wildcard, or names a shard twice.
    """
    paths: list[str] = []
    for pattern in data.split("::"):
        if not re.fullmatch(r"s3://[^/{}]+/.+\.tar", pattern):
            raise FastsslError(f"remote shards are named s3://BUCKET/PREFIX/train-{{000..255}}.tar, got '{pattern}'")
        if re.search(r"[*?\[\]]", pattern):
            raise FastsslError(f"'{pattern}' has a wildcard, and a store is not listed: write a range, {{000..255}}")
        if "#" in pattern:
            raise FastsslError(f"'{pattern}' has a #, behind which DALI would read nothing: rename the shards")
        expanded = braces.expand(pattern)
        if re.search("[{}]", expanded[0]):
            raise FastsslError(f"'{pattern}' has braces that are neither {{000..255}} nor {{a,b}}")
        paths += expanded
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise FastsslError(f"'{data}' names the shard '{twice}' more than once")
    return paths


@dataclass(frozen=True)
class _Piece:
    """Neighbouring images of one shard that are fetched together."""

    shard: str
    offsets: Integers  # of the images in the shard, ascending
    lengths: Integers
    members: bytes  # their names, joined by zeros: a list of them would take several times the memory

    @property
    def start(self) -> int:
        """Where the header of the first image lies: fetched too, so that a changed shard is noticed."""
        return int(self.offsets[0]) - BLOCK

    @property
    def length(self) -> int:
        return int(self.offsets[-1] + self.lengths[-1]) - self.start


@dataclass(frozen=True)
class RemoteImages:
    """A few images of shards on s3://, each fetched by itself: for evaluation."""

    places: tuple[tuple[str, str, int, int], ...]  # shard, member, offset, length
    labels = None
    classes: tuple[str, ...] = ()
    groups = None

    def __len__(self) -> int:
        return len(self.places)

    @property
    def digest(self) -> str:
        """Equal only if the images' names and order are."""
        return names_digest(map(self.name, range(len(self))))

    def name(self, index: int) -> str:
        """SHARD/MEMBER of image `index`."""
        return "/".join(self.places[index][:2])

    def read(self, index: int) -> bytes:
        """Image `index`, encoded.

        Raises:
            DataError: it cannot be read.
        """
        shard, _, offset, length = self.places[index]
        return bytes(s3.fetch(shard, offset, length))

    def subset(self, index: Tensor) -> "RemoteImages":
        """The images at `index`."""
        return RemoteImages(tuple(self.places[i] for i in index.tolist()))


class RemoteShards:
    """The images of shards on s3://, in an order that changes every epoch.

    Beside each shard `a.tar` its index `a.idx` (of `fastssl.data pack`, or of DALI's wds2idx) should lie. Without it
    the whole shard is fetched once, here, to find its images. Labels (`.cls`) are not read: a training needs none.

    Args:
        paths: of the shards.
        exclude: names to leave out, of images (SHARD/MEMBER) or shards.

    Raises:
        FastsslError: DALI is missing, or there are no images.
        DataError: a shard or an index cannot be read, or is damaged.
    """

    labels = None
    classes: tuple[str, ...] = ()
    groups = None  # it has an order of its own

    def __init__(self, paths: Sequence[str], exclude: Exclusions | frozenset[str] = frozenset()) -> None:
        paths = [path for path in paths if path not in exclude]

        def cut(path: str, images: list[Image] | None) -> list[_Piece] | None:
            """Here and not at the end: the lists of all shards at once would be large."""
            if images is None:
                return None
            return list(_cut(path, [image for image in images if f"{path}/{image[0]}" not in exclude]))

        with s3.closing(s3.Threads()) as threads:
            found = s3.gather(threads.map(lambda path: cut(path, _index_file(path)), paths))
        without = [number for number, pieces in enumerate(found) if pieces is None]
        if without:
            warnings.warn(
                f"{len(without)} of {len(paths)} shards have no index beside them, such as "
                f"'{wds_index.path_of(paths[without[0]])}': each is fetched whole now, and at every start. "
                "`python -m fastssl.data pack` and DALI's wds2idx write indexes: put them there",
                stacklevel=2,
            )
            with s3.closing(s3.Threads(2)) as threads:  # two shards at a time in memory
                futures = threads.map(lambda number: cut(paths[number], _index_shard(paths[number])), without)
                for number, pieces in zip(without, s3.gather(futures), strict=True):
                    found[number] = pieces
        self._pieces: list[_Piece] = [piece for pieces in found for piece in pieces]
        self._counts = np.array([len(piece.offsets) for piece in self._pieces], np.int64)
        if not len(self):
            raise FastsslError(f"no images in {len(paths)} shards: looked for {', '.join(EXTENSIONS)} in them")

    def __len__(self) -> int:
        return int(self._counts.sum())

    def subset(self, index: Tensor) -> RemoteImages:
        """The images at `index`, to be had one by one."""
        ends = np.cumsum(self._counts)
        places = []
        for i in index.tolist():
            number = int(np.searchsorted(ends, i, side="right"))
            piece, within = self._pieces[number], i - int(ends[number] - self._counts[number])
            member = piece.members.split(b"\0")[within].decode("utf-8", "surrogateescape")
            places.append((piece.shard, member, int(piece.offsets[within]), int(piece.lengths[within])))
        return RemoteImages(tuple(places))

    def name(self, index: int) -> str:
        """SHARD/MEMBER of image `index`."""
        return self.subset(torch.tensor([index])).name(0)

    def read(self, index: int) -> bytes:
        """Image `index`, encoded, fetched by itself.

        Raises:
            DataError: it cannot be read.
        """
        return self.subset(torch.tensor([index])).read(0)

    @property
    def digest(self) -> str:
        """Equal only if every (seed, epoch, batch) means the same images: names, places, and how they are mixed."""
        state = hashlib.blake2b(f"{GROUP}".encode(), digest_size=16)
        for piece in self._pieces:
            state.update(piece.shard.encode() + b"\0" + piece.members + b"\0\0")
            state.update(piece.offsets.tobytes() + piece.lengths.tobytes())
        return state.hexdigest()

    def batches(
        self, epoch: int, start: int = 0, *, batch_size: int, seed: int, rank: int = 0, world: int = 1
    ) -> Iterator[list[tuple[str, Bytes]]]:
        """One rank's batches of an epoch, len(self) // (batch_size × world), from number `start` on.

        Every image comes once among all ranks, except for the last ones that do not fill a batch of each. Closing the
        iterator ends its requests.

        Returns:
            An iterator over batches, each a list of (SHARD/MEMBER, the image's encoded bytes).

        Raises:
            FastsslError: an argument out of its range.
            DataError: (of the iterator) a piece cannot be read, or is not what its index says.
        """
        if batch_size < 1 or world < 1 or not 0 <= rank < world:
            raise FastsslError(
                f"batch_size and world must be at least 1 and rank below world, got {batch_size}, {world}, {rank}"
            )
        number = len(self) // (batch_size * world)
        if not number:
            raise FastsslError(f"{world} × batch_size {batch_size} is more than the {len(self):,} images: use less")
        if not 0 <= start <= number:
            raise FastsslError(f"start must be from 0 to the {number} batches of an epoch, got {start}")
        first = (rank * number + start) * batch_size
        return self._batches(first, (rank + 1) * number * batch_size, epoch, batch_size, seed)

    def _batches(
        self, first: int, last: int, epoch: int, batch_size: int, seed: int
    ) -> Iterator[list[tuple[str, Bytes]]]:
        """The images from `first` to below `last` of the epoch's sequence, in batches."""
        if first == last:
            return
        order = torch.randperm(len(self._pieces), generator=mixed_generator(seed, epoch, "pieces")).numpy()
        ends = np.cumsum(self._counts[order])[GROUP - 1 :: GROUP]
        if len(order) % GROUP:
            ends = np.append(ends, len(self))
        starts = np.insert(ends[:-1], 0, 0)
        begin, end = np.searchsorted(ends, [first, last - 1], side="right").tolist()
        groups = range(begin, end + 1)
        with s3.closing(s3.Threads()) as threads:

            def load(group: int) -> list["Future[Bytes]"]:
                return threads.map(_fetch_piece, [self._pieces[i] for i in order[group * GROUP : (group + 1) * GROUP]])

            batch: list[tuple[str, Bytes]] = []
            ahead = load(groups[0])
            for group in groups:
                pieces = [self._pieces[i] for i in order[group * GROUP : (group + 1) * GROUP]]
                images = [
                    image
                    for piece, data in zip(pieces, s3.gather(ahead), strict=True)
                    for image in _images(piece, data)
                ]
                ahead = load(group + 1) if group + 1 in groups else []
                mixed = torch.randperm(len(images), generator=mixed_generator(seed, epoch, "group", group)).tolist()
                for i in mixed[max(first - starts[group], 0) : last - starts[group]]:
                    name, data = images[i]
                    batch.append((name, data.copy()))  # a part of its piece would keep the whole of it
                    if len(batch) == batch_size:
                        yield batch
                        batch = []
                del images  # before the next but one begins to come


def _cut(shard: str, images: Iterable[Image]) -> Iterator[_Piece]:
    """Pieces of at most PIECE bytes, or one image."""
    ordered = sorted(images, key=lambda image: image[1])
    first = 0
    for last in range(1, len(ordered) + 1):
        if last == len(ordered) or ordered[last][1] + ordered[last][2] - ordered[first][1] + BLOCK > PIECE:
            members, offsets, lengths = zip(*ordered[first:last], strict=True)
            names = "\0".join(members).encode("utf-8", "surrogateescape")
            yield _Piece(shard, np.array(offsets, np.int64), np.array(lengths, np.int64), names)
            first = last


def _index_file(shard: str) -> list[Image] | None:
    """The images by the index beside the shard; None if there is none."""
    path = wds_index.path_of(shard)
    try:
        text = s3.fetch(path).tobytes()
    except s3.Absent:
        return None
    try:
        return wds_index.parse(text.decode("utf-8", "surrogateescape"))
    except ValueError as error:
        raise DataError(
            f"cannot use the index '{path}' ({error}): make it anew with DALI's wds2idx, or remove it"
        ) from None


def _index_shard(shard: str) -> list[Image]:
    """The images by the shard itself, fetched whole."""
    try:
        with s3.memory_file(s3.fetch(shard)) as path:
            index = tar_index.index(path)
    except s3.Absent as error:
        raise DataError(f"cannot read '{shard}' ({s3.why(shard) or error}): {s3.ACCESS}") from None
    except ValueError as error:
        if isinstance(error, FastsslError):
            raise
        raise DataError(f"cannot read '{shard}' ({error}): repair it, or leave it out with --exclude") from None
    return list(zip(index.members, index.offsets, index.lengths, strict=True))


def _fetch_piece(piece: _Piece) -> Bytes:
    try:
        data = s3.fetch(piece.shard, piece.start, piece.length)
    except s3.Absent as error:  # it was there: a store that is overloaded for a while looks the same
        raise s3.BrokeOff(f"cannot read '{piece.shard}' ({s3.why(piece.shard) or error}): {s3.ACCESS}") from None
    for name, image, header in _parts(piece, data):
        member = name[len(piece.shard) + 1 :]
        try:
            head = tarfile.TarInfo.frombuf(header.tobytes(), "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            head = tarfile.TarInfo()
        # A name that is long or not ASCII has a header of its own before this one, and here a makeshift.
        named = head.name == member or len(member) >= 100 or not member.isascii()
        if head.size != len(image) or not named:
            raise DataError(
                f"'{name}' is not where the index '{wds_index.path_of(piece.shard)}' says: the shard has been changed "
                "since, make the index anew with DALI's wds2idx"
            )
    return data


def _images(piece: _Piece, data: Bytes) -> Iterator[tuple[str, Bytes]]:
    return ((name, image) for name, image, _ in _parts(piece, data))


def _parts(piece: _Piece, data: Bytes) -> Iterator[tuple[str, Bytes, Bytes]]:
    """Name, image and tar header of each image of a piece."""
    members = piece.members.decode("utf-8", "surrogateescape").split("\0")
    for member, at, length in zip(members, (piece.offsets - piece.start).tolist(), piece.lengths.tolist(), strict=True):
        yield f"{piece.shard}/{member}", data[at : at + length], data[at - BLOCK : at]
