"""Finds every image that cannot be decoded, with many processes: before a long training rather than in its middle."""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice

from fastssl.data import is_named
from fastssl.data.check import Finding, Item, check, start
from fastssl.data.exclude import Exclusions, Report
from fastssl.data.folder import disguised
from fastssl.data.sources import is_remote, not_on_disk, open_stored
from fastssl.data.stored import StoredImages
from fastssl.errors import FastsslError

CHUNK = 32  # images that a process decodes before it tells


def scan(
    data: str,
    workers: int,
    report: Report,
    progress: Callable[[int, int], None] = lambda done, all: None,
    remark: Report = lambda name, reason: None,
) -> int:
    """Decode every image of `data`.

    Args:
        data: a folder of images or shards.
        workers: processes.
        report: gets the name and the reason of everything that cannot be read: images, shards, folders.
        progress: gets how many images were decoded, and how many there are.
        remark: gets what is odd and harmless, and need not be left out: empty folders with the name of an image.

    Returns:
        How many images there are, as far as shards and folders could be read.

    Raises:
        FastsslError: there is nothing to scan on disk, or processes cannot be started.
    """
    if is_named(data) or is_remote(data):
        raise not_on_disk("scan", data)
    findings = 0

    def found(name: str, reason: str) -> None:
        nonlocal findings
        findings += 1
        report(name, reason)

    parts = [images for images in open_stored(data, Exclusions(), found) if images is not None]
    for name in disguised(data) if os.path.isdir(data) else ():
        remark(name, "it is a folder with the name of an image, and no images are below it")
    count, done = sum(map(len, parts)), 0
    if not count and not findings:
        raise FastsslError(f"no images in '{data}', and no shards")
    progress(0, count)
    for decoded, bad in _in_processes(_chunks(parts), max(1, min(workers, count // CHUNK + 1))):
        for finding in bad:
            found(*finding)
        done += decoded
        progress(done, count)
    return count


def _chunks(parts: list[StoredImages]) -> Iterator[list[Item]]:
    items = ((images.name(i), images.location(i)) for images in parts for i in range(len(images)))
    while chunk := list(islice(items, CHUNK)):
        yield chunk


def _in_processes(chunks: Iterator[list[Item]], workers: int) -> Iterator[tuple[int, list[Finding]]]:
    """The size and the findings of each chunk. A process that is killed takes none of them along."""
    unfinished: list[list[Item]] = []
    while True:
        flying: dict[Future[list[Finding]], list[Item]] = {}
        try:
            with _pool(workers) as pool:
                while True:
                    for chunk in islice(chunks, 2 * workers - len(flying)):
                        unfinished.append(chunk)  # before submit, which raises too when the pool has broken
                        flying[pool.submit(check, chunk)] = chunk
                    if not flying:
                        return
                    for future in wait(flying, return_when=FIRST_COMPLETED).done:
                        bad = future.result()
                        chunk = flying.pop(future)
                        unfinished.remove(chunk)
                        yield len(chunk), bad
        except BrokenProcessPool:  # nobody knows which chunk it was
            _check_start()
            yield from _one_by_one(unfinished)
            unfinished = []


def _check_start() -> None:
    """Raise if processes die of something else than images: every image would get the blame."""
    try:
        with _pool(1) as pool:
            pool.submit(check, []).result()
    except BrokenProcessPool:
        raise FastsslError(
            "the worker processes die at their start (they say above why, unless memory ran out): call scan from a "
            'script in a file, below `if __name__ == "__main__":`, or use `python -m fastssl.data scan`'
        ) from None


def _one_by_one(chunks: list[list[Item]]) -> Iterator[tuple[int, list[Finding]]]:
    """Check chunks in a single process, and the halves of one in which it dies, down to the image that kills it."""
    waiting = chunks[::-1]
    while waiting:
        try:
            with _pool(1) as pool:
                while waiting:
                    bad = pool.submit(check, waiting[-1]).result()
                    yield len(waiting.pop()), bad
        except BrokenProcessPool:
            chunk = waiting.pop()
            middle = len(chunk) // 2
            if middle:
                waiting += [chunk[middle:], chunk[:middle]]
            else:
                yield 1, [(chunk[0][0], "the process that decoded it was killed: no memory, or a fault of the decoder")]


@contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that end at once when this one is interrupted or killed: they watch the other end of a pipe."""
    context = multiprocessing.get_context("spawn")  # a fork would bring along torch's threads and their locks
    reader, writer = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(workers, context, start, (reader,))
    try:
        yield pool
    except BaseException:
        writer.close()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        writer.close()
        reader.close()
