"""What the figures of a machine with GPUs depend on: ``python -m benchmarks.environment`` prints it as JSON."""

import datetime
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastssl import info

ROOT = Path(__file__).parents[1]
SMI = (
    "name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.draw", "power.limit",
    "temperature.gpu", "utilization.gpu", "memory.used", "memory.total", "mig.mode.current",
)  # fmt: skip


def environment() -> dict[str, Any]:
    """Devices, driver, libraries and commit. Sets CUDA up."""
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    rows = nvidia_smi()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _printed("git", "describe", "--always", "--dirty", "--abbrev=12"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "driver": driver(rows),
        "gpus": [
            {
                "name": gpu.name,
                "capability": f"{gpu.major}.{gpu.minor}",
                "memory_gib": round(gpu.total_memory / 2**30, 1),
                "multiprocessors": gpu.multi_processor_count,
            }
            for gpu in gpus
        ],
        "nvidia_smi": rows,
        "cudnn": _tried(torch.backends.cudnn.version),
        "nccl": _tried(torch.cuda.nccl.version),
        "fastssl": _tried(info.collect),
    }


def nvidia_smi() -> list[dict[str, str]]:
    """What the tool of the driver tells of each GPU; nothing without it."""
    printed = _printed("nvidia-smi", f"--query-gpu={','.join(SMI)}", "--format=csv,noheader") or ""
    return [dict(zip(SMI, map(str.strip, line.split(",")), strict=False)) for line in printed.splitlines()]


def driver(rows: list[dict[str, str]]) -> str | None:
    """The driver's version."""
    return rows[0]["driver_version"] if rows else None


def _tried(ask: Callable[[], Any]) -> Any:
    """What it returns; one that fails is told and not worth a run on a GPU."""
    try:
        return ask()
    except Exception as error:
        return f"unknown: {error!r}"


def _printed(*argv: str) -> str | None:
    """What a program prints; None if there is no such program, or it fails."""
    try:
        done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


if __name__ == "__main__":
    print(json.dumps(environment()))
