"""WebDataset shards on s3://, read in pieces while the training goes on: neither disk nor memory holds a whole one.

DALI's S3 client reads them: its WebDataset reader fetches any range that an index names, so a piece (some MB of
neighbouring images) is one request. The pieces of all shards are permuted every epoch, the images of a group of pieces
are mixed in memory, and the sequence that this gives is cut into one stretch a rank. All of it follows from
(seed, epoch, batch, rank, world) alone, so a run goes on anywhere by fetching the one group that it stands in.
"""

import hashlib
import itertools
import os
import re
import tarfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastssl.data import tar_index
from fastssl.data.decode import EXTENSIONS
from fastssl.data.exclude import Exclusions
from fastssl.data.order import mixed_generator
from fastssl.errors import DataError, FastsslError

Bytes = npt.NDArray[np.uint8]
Integers = npt.NDArray[np.int64]

PIECE = 2**23  # bytes of a request: latency hardly shows, and a broken one is soon repeated
GROUP = 64  # pieces whose images are mixed: 0.5 GB; the next group is fetched meanwhile, so a rank holds 1 GB
THREADS = 8  # requests at a time
ATTEMPTS = 4  # of a request, besides those of DALI's client (3 by default, AWS_MAX_ATTEMPTS), each 3 s if nothing comes
PAUSE = 1.0  # seconds before the second attempt; then twice as long every time
FINAL = re.compile("AccessDenied|NoSuch|InvalidAccessKeyId|SignatureDoesNotMatch|ExpiredToken")  # no use to ask again
MANY = 10**6  # shards: more are a slip in a brace range
BLOCK = 512  # of a tar
ACCESS = (
    "are the name, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or ~/.aws), AWS_REGION and, for a store that is not "
    "Amazon's, AWS_ENDPOINT_URL right?"
)


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
        choices = [_choices(part, pattern) for part in re.split(r"(\{[^{}]*\})", pattern)]
        if len(paths) + np.prod([len(c) for c in choices], dtype=float) > MANY:
            raise FastsslError(f"'{pattern}' names more than {MANY:,} shards: is its range right?")
        paths += map("".join, itertools.product(*choices))
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise FastsslError(f"'{data}' names the shard '{twice}' more than once")
    return paths


def _choices(part: str, pattern: str) -> Sequence[str]:
    if match := re.fullmatch(r"\{(\d+)\.\.(\d+)\}", part):
        first, last = int(match[1]), int(match[2])
        if first > last:
            raise FastsslError(f"the range {part} of shards runs backwards")
        if last - first >= MANY:
            raise FastsslError(f"'{pattern}' names more than {MANY:,} shards: is its range right?")
        return [str(number).zfill(len(match[1])) for number in range(first, last + 1)]
    if part.startswith("{") and "," in part:
        return part[1:-1].split(",")
    if re.search("[{}]", part):
        raise FastsslError(f"'{pattern}' has braces that are neither {{000..255}} nor {{a,b}}")
    return [part]


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

    def name(self, index: int) -> str:
        """SHARD/MEMBER of image `index`."""
        return "/".join(self.places[index][:2])

    def read(self, index: int) -> bytes:
        """Image `index`, encoded.

        Raises:
            DataError: it cannot be read.
        """
        shard, _, offset, length = self.places[index]
        return bytes(_fetch(shard, offset, length))

    def subset(self, index: Tensor) -> "RemoteImages":
        """The images at `index`."""
        return RemoteImages(tuple(self.places[i] for i in index.tolist()))


class RemoteShards:
    """The images of shards on s3://, in an order that changes every epoch.

    Beside each shard `a.tar` its index `a.idx` (of `fastssl.data pack`, or of DALI's wds2idx) should lie. Without it
    the whole shard is fetched once, here, to find its images.

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

        with _closing(_Threads()) as threads:
            found = _gather(threads.map(lambda path: cut(path, _index_file(path)), paths))
        without = [number for number, pieces in enumerate(found) if pieces is None]
        if without:
            warnings.warn(
                f"{len(without)} of {len(paths)} shards have no index beside them, such as "
                f"'{_index_path(paths[without[0]])}': each is fetched whole now, and at every start. "
                "`python -m fastssl.data pack` and DALI's wds2idx write indexes: put them there",
                stacklevel=2,
            )
            with _closing(_Threads(2)) as threads:  # two shards at a time in memory
                futures = threads.map(lambda number: cut(paths[number], _index_shard(paths[number])), without)
                for number, pieces in zip(without, _gather(futures), strict=True):
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
        with _closing(_Threads()) as threads:

            def load(group: int) -> list["Future[Bytes]"]:
                return threads.map(_fetch_piece, [self._pieces[i] for i in order[group * GROUP : (group + 1) * GROUP]])

            batch: list[tuple[str, Bytes]] = []
            ahead = load(groups[0])
            for group in groups:
                pieces = [self._pieces[i] for i in order[group * GROUP : (group + 1) * GROUP]]
                images = [
                    image for piece, data in zip(pieces, _gather(ahead), strict=True) for image in _images(piece, data)
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


Image = tuple[str, int, int]  # member, offset, length


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


def _index_path(shard: str) -> str:
    return shard.removesuffix(".tar") + ".idx"


def _index_file(shard: str) -> list[Image] | None:
    """The images by the index beside the shard; None if there is none."""
    path = _index_path(shard)
    try:
        text = _fetch(path).tobytes()
    except _Absent:
        return None
    try:
        return parse_index(text.decode("utf-8", "surrogateescape"))
    except ValueError as error:
        raise DataError(
            f"cannot use the index '{path}' ({error}): make it anew with DALI's wds2idx, or remove it"
        ) from None


def parse_index(text: str) -> list[Image]:
    """The images in an index of DALI's wds2idx: `v1.2 SAMPLES`, then a line a sample of `EXTENSION OFFSET SIZE MEMBER`.

    Raises:
        ValueError: it is none.
    """
    head, *lines = text.removesuffix("\n").split("\n")
    if not re.fullmatch(r"v1\.2 \d+", head):
        raise ValueError(f"it begins with '{head[:40]}' instead of 'v1.2' and the number of samples")
    if int(head[5:]) != len(lines):
        raise ValueError(f"it has {len(lines)} of the {head[5:]} samples that it speaks of")
    samples: dict[str, list[Image]] = {}
    for number, line in enumerate(lines, 2):
        words = line.split(" ")
        if len(words) % 4 or not all(w.isdigit() for i in (1, 2) for w in words[i::4]):
            raise ValueError(f"line {number} is not EXTENSION OFFSET SIZE MEMBER; names with spaces cannot be indexed")
        for extension, offset, length, member in zip(*(words[i::4] for i in range(4)), strict=True):
            if f".{extension}".lower().endswith(EXTENSIONS):
                key = member[: len(member) - len(extension)]
                if int(offset) < BLOCK or int(offset) % BLOCK:
                    raise ValueError(
                        f"in line {number} '{member}' is at byte {offset}, where no member of a tar begins"
                    )
                samples.setdefault(key, []).append((member, int(offset), int(length)))
    return [_only_image(key, images) for key, images in samples.items()]


def _only_image(key: str, images: list[Image]) -> Image:
    """As in local shards, `a.jpg` is the image of sample a, whatever `a.mask.png` there is."""
    if len(images) > 1:
        images = [image for image in images if image[0][len(key) - 1 :].lower() in EXTENSIONS] or images
    if len(images) > 1:
        raise ValueError(f"its sample '{key}' has {len(images)} images: a key ends at the first dot")
    return images[0]


def _index_shard(shard: str) -> list[Image]:
    """The images by the shard itself, fetched whole."""
    try:
        with _memory_file(_fetch(shard)) as path:
            index = tar_index.index(path)
    except _Absent as error:
        raise DataError(f"cannot read '{shard}' ({_why(shard) or error}): {ACCESS}") from None
    except ValueError as error:
        if isinstance(error, FastsslError):
            raise
        raise DataError(f"cannot read '{shard}' ({error}): repair it, or leave it out with --exclude") from None
    return list(zip(index.members, index.offsets, index.lengths, strict=True))


def _fetch_piece(piece: _Piece) -> Bytes:
    try:
        data = _fetch(piece.shard, piece.start, piece.length)
    except _Absent as error:  # it was there: a store that is overloaded for a while looks the same
        raise _BrokeOff(f"cannot read '{piece.shard}' ({_why(piece.shard) or error}): {ACCESS}") from None
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
                f"'{name}' is not where the index '{_index_path(piece.shard)}' says: the shard has been changed since, "
                "make the index anew with DALI's wds2idx"
            )
    return data


def _images(piece: _Piece, data: Bytes) -> Iterator[tuple[str, Bytes]]:
    return ((name, image) for name, image, _ in _parts(piece, data))


def _parts(piece: _Piece, data: Bytes) -> Iterator[tuple[str, Bytes, Bytes]]:
    """Name, image and tar header of each image of a piece."""
    members = piece.members.decode("utf-8", "surrogateescape").split("\0")
    for member, at, length in zip(members, (piece.offsets - piece.start).tolist(), piece.lengths.tolist(), strict=True):
        yield f"{piece.shard}/{member}", data[at : at + length], data[at - BLOCK : at]


class _Threads:
    """Threads for requests; after the first error, or when closed, those that have not begun are not made."""

    def __init__(self, count: int = 0) -> None:
        self._pool = ThreadPoolExecutor(count or THREADS, "fastssl-s3")
        self._error: Exception | None = None

    def map(self, function: Callable[[Any], Any], arguments: Iterable[Any]) -> "list[Future[Any]]":
        return [self._pool.submit(self._call, function, argument) for argument in arguments]

    def _call(self, function: Callable[[Any], Any], argument: Any) -> Any:
        for attempt in itertools.count(1):
            if self._error:
                raise self._error
            try:
                return function(argument)
            except Exception as error:
                again = isinstance(error, _BrokeOff)
                if not again or attempt == ATTEMPTS:
                    self._error = self._error or (DataError(str(error)) if again else error)
                    raise self._error from None
            time.sleep(PAUSE * 2 ** (attempt - 1))

    def close(self) -> None:
        """Waits for the requests under way: DALI cannot break them off, and must not be left with them at exit."""
        self._error = self._error or DataError("the reader has been closed")
        self._pool.shutdown(cancel_futures=True)


@contextmanager
def _closing(threads: _Threads) -> Iterator[_Threads]:
    try:
        yield threads
    finally:
        threads.close()


def _gather(futures: "list[Future[Any]]") -> list[Any]:
    """The results; the futures are emptied, so that nothing else holds them."""
    results = [future.result() for future in futures]
    futures.clear()
    return results


class _Absent(DataError):
    """The store does not give the object: its answer does not say why."""


class _BrokeOff(DataError):
    """A connection failed, and may not the next time."""


class _Failed(Exception):
    """DALI could not read; the text is its reason."""


def _fetch(path: str, offset: int = 0, length: int = 0) -> Bytes:
    """`length` bytes of an object from `offset` on, or all of it.

    Raises:
        _Absent: there is no such object, or it may not be read.
        _BrokeOff: worth another attempt.
        DataError: any other reason.
    """
    try:
        return _read_range(path, offset, length) if length else _read_object(path)
    except _Failed as error:
        reason = str(error)
    # DALI's client tries again by itself, but not what broke off in the middle: it writes the second answer behind the
    # beginning of the first, where there is no room.
    if "flush response stream" in reason:
        raise _BrokeOff(f"cannot read '{path}' (the connection broke off, again and again): is the store overloaded?")
    if "Object not found" in reason and "curlCode" not in reason:
        raise _Absent("it is not there, or may not be read")
    if "Error reading from a file" in reason or "outside of the archive" in reason:
        raise DataError(
            f"cannot read '{path}' (it ends before byte {offset + length:,}): it is cut short, or has been changed "
            f"since its index '{_index_path(path)}' was made with DALI's wds2idx"
        )
    kind = DataError if FINAL.search(reason) else _BrokeOff
    raise kind(f"cannot read '{path}' ({reason or 'the store failed; DALI cannot read its answer'}): {ACCESS}")


def _why(path: str) -> str:
    """The store's reason for not giving an object; DALI asks for its head, to which the answer has none."""
    try:
        _run(lambda fn: fn.readers.file(file_root=path, lazy_init=True)[0])
    except _Failed as error:
        return "" if "o files found" in str(error) else str(error)
    return ""


def _read_object(path: str) -> Bytes:
    # The reader goes two files ahead, and the end of the pipeline waits for that with Python's lock held: local ones
    # need no request.
    with _memory_file(np.zeros(1, np.uint8)) as other:
        return _run(lambda fn: fn.readers.file(files=[path, other, other], lazy_init=True, dont_use_mmap=True)[0])


def _read_range(path: str, offset: int, length: int) -> Bytes:
    # As above: empty samples need no request.
    index = f"v1.2 3\npiece {offset} {length} -\n" + 2 * "piece 0 0 -\n"
    with _memory_file(np.frombuffer(index.encode(), np.uint8)) as index_path:
        return _run(
            lambda fn: fn.readers.webdataset(
                paths=[path],
                index_paths=[index_path],
                ext=["piece"],
                lazy_init=True,  # else requests are made in build(), which stops all of Python's threads
                dont_use_mmap=True,
                tensor_init_bytes=1,  # it allocates several of these beforehand
            )
        )


def _run(reader: Callable[[Any], Any]) -> Bytes:
    """The first sample of a DALI reader.

    Raises:
        FastsslError: DALI is not installed.
        _Failed: it failed.
    """
    try:
        from nvidia.dali import fn
        from nvidia.dali.pipeline import Pipeline
    except ImportError:
        raise FastsslError(
            "shards on s3:// are read by NVIDIA DALI: pip install fastssl[dali], or [dali-cu13]"
        ) from None
    pipeline = Pipeline(
        batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1, exec_pipelined=False, exec_async=False
    )
    try:
        with pipeline:
            pipeline.set_outputs(reader(fn))
        pipeline.build()
        return np.array(pipeline.run()[0][0])  # a copy: the pipeline's own goes with it
    except RuntimeError as error:
        text = str(error).partition("encountered:")[2] or str(error)
        text = text.partition("Current pipeline object")[0].partition("C++ context")[0]
        raise _Failed(" ".join(text.split()).strip(": ")) from None


@contextmanager
def _memory_file(data: Bytes) -> Iterator[str]:
    """A path at which the data can be read, without a disk."""
    number = os.memfd_create("fastssl")
    with os.fdopen(number, "wb") as file:
        file.write(data.data)
        file.flush()
        yield f"/proc/self/fd/{number}"
