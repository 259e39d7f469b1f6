"""Kernels of a trace like a GPU's get to the part that launched them, or that made their node."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import trace_step
from benchmarks.attribution import read_trace, split
from benchmarks.step_parts import PARTS, STEP
from fastssl.errors import FastsslError

HOST, ENGINE = 10, 20  # threads


def event(cat: str, name: str, start: float, length: float, tid: int = HOST, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": length, "pid": 1, "tid": tid, "args": args}


def gpu_trace() -> list[dict[str, Any]]:
    """Of one step as Kineto writes it: forward on one thread, backward on another, kernels by correlation."""

    def launched(at: float, length: float, correlation: int, tid: int = HOST, **kernel: Any) -> list[dict[str, Any]]:
        launch = event("cuda_runtime", "cudaLaunchKernel", at, 1, tid, correlation=correlation)
        return [launch, event("kernel", "k", at + 500, length, 7, correlation=correlation, **kernel)]

    node, mark = "autograd::engine::evaluate_function: ", "fastssl mark="
    return [
        {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "python"}},
        event("user_annotation", STEP, 0, 400),
        event("gpu_user_annotation", STEP, 500, 900, 7),  # the same on the GPU: not to be counted
        event("user_annotation", "fastssl part=loss seq=0", 10, 100),
        event("user_annotation", "fastssl part=backbone forward seq=0", 20, 30),
        event("cpu_op", "aten::conv2d", 22, 8, **{"External id": 1, "Sequence number": 0}),
        *launched(25, 40, 100),
        event("user_annotation", f"{mark}loss seq=2", 51, 1),
        event("user_annotation", "fastssl part=heads seq=2", 60, 10),
        *launched(62, 5, 101),
        event("user_annotation", f"{mark}loss seq=3", 71, 1),
        *launched(80, 20, 102),
        event("user_annotation", f"{mark}rest seq=5", 111, 1),
        # The backward pass: loss, heads, backbone, and the gradient of its weight.
        event("cpu_op", f"{node}LossBackward", 150, 10, ENGINE),
        event("cpu_op", "LossBackward", 151, 8, ENGINE, **{"Sequence number": 3, "Fwd thread id": 1}),
        *launched(152, 10, 103, ENGINE),
        event("cpu_op", f"{node}AddmmBackward0", 170, 10, ENGINE, **{"Sequence number": 2, "Fwd thread id": 1}),
        *launched(172, 6, 104, ENGINE),
        event("cpu_op", f"{node}ConvolutionBackward0", 190, 10, ENGINE, **{"Sequence number": 1}),
        *launched(192, 80, 105, ENGINE),
        event("cpu_op", f"{node}torch::autograd::AccumulateGrad", 201, 5, ENGINE),
        *launched(202, 3, 106, ENGINE),
        # A launch on a thread that the profiler calls otherwise: found by the operation.
        event("user_annotation", "fastssl part=optimizer seq=5", 300, 20),
        event("cpu_op", "aten::_fused_sgd_", 302, 8, **{"External id": 9}),
        *launched(304, 7, 107, 99, **{"External id": 9}),
        event("gpu_memcpy", "Memcpy HtoD", 900, 2, 7, correlation=555),  # without a launch
    ]


def test_kernels_belong_to_what_launched_them_or_made_their_node() -> None:
    found = split(gpu_trace())
    expected = dict.fromkeys(PARTS, 0.0)
    expected |= {"backbone forward": 40, "backbone backward": 83, "heads": 11, "loss": 30, "optimizer": 7, "rest": 2}
    assert found.parts == expected
    assert found.total == sum(expected.values()) and found.without_launch == 2
    assert found.outside == pytest.approx(1 - 123 / 173)


def test_a_trace_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FastsslError, match="no range 'fastssl step' among its 1 events"):
        split([event("cpu_op", "aten::add", 0, 1)])
    with pytest.raises(FastsslError, match="has steps but no kernels"):
        split([event("user_annotation", STEP, 0, 1)], on_gpu=True)
    (tmp_path / "other.json").write_text("[]")
    (tmp_path / "other.json.gz").write_bytes(gzip.compress(b"[]"))
    for name in ("none.json.gz", "other.json", "other.json.gz"):
        with pytest.raises(FastsslError, match=f"{name} is no trace"):
            read_trace(tmp_path / name)


def test_a_trace_is_split_again_from_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "trace.json.gz"
    file.write_bytes(gzip.compress(json.dumps({"traceEvents": gpu_trace()}).encode()))
    assert trace_step.main([f"--trace={file}"]) == 0
    assert "Share outside the backbone: 28.90%" in capsys.readouterr().out
