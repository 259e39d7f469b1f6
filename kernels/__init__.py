"""Triton device code and its launch configurations: the `triton` backend of the ops. Importing it needs no Triton."""

import os
from functools import cache

OLDEST = (3, 6)


def interpreted() -> bool:
    """Whether Triton interprets its kernels in Python, on CPU tensors too; it decides so when it is imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


@cache
def unavailable() -> str | None:
    """Why Triton cannot be used in this installation, or None when it can."""
    try:
        import triton
    except ImportError as error:
        return f"Triton cannot be imported ({error}); pip install 'fastssl[triton]'"
    if tuple(map(int, triton.__version__.split(".")[:2])) < OLDEST:
        return f"Triton {triton.__version__} is too old; pip install 'fastssl[triton]'"
    return None
