"""NVIDIA's apex, which is optional; PyPI's package of that name is another, so it is told by what it contains."""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastssl.errors import FastsslError

INSTALL = "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v --no-build-isolation git+https://github.com/NVIDIA/apex"


def has(package: str) -> bool | None:
    """Whether ``apex.package`` is there; None if nothing called apex is installed."""
    spec = find_spec("apex")
    if spec is None:
        return None
    return any((Path(folder) / package).is_dir() for folder in spec.submodule_search_locations or ())


def find(package: str, name: str) -> Any:
    """The class ``apex.package.name``.

    Raises:
        FastsslError: it is not installed, or has no such class; says how to install it.
    """
    there = has(package)
    if not there:
        why = "is not installed" if there is None else "is not in what is installed as apex (PyPI's is another package)"
        raise FastsslError(f"NVIDIA's apex.{package} {why}: {INSTALL}; or leave apex off")
    try:
        return getattr(import_module(f"apex.{package}"), name)
    except (ImportError, AttributeError) as error:
        said = f"apex.{package}.{name} cannot be imported ({error})"
        raise FastsslError(f"{said}: {INSTALL}; or leave apex off") from None
