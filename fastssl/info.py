"""``python -m fastssl.info``: versions, hardware, and which backend every op will run on here."""

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterable
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import fastssl.ops  # noqa: F401  registers the ops
from fastssl import __version__, _extension, apex
from fastssl.errors import FastsslError
from fastssl.ops import backend

DEVICES = ("cpu", "cuda")
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
ENVIRONMENT = ("FASTSSL_BACKEND", "TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
# A table of the report, and the word for what is not there.
TABLES = {"versions": "not installed", "cpu": "none", "cuda": "none", "extension": "none", "environment": "not set"}
CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "bf16", "sve", "sve2")


def collect() -> dict[str, Any]:
    """Everything the report says, as data that JSON can hold."""
    return {
        "versions": _versions(),
        "cpu": _cpu(),
        "cuda": _cuda(),
        "extension": _extension.build_info() or {"missing": _extension.missing()},
        "environment": {name: os.environ.get(name) for name in ENVIRONMENT},
        "ops": {op: {device: _choices(op, device) for device in DEVICES} for op in backend.ops()},
    }


def render(info: dict[str, Any], console: Console) -> None:
    """Print what `collect` found as tables."""
    for title, absent in TABLES.items():
        table = Table("", "", title=title, title_justify="left", show_header=False, box=None)
        for key, value in info[title].items():
            text = ", ".join(value) if isinstance(value, list) else value
            table.add_row(key, absent if text in (None, "") else str(text))
        console.print(table, "")
    table = Table("op", "device", "dtype", "backend", title="which backend runs", title_justify="left", box=None)
    for op, devices in info["ops"].items():
        for device, choices in devices.items():
            for result in dict.fromkeys(choices.values()):
                table.add_row(op, device, ", ".join(dtype for dtype in choices if choices[dtype] == result), result)
    console.print(table)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m fastssl.info", description="Versions, hardware and backends.")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    if parser.parse_args(arguments).json:
        print(json.dumps(collect(), indent=2))
    else:
        # In a pipe, one row is one line.
        width = None if sys.stdout.isatty() else 1000
        render(collect(), Console(width=width, highlight=False, markup=False, emoji=False))


def _choices(op: str, device: str) -> dict[str, str]:
    """The backend of `op` for every dtype, or why the one asked for cannot run."""
    choices = {}
    for dtype in DTYPES:
        try:
            choice = backend.choose(op, torch.device(device), dtype)
        except FastsslError as error:
            choice = f"error: {error}"
        choices[str(dtype).removeprefix("torch.")] = choice
    return choices


def _versions() -> dict[str, str | None]:
    return {
        "fastssl": __version__,
        "python": platform.python_version(),
        "os": platform.platform(),
        "torch": torch.__version__,
        **{name: _installed([name]) for name in ("torchvision", "timm", "triton")},
        "dali": _installed(["nvidia-dali-cuda130", "nvidia-dali-cuda120"]),
        "apex": _apex(),
    }


def _installed(distributions: Iterable[str]) -> str | None:
    """The version of the first of `distributions` that is installed."""
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _apex() -> str | None:
    """NVIDIA's apex, told from the package of the same name on PyPI by what it contains."""
    there = apex.has("optimizers")
    if there is None:
        return None
    if not there:
        return "not NVIDIA's: PyPI's apex is another package"
    return "NVIDIA's, " + ("with amp_C" if find_spec("amp_C") else "without amp_C, so without its fused kernels")


def _cpu() -> dict[str, Any]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = (facts.get("flags") or facts.get("Features") or "").split()
    return {
        "model": facts.get("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "features": [feature for feature in CPU_FEATURES if feature in flags],
    }


def _cuda() -> dict[str, Any]:
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return {
        "torch built with": torch.version.cuda,
        "devices": [
            f"{device.name}, sm_{device.major}{device.minor}, {device.total_memory / 2**30:.0f} GiB, "
            f"{device.multi_processor_count} multiprocessors"
            for device in properties
        ],
    }


if __name__ == "__main__":
    main()
