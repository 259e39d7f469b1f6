"""What the training runs on: the device, the precision that is fastest there, and the CPU's memory allocator."""

import ctypes
import os
import platform

import torch

from fastssl.errors import FastsslError


def select_device(gpus: int | None, local_rank: int = 0) -> torch.device:
    """The device of a process for ``--gpus``: None or 1 and more is a GPU if there is one, 0 the CPU.

    Args:
        gpus: as asked for.
        local_rank: number of the process on this machine.

    Raises:
        FastsslError: more GPUs are asked for than exist.
    """
    available = torch.cuda.device_count()
    wanted = available if gpus is None else gpus
    if wanted < 0:
        raise FastsslError(f"gpus must be 0 or more, got {wanted}")
    if wanted > available:
        there = f"{available} GPU{'s' * (available != 1)}"
        raise FastsslError(f"gpus {wanted} asks for more than the {there} of this machine: use --gpus {available}")
    if wanted and local_rank >= available:
        raise FastsslError(
            f"process {local_rank} of this machine has no GPU, there are {available}: start one process a GPU"
        )
    return torch.device("cuda", local_rank) if wanted else torch.device("cpu")


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The dtype to autocast to, or None for plain float32.

    "auto" takes bfloat16 where the hardware multiplies it faster than float32: GPUs from sm_80, CPUs with AVX512-BF16
    or AMX. A CPU without them emulates it several times slower.
    """
    if precision == "float32":
        return None
    if precision in ("bfloat16", "float16"):
        return torch.bfloat16 if precision == "bfloat16" else torch.float16
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else None
    return torch.bfloat16 if cpu_has_bfloat16() else None


def be_deterministic() -> None:
    """Let torch refuse or replace algorithms that do not give the same bits every time."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its first product
    torch.use_deterministic_algorithms(True)


def cpu_has_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16 products."""
    return torch.backends.mkldnn.is_available() and not _cpu_flags().isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})


def _cpu_flags() -> set[str]:
    try:
        with open("/proc/cpuinfo") as file:
            lines = [line for line in file if line.lower().startswith(("flags", "features"))]
    except OSError:
        return set()
    return set(lines[0].split(":", 1)[1].split()) if lines else set()


def keep_freed_memory() -> None:
    """Tell glibc to keep the memory of freed tensors for the next ones.

    By default every large tensor is mapped anew and given back at once, and each of its pages costs a fault: with
    it, augmentation on a CPU runs up to four times slower. Does nothing on another C library.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4  # malloc.h
    libc = ctypes.CDLL(None)
    libc.mallopt(m_mmap_max, 0)
    libc.mallopt(m_trim_threshold, 2**31 - 1)
    libc.mallopt(m_top_pad, 64 * 2**20)
