"""The compiled extension `fastssl._C`: loaded if it is there, and otherwise the reason why it is not."""

import importlib
import re
import warnings
from functools import cache
from typing import Any

import torch  # before the extension, whose libraries it loads

from fastssl.kernels import unavailable as triton_unavailable

BUILD_COMMAND = "FASTSSL_REQUIRE_EXTENSION=1 pip install --no-build-isolation -e ."


@cache
def _load() -> tuple[dict[str, Any] | None, str | None]:
    """What the extension was built with, or why it cannot be used."""
    try:
        info: dict[str, Any] = importlib.import_module("fastssl._C").build_info()
    except ModuleNotFoundError:
        return None, "it was not built when fastssl was installed"
    except ImportError as error:
        return None, f"it cannot be loaded: {error}"
    release = re.match(r"[\d.]+\d", torch.__version__)
    if release is None or info["torch"] != release[0]:
        return None, f"it was built against torch {info['torch']}, but this is torch {torch.__version__}"
    return info, None


def build_info() -> dict[str, Any] | None:
    """What the extension was built with, or None without a usable one.

    Returns:
        A dictionary with ``compiler``, ``cpp_standard``, ``torch``, ``cpu_flags`` (instructions used without asking the
        processor), ``cpu_kernels`` (the instruction set that the ops' inner loops use here), ``openmp`` (whether they
        run on several threads), ``ops``, ``cuda`` (the toolkit's version or None), ``cuda_archs`` and ``cuda_driver``
        (the newest CUDA version the driver runs, or None).
    """
    return _load()[0]


def missing() -> str | None:
    """Why the extension cannot be used, or None when it can."""
    return _load()[1]


def missing_cuda() -> str | None:
    """Why the extension's CUDA kernels cannot be used, or None when they can."""
    info, why = _load()
    return why if info is None else None if info["cuda"] else "the extension was built without CUDA"


@cache
def warn_once() -> None:
    """Warn, once in a process, that a part is missing which would make the ops faster here."""
    gaps = []
    if why := missing():
        gaps.append(f"the compiled extension is missing ({why}); to build it, in the checkout: {BUILD_COMMAND}")
    if torch.version.cuda is not None and (why := triton_unavailable()):
        gaps.append(why)
    if gaps:
        message = "every op of fastssl works, but some run slower, down to plain PyTorch (`reference`): "
        warnings.warn(message + ". ".join(gaps), UserWarning, stacklevel=3)  # 3: where fastssl.ops is imported
