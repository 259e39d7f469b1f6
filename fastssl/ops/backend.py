"""Which implementation of an op runs: chosen by device and dtype, or named by ``use_backend`` / ``FASTSSL_BACKEND``."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from fastssl.errors import FastsslError

# In order of preference. `reference` is eager PyTorch and runs everywhere, so a choice always exists. `native` stands
# before `triton` because on a CPU the latter is the interpreter.
BACKENDS = ("cuda", "native", "triton", "reference")


@dataclass(frozen=True)
class Implementation:
    """One backend of one op, and where it can run."""

    function: Callable[..., Any]
    devices: frozenset[str] | None = None  # None: any
    dtypes: frozenset[torch.dtype] | None = None
    missing: str | None = None  # why this installation cannot run it, or None
    unsuited: Callable[[torch.device], str | None] | None = None  # why a device of the right kind cannot, or None

    def refuses(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why this implementation cannot run on `device` and `dtype`, or None when it can."""
        if self.missing:
            return self.missing
        if self.devices is not None and device.type not in self.devices:
            return f"it runs on {', '.join(sorted(self.devices))}, not on {device.type}"
        if self.dtypes is not None and dtype not in self.dtypes:
            return f"it takes {', '.join(sorted(map(str, self.dtypes)))}, not {dtype}"
        return None if self.unsuited is None else self.unsuited(device)


_implementations: dict[str, dict[str, Implementation]] = {}
_forced: str | None = None  # of the whole process; a plain name, for torch.compile before 2.12 knows no ContextVar


def register(op: str, backend: str, implementation: Implementation) -> None:
    """Make `implementation` the `backend` of `op`."""
    _implementations.setdefault(op, {})[_known(backend)] = implementation


def ops() -> list[str]:
    """The names of all registered ops."""
    return sorted(_implementations)


def requested() -> str | None:
    """The backend asked for by ``use_backend`` or ``FASTSSL_BACKEND``; None when the choice is free."""
    forced = _forced or os.environ.get("FASTSSL_BACKEND") or None
    return None if forced is None else _known(forced)


def choose(op: str, device: torch.device, dtype: torch.dtype) -> str:
    """The name of the backend that will run `op`.

    Raises:
        FastsslError: a backend was asked for that cannot run here; the message says why.
    """
    candidates = _implementations[op]
    name = requested()
    if name is not None:
        if name not in candidates:
            raise FastsslError(f"{op} has no backend '{name}'; it has: {', '.join(sorted(candidates))}")
        why = candidates[name].refuses(device, dtype)
        if why:
            raise FastsslError(f"backend '{name}' of {op} cannot run: {why}")
        return name
    return next(b for b in BACKENDS if b in candidates and candidates[b].refuses(device, dtype) is None)


def implementation(op: str, device: torch.device, dtype: torch.dtype) -> Callable[..., Any]:
    """The function of the backend that `choose` names."""
    return _implementations[op][choose(op, device, dtype)].function


def only_reference(op: str, why: str) -> Callable[..., Any]:
    """The `reference` of `op`, for inputs that no other backend computes.

    Raises:
        FastsslError: another backend was asked for.
    """
    name = requested()
    if name not in (None, "reference"):
        raise FastsslError(f"backend '{name}' of {op} cannot run: {why}; with use_backend(\"reference\") it can")
    return _implementations[op]["reference"].function


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op inside the ``with`` block on the backend `name`; wins over ``FASTSSL_BACKEND``.

    It holds for all threads of the process, so blocks of several threads must not overlap.

    Raises:
        FastsslError: `name` is not a backend; inside the block, an op that cannot run on it says why.

    Example:
        >>> from fastssl.ops import use_backend
        >>> with use_backend("reference"):
        ...     pass
    """
    global _forced
    before, _forced = _forced, _known(name)
    try:
        yield
    finally:
        _forced = before


def _known(name: str) -> str:
    if name not in BACKENDS:
        raise FastsslError(f"unknown backend '{name}'; known are {', '.join(reversed(BACKENDS))}")
    return name
