"""Seconds and bytes that a call takes, on the CPU and on CUDA."""

import ctypes
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def on_cpu(step: Callable[[], Any], calls: int) -> float:
    """Seconds of `calls` calls."""
    start = time.perf_counter()
    for _ in range(calls):
        step()
    return time.perf_counter() - start


def on_cuda(step: Callable[[], Any], calls: int) -> float:
    """Seconds that the device is at it, by events: from the moment it could begin to the end of the last kernel.

    What the host does in between counts as far as the device has to wait for it.
    """
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(calls):
        step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


CLOCKS = {"cpu": on_cpu, "cuda": on_cuda}


class Graph:
    """A call captured as a CUDA graph: replaying it costs the host one launch.

    Args:
        step: allocates what it likes, but may not wait for the device.
    """

    def __init__(self, step: Callable[[], Any]) -> None:
        self._step = step  # holds the tensors whose addresses the graph has
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # lazy initialisations may not be captured
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._result = step()

    def prove(self, check: Callable[[Any], None] | None) -> None:
        """Assert that a replay computes.

        Args:
            check: of a result that is the same at every call, looked at after its memory was overwritten; None for
                calls that change their arguments, whose result must change.
        """
        results = list(self._result) if isinstance(self._result, tuple | list) else [self._result]
        before = [x.clone() for x in results]
        if check is not None:
            for x in results:
                x.fill_(float("nan"))
        self()
        if check is not None:
            check(self._result)
        else:
            assert not all(map(torch.equal, results, before)), "the replay of the graph changed nothing"

    def __call__(self) -> Any:
        """Replay; the result is in the same memory each time."""
        self._graph.replay()
        return self._result


def peak_memory(step: Callable[[], Any], device: str) -> int | None:
    """Bytes of memory that a call needs at its peak beyond what was there before; None where that cannot be told.

    On the CPU of the process's resident memory (Linux), on CUDA of torch's allocator.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        return None

    def kilobytes(name: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(name))

    ctypes.CDLL("libc.so.6").malloc_trim(0)  # else the step would use again what earlier ones have freed
    reset.write_text("5")  # the peak counts from here
    before = kilobytes("VmRSS")
    step()
    return max(0, kilobytes("VmHWM") - before) * 1024
