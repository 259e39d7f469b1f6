"""From a profiler trace of training steps to the time of each part of a step.

- *Time* is, on a GPU, that of kernels, copies and fills (the device's own clock, through CUPTI); on the CPU that of the
  calling thread, Python between the operations included.
- *Forward*: a kernel belongs to the innermost range in which it was launched.
- *Backward*: the profiler has the number of each autograd node that it runs, and the marks say which part made it. An
  AccumulateGrad has no number; it runs right after the node whose gradient it takes, and goes with it.
- *Where it may err*: kernels on several streams at once count in full each. Gradients that arrive from several nodes
  are added up by the node that runs last. A kernel whose launch the trace does not have (a replayed CUDA graph has one
  for all its kernels) counts as its launch does or as "rest"; how much has no launch is told. The profiler slows the
  host down, not the kernels: on a GPU the share holds, and the step's own time is measured without it; on the CPU it
  makes parts of many short operations look larger than they are.
"""

import gzip
import json
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.step_parts import BACKBONE, BACKWARD, FORWARD, MOMENTUM_FORWARD, PARTS, RANGE, REST, STEP
from fastssl.errors import FastsslError

Event = dict[str, Any]

NODE = "autograd::engine::evaluate_function: "
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCHES = ("cuda_runtime", "cuda_driver")
ON_HOST = ("cpu_op", "user_annotation")


@dataclass
class Split:
    """A trace's time by part, in microseconds of all steps.

    Attributes:
        steps: in the trace.
        on_gpu: whether the times are those of kernels.
        total: measured apart from the parts: of all kernels, or on the CPU of all steps.
        times: by part and name of the kernel or operation.
        without_launch: of kernels whose launch the trace does not have; they are in "rest".
    """

    steps: int
    on_gpu: bool
    total: float
    times: dict[tuple[str, str], float] = field(default_factory=lambda: defaultdict(float))
    without_launch: float = 0.0

    @property
    def parts(self) -> dict[str, float]:
        """By part; all of PARTS, in order."""
        return {part: sum(time for (of, _), time in self.times.items() if of == part) for part in PARTS}

    @property
    def outside(self) -> float:
        """Share of the time, 0…1, that is not the backbones'."""
        return 1 - sum(time for part, time in self.parts.items() if part in BACKBONE) / self.total


class Thread:
    """The ranges of one thread, each with the one it lies in and the part it belongs to.

    Args:
        events: complete events of this thread.
        marks: from which autograd number on nodes belong to which part, sorted.
    """

    def __init__(self, events: list[Event], marks: list[tuple[int, str]]) -> None:
        self.events = sorted(events, key=lambda event: (event["ts"], -event["dur"]))
        self.starts = [event["ts"] for event in self.events]
        self.parents: list[int | None] = []
        around: list[int] = []
        for index, event in enumerate(self.events):
            while around and _end(self.events[around[-1]]) <= event["ts"]:
                around.pop()
            self.parents.append(around[-1] if around else None)
            around.append(index)
        self.parts = self._parts(marks)

    def part_at(self, moment: float) -> str:
        """The part of the innermost range that is open at a moment."""
        index: int | None = bisect_right(self.starts, moment) - 1
        if index == -1:
            return REST
        while index is not None and _end(self.events[index]) < moment:
            index = self.parents[index]
        return REST if index is None else self.parts[index]

    def own_times(self) -> list[float]:
        """Of every range, the time without that of the ranges in it."""
        own = [event["dur"] for event in self.events]
        for event, parent in zip(self.events, self.parents, strict=True):
            if parent is not None:
                own[parent] -= event["dur"]
        return own

    def in_step(self, index: int) -> bool:
        """Whether a range lies in that of a step."""
        while (parent := self.parents[index]) is not None:
            index = parent
        return bool(self.events[index]["name"] == STEP)

    def _parts(self, marks: list[tuple[int, str]]) -> list[str]:
        numbers: dict[int, int] = {}  # autograd's, by the index of the range in which the engine runs a node
        for index, parent in enumerate(self.parents):
            number = self.events[index].get("args", {}).get("Sequence number", -1)
            # The engine's range has its node's number, or the node's own range in it does.
            for at in (index, parent):
                if at is not None and self.events[at]["name"].startswith(NODE) and 0 <= number < 2**62:
                    numbers.setdefault(at, number)
        parts: list[str] = []
        last = REST
        for index, (event, parent) in enumerate(zip(self.events, self.parents, strict=True)):
            named = RANGE.fullmatch(event["name"])
            if named and named["kind"] == "part":
                part = named["part"]
            elif event["name"].startswith(NODE):
                part = last = _of_node(numbers[index], marks) if index in numbers else last
            else:
                part = REST if parent is None else parts[parent]
            parts.append(part)
        return parts


def _end(event: Event) -> float:
    return float(event["ts"] + event["dur"])


def _of_node(number: int, marks: list[tuple[int, str]]) -> str:
    """The part that a node of the backward pass belongs to."""
    index = bisect_right(marks, number, key=lambda mark: mark[0]) - 1
    part = marks[index][1] if index >= 0 else REST
    return BACKWARD if part in (FORWARD, MOMENTUM_FORWARD) else part


def read_trace(file: Path) -> list[Event]:
    """The events of a packed Chrome trace.

    Raises:
        FastsslError: there is no such file, or it is no trace.
    """
    try:
        with gzip.open(file) as stream:
            events: list[Event] = json.load(stream)["traceEvents"]
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise FastsslError(f"{file} is no trace ({error!r}): give a .json.gz of benchmarks.trace_step") from None
    return events


def split(events: Sequence[Event], on_gpu: bool = False) -> Split:
    """Split up the events of a trace that `benchmarks.trace_step` has made.

    Args:
        events: of the trace.
        on_gpu: whether there must be kernels.

    Raises:
        FastsslError: the trace has no steps in it, or no kernels.
    """
    complete = [event for event in events if event.get("ph") == "X"]
    host = [event for event in complete if event.get("cat") in ON_HOST]
    kernels = [event for event in complete if event.get("cat") in ON_DEVICE]
    steps = [event for event in host if event["name"] == STEP]
    if not steps:
        raise FastsslError(
            f"the trace has no range '{STEP}' among its {len(events)} events: it must come from python -m "
            "benchmarks.trace_step"
        )
    if on_gpu and not kernels:
        raise FastsslError(
            "the trace has steps but no kernels: the profiler did not get at the GPU; see above what CUPTI says, "
            "another profiler may be attached, or this container may not have the permission"
        )
    named = [(match, event["ts"]) for event in host if (match := RANGE.fullmatch(event["name"]))]
    # Of those with one number the latest counts.
    marks = [(number, part) for number, _, part in sorted((int(m["number"]), start, m["part"]) for m, start in named)]
    by_thread: dict[Any, list[Event]] = defaultdict(list)
    for event in host:
        by_thread[event["tid"]].append(event)
    threads = {thread: Thread(own, marks) for thread, own in by_thread.items()}
    if kernels:
        return _split_device(kernels, complete, threads, len(steps))
    return _split_host(steps, threads[steps[0]["tid"]])


def _split_host(steps: list[Event], thread: Thread) -> Split:
    result = Split(len(steps), on_gpu=False, total=sum(event["dur"] for event in steps))
    for index, (part, time) in enumerate(zip(thread.parts, thread.own_times(), strict=True)):
        if thread.in_step(index):
            name = thread.events[index]["name"]
            between = name == STEP or name.startswith(NODE) or RANGE.fullmatch(name)
            result.times[part, "Python and autograd between the operations" if between else name] += time
    return result


def _split_device(kernels: list[Event], events: list[Event], threads: dict[Any, Thread], steps: int) -> Split:
    result = Split(steps, on_gpu=True, total=sum(kernel["dur"] for kernel in kernels))
    launches = _by("correlation", LAUNCHES, events)
    operations = _by("External id", ("cpu_op",), events)
    for kernel in kernels:
        # By its launch. Where that is on a thread of which nothing else is known, by the operation that launched it.
        arguments = kernel.get("args", {})
        launch = launches.get(arguments.get("correlation"))
        if launch is None or launch["tid"] not in threads:
            launch = operations.get(arguments.get("External id"))
        if launch is None:
            result.without_launch += kernel["dur"]
        part = REST if launch is None else threads[launch["tid"]].part_at(launch["ts"])
        result.times[part, kernel["name"]] += kernel["dur"]
    return result


def _by(key: str, categories: Sequence[str], events: list[Event]) -> dict[Any, Event]:
    found = [event for event in events if event.get("cat") in categories]
    return {event["args"][key]: event for event in found if key in event.get("args", {})}
