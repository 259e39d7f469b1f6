"""Who is compared with us: how each peer is found, and why it cannot take part if it cannot.

A peer is used as its own documentation says. `pip install 'fastssl[bench]'` brings those that PyPI has.
"""

from types import ModuleType

import pytest

from fastssl.apex import has as apex_has

MISSING = "{} is not installed: pip install 'fastssl[bench]'"


def peer(module: str, package: str | None = None) -> ModuleType:
    """The module, or skip: `package` is not installed."""
    found: ModuleType = pytest.importorskip(module, reason=MISSING.format(package or module))
    return found


def memeff() -> ModuleType:
    """MemoryEfficientCLIP, which is a repository without a package: a clone beside what runs, under that name."""
    reason = "MemoryEfficientCLIP is not there: clone its repository, it is not on PyPI"
    found: ModuleType = pytest.importorskip("MemoryEfficientCLIP", reason=reason)
    return found


def apex() -> ModuleType:
    """NVIDIA's apex with its compiled multi-tensor functions, told by what it contains."""
    reason = "NVIDIA's apex with its CUDA extensions is not installed (PyPI's apex is another package)"
    if not apex_has("multi_tensor_apply"):
        pytest.skip(reason)
    found: ModuleType = pytest.importorskip("amp_C", reason=reason)
    return found
