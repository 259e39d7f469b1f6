"""What the processes of `scan` do: decode images and tell which cannot be. Without torch, to start at once."""

import os
import signal
import threading
import warnings
from collections.abc import Callable
from functools import cache, partial
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from fastssl.data.decode import ImageError, decode
from fastssl.data.stored import Location, OpenFiles
from fastssl.errors import DataError

Item = tuple[str, Location]  # name, place
Finding = tuple[str, str]  # name, reason

_files = OpenFiles()


def check(items: list[Item]) -> list[Finding]:
    """Decode every image; return the unreadable ones."""
    faults = (fault(name, partial(_files.read, location, name)) for name, location in items)
    return [(found.name, found.reason) for found in faults if found is not None]


def fault(name: str, read: Callable[[], bytes]) -> ImageError | None:
    """What is wrong with an image, None if every loader can decode it.

    Args:
        name: of the image.
        read: gives its encoded bytes, or raises a DataError.
    """
    try:
        encoded = read()
        decode(encoded, name)
    except ImageError as error:
        return error
    except DataError as error:
        return ImageError(name, str(error))
    refusal = refused_by_dali(encoded)
    return ImageError(name, refusal) if refusal else None


def refused_by_dali(encoded: bytes) -> str:
    """Why DALI cannot decode an image, "" if it can or is not installed.

    It is stricter than PIL with a few damages (checksums of PNGs, tables of JPEGs) and with 1-bit TIFFs, and a loader
    that uses it would end with such an image.
    """
    pipeline = _dali()
    if pipeline is None:
        return ""
    try:
        pipeline.feed_input("encoded", [np.frombuffer(encoded, np.uint8)])
        pipeline.run()
    except RuntimeError as error:
        _dali.cache_clear()  # a pipeline that failed cannot go on
        lines = [line.strip() for line in str(error).splitlines()]
        said = next((line for line in lines if "failure" in line or line.startswith("Failed")), "no reason given")
        return f"PIL decodes it, and DALI does not: {said.rstrip(' :')}"
    return ""


@cache
def _dali() -> Any:
    """DALI's decoder for the CPU, if it is installed."""
    try:
        from nvidia.dali import fn, pipeline_def, types
    except ImportError:
        return None

    @pipeline_def(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
    def graph() -> Any:
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
        return fn.decoders.image(encoded, device="cpu", output_type=types.RGB, adjust_orientation=False)

    return graph()


def start(lifeline: Connection) -> None:
    """Prepare a process of the pool; it ends when the other end of `lifeline` is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the scan ends its processes itself
    warnings.simplefilter("ignore")
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 2)  # libtiff writes there, across the progress bar
    threading.Thread(target=_watch, args=(lifeline,), daemon=True).start()


def _watch(lifeline: Connection) -> None:
    lifeline.poll(None)
    os._exit(1)
