"""Triton device code and its launch configurations: the `triton` backend of the ops. Importing it needs no Triton."""

from functools import cache

OLDEST = (3, 6)


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
