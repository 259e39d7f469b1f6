"""Who is compared with us: how each peer is found, and why it cannot take part if it cannot.

A peer is used as its own documentation says. `pip install 'fastssl[bench]'` brings those that PyPI has.
"""

from importlib import import_module
from types import ModuleType

import pytest

from fastssl.apex import has as apex_has

MISSING = "{} is not installed: pip install 'fastssl[bench]'"


def peer(module: str, package: str | None = None) -> ModuleType:
    """The module, or skip: `package` is not installed."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name == module.partition(".")[0]
        pytest.skip(MISSING.format(package or module) if missing else f"{module} cannot be imported: {error}")
    except ImportError as error:
        pytest.skip(f"{module} cannot be imported: {error}")


def apex() -> ModuleType:
    """NVIDIA's apex with its compiled multi-tensor functions, told by what it contains."""
    reason = "NVIDIA's apex with its CUDA extensions is not installed (PyPI's apex is another package)"
    if not apex_has("multi_tensor_apply"):
        pytest.skip(reason)
    return peer("amp_C", "NVIDIA's apex with CUDA extensions")
