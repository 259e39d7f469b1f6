"""Reading from s3:// with DALI's client: what went wrong in words, worth another attempt or not, with many threads."""

import itertools
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from fastssl.data import wds_index
from fastssl.errors import DataError, FastsslError

Bytes = npt.NDArray[np.uint8]

THREADS = 8  # requests at a time
ATTEMPTS = 4  # of a request, besides those of DALI's client (3 by default, AWS_MAX_ATTEMPTS), each 3 s if nothing comes
PAUSE = 1.0  # seconds before the second attempt; then twice as long every time
FINAL = re.compile("AccessDenied|NoSuch|InvalidAccessKeyId|SignatureDoesNotMatch|ExpiredToken")  # no use to ask again
ACCESS = (
    "are the name, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or ~/.aws), AWS_REGION and, for a store that is not "
    "Amazon's, AWS_ENDPOINT_URL right?"
)


class Threads:
    """Threads for requests; after the first error, or when closed, those that have not begun are not made."""

    def __init__(self, count: int = 0) -> None:
        self._pool = ThreadPoolExecutor(count or THREADS, "fastssl-s3")
        self._error: Exception | None = None
        self._ended = threading.Event()  # wakes those that pause before another attempt

    def map(self, function: Callable[[Any], Any], arguments: Iterable[Any]) -> "list[Future[Any]]":
        """The results to come of calls that are repeated while they raise BrokeOff."""
        return [self._pool.submit(self._call, function, argument) for argument in arguments]

    def _call(self, function: Callable[[Any], Any], argument: Any) -> Any:
        for attempt in itertools.count(1):
            if self._error:
                raise self._error
            try:
                return function(argument)
            except Exception as error:
                again = isinstance(error, BrokeOff)
                if not again or attempt == ATTEMPTS:
                    raise self._end(DataError(str(error)) if again else error) from None
            self._ended.wait(PAUSE * 2 ** (attempt - 1))

    def close(self) -> None:
        """Waits for the requests under way: DALI cannot break them off, and must not be left with them at exit."""
        self._end(DataError("the reader has been closed"))
        self._pool.shutdown(cancel_futures=True)

    def _end(self, error: Exception) -> Exception:
        """Let nothing begin any more; returns the first error."""
        self._error = self._error or error
        self._ended.set()
        return self._error


@contextmanager
def closing(threads: Threads) -> Iterator[Threads]:
    """Close them at the end."""
    try:
        yield threads
    finally:
        threads.close()


def gather(futures: "list[Future[Any]]") -> list[Any]:
    """The results; the futures are emptied, so that nothing else holds them."""
    results = [future.result() for future in futures]
    futures.clear()
    return results


class Absent(DataError):
    """The store does not give the object: its answer does not say why."""


class BrokeOff(DataError):
    """A connection failed, and may not the next time."""


class _Failed(Exception):
    """DALI could not read; the text is its reason."""


def fetch(path: str, offset: int = 0, length: int = 0) -> Bytes:
    """`length` bytes of an object from `offset` on, or all of it.

    Raises:
        Absent: there is no such object, or it may not be read.
        BrokeOff: worth another attempt.
        DataError: any other reason.
    """
    try:
        return _read_range(path, offset, length) if length else _read_object(path)
    except _Failed as error:
        reason = str(error)
    # DALI's client tries again by itself, but not what broke off in the middle: it writes the second answer behind the
    # beginning of the first, where there is no room.
    if "flush response stream" in reason:
        raise BrokeOff(f"cannot read '{path}' (the connection broke off, again and again): is the store overloaded?")
    if "Object not found" in reason and "curlCode" not in reason:
        raise Absent("it is not there, or may not be read")
    if "Error reading from a file" in reason or "outside of the archive" in reason:
        raise DataError(
            f"cannot read '{path}' (it ends before byte {offset + length:,}): it is cut short, or has been changed "
            f"since its index '{wds_index.path_of(path)}' was made with DALI's wds2idx"
        )
    kind = DataError if FINAL.search(reason) else BrokeOff
    raise kind(f"cannot read '{path}' ({reason or 'the store failed; DALI cannot read its answer'}): {ACCESS}")


def why(path: str) -> str:
    """The store's reason for not giving an object; DALI asks for its head, to which the answer has none."""
    try:
        _run(lambda fn: fn.readers.file(file_root=path, lazy_init=True)[0])
    except _Failed as error:
        return "" if "o files found" in str(error) else str(error)
    return ""


def _read_object(path: str) -> Bytes:
    # The reader goes two files ahead, and the end of the pipeline waits for that with Python's lock held: local ones
    # need no request.
    with memory_file(np.zeros(1, np.uint8)) as other:
        return _run(lambda fn: fn.readers.file(files=[path, other, other], lazy_init=True, dont_use_mmap=True)[0])


def _read_range(path: str, offset: int, length: int) -> Bytes:
    # As above: empty samples need no request.
    index = f"v1.2 3\npiece {offset} {length} -\n" + 2 * "piece 0 0 -\n"
    with memory_file(np.frombuffer(index.encode(), np.uint8)) as index_path:
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
def memory_file(data: Bytes) -> Iterator[str]:
    """A path at which the data can be read, without a disk."""
    number = os.memfd_create("fastssl")
    with os.fdopen(number, "wb") as file:
        file.write(data.data)
        file.flush()
        yield f"/proc/self/fd/{number}"
