"""Memory of a step: every block as it comes and goes, and what it holds where it is fullest."""

import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import Tensor

WEIGHTS, MOMENTUM_WEIGHTS, BUFFERS, QUEUE = "weights", "momentum weights", "buffers", "queue"
GRADIENTS, OPTIMIZER, INPUTS = "gradients", "optimizer", "inputs"
ACTIVATIONS, LOSS, SHUFFLE, TEMPORARY = "activations", "loss", "shuffle", "temporary"
FIXED = (WEIGHTS, MOMENTUM_WEIGHTS, BUFFERS, QUEUE, GRADIENTS, OPTIMIZER)  # whatever the batch


class Block:
    """A piece of memory.

    Attributes:
        bytes: its size.
        kind: what lies in it; may be told later.
    """

    __slots__ = ("bytes", "kind")

    def __init__(self, size: int, kind: str) -> None:
        self.bytes, self.kind = size, kind


class Blocks:
    """The memory behind tensors: a block lives as long as the last tensor that views it."""

    def __init__(self) -> None:
        self._alive: dict[int, Block] = {}
        self._start: list[Block] = []
        self._log: list[tuple[Block, int]] = []

    def add(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Take note of tensors; those seen before keep their kind."""
        for x in tensors:
            storage = x.untyped_storage()
            key = storage._cdata
            if key not in self._alive and storage.nbytes():
                block = self._alive[key] = Block(storage.nbytes(), kind)
                self._log.append((block, block.bytes))
                weakref.finalize(storage, self._forget, key)

    def tell(self, tensors: Iterable[Tensor], kind: str, unless: str | None = None) -> None:
        """Say what tensors seen before are, unless they are of the kind `unless`."""
        for x in tensors:
            block = self._alive.get(x.untyped_storage()._cdata)
            if block is not None and block.kind != unless:
                block.kind = kind

    def start(self) -> None:
        """Forget what came and went so far."""
        self._start, self._log = list(self._alive.values()), []

    def peak(self) -> dict[str, int]:
        """Bytes by kind at the moment when there were most, since `start`."""
        now: Counter[str] = Counter()
        for block in self._start:
            now[block.kind] += block.bytes
        highest, most, total = dict(now), sum(now.values()), sum(now.values())
        for block, change in self._log:
            now[block.kind] += change
            total += change
            if total > most:
                highest, most = dict(now), total
        return {kind: size for kind, size in highest.items() if size}

    def _forget(self, key: Any) -> None:
        block = self._alive.pop(key)
        self._log.append((block, -block.bytes))
