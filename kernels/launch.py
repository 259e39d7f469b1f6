"""Starts kernels, or writes down what would have been started, to compile it ahead of time without a GPU."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from fastssl.kernels import config
from torch import Tensor
from triton.runtime.autotuner import Autotuner

Grid = tuple[int, ...] | Callable[[dict[str, Any]], tuple[int, ...]]


class Launch(NamedTuple):
    """A kernel with its arguments by name, constexprs among them."""

    kernel: Any
    arguments: dict[str, Any]
    warps: int
    stages: int
    fuse: bool


_recorded: list[Launch] | None = None
_chip: int | None = None
_precision: str | None = None


def launch(
    kernel: Any, grid: Grid, warps: int, stages: int, near: Tensor, *, fuse: bool = True, **arguments: Any
) -> None:
    """Run `kernel` on the device of `near`; without `fuse`, a product that is added to is rounded by itself."""
    if _recorded is not None:
        _recorded.append(Launch(kernel, arguments, warps, stages, fuse))
        return
    if not isinstance(kernel, Autotuner):  # which brings its own
        arguments |= {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": fuse}
    with torch.cuda.device_of(near):
        kernel[grid](**arguments)


def chip(device: torch.device) -> config.Chip:
    """What the configurations depend on: the chip of `device`, or the one recorded for."""
    if _chip is not None:
        return config.Chip(_chip, config.MULTIPROCESSORS[_chip])
    if device.type != "cuda":
        return config.Chip(config.INTERPRETER, config.MULTIPROCESSORS[config.INTERPRETER])
    return _installed(device)


@cache
def _installed(device: torch.device) -> config.Chip:
    properties = torch.cuda.get_device_properties(device)
    return config.Chip(config.family(properties.major, properties.minor), properties.multi_processor_count)


def autotuning() -> bool:
    """Whether the user asked for it; what ships is recorded without."""
    return os.environ.get("FASTSSL_AUTOTUNE") == "1" and _recorded is None


def precision() -> str:
    """How float32 tiles are multiplied: "tf32" where torch allows it, else as three of its products, "tf32x3"."""
    if _precision is not None:
        return _precision
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # once this was set, reading allow_tf32 raises
        return "tf32" if matmul.fp32_precision == "tf32" else "tf32x3"
    return "tf32" if matmul.allow_tf32 else "tf32x3"


@contextmanager
def recording(family: int, precision: str) -> Iterator[list[Launch]]:
    """Inside, nothing runs: launches for a chip of `family` (90, say) are listed; meta tensors will do."""
    global _recorded, _chip, _precision
    _recorded, _chip, _precision = [], family, precision
    try:
        yield _recorded
    finally:
        _recorded, _chip, _precision = None, None, None
