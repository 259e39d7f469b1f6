"""Which part of a training an operation belongs to: by module in the forward, by graph node in the backward pass."""

import sys
from bisect import bisect_right
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import nn

BACKBONE, MOMENTUM_BACKBONE = "backbone", "momentum backbone"
HEADS, MOMENTUM_HEADS = "heads", "momentum heads"
NETWORK = (BACKBONE, MOMENTUM_BACKBONE, HEADS, MOMENTUM_HEADS)
LOSS, MOMENTUM, QUEUE, SHUFFLE = "loss", "momentum update", "queue", "shuffle"
OPTIMIZER, GRADIENTS, CHECK, SYNC_BN, INPUTS = "optimizer", "gradients", "check", "sync batch norm", "inputs"
HEADER, KEYS = "shuffle header", "keys"  # collectives of shuffle-BN beside that of the images
ADDED = (LOSS, MOMENTUM, QUEUE, SHUFFLE, HEADER, KEYS)  # what self-supervision adds around the networks
# The innermost of these files on the stack says what is going on outside the networks.
FILES = (
    ("fastssl/ops/shuffle.py", SHUFFLE),
    ("fastssl/ops/queue.py", QUEUE),
    ("fastssl/ops/ema.py", MOMENTUM),
    ("fastssl/methods/byol.py", LOSS),
    ("fastssl/methods/moco.py", LOSS),
    ("torch/optim/", OPTIMIZER),
    ("fastssl/engine/optimizers.py", OPTIMIZER),
    ("torch/nn/parallel/distributed.py", GRADIENTS),
    ("torch/distributed/utils.py", GRADIENTS),
    ("torch/amp/grad_scaler.py", CHECK),
    ("fastssl/engine/step.py", CHECK),
)
_SHUFFLES = {"unshuffle_and_gather": KEYS, "__init__": HEADER}  # functions of ops/shuffle.py that call collectives
SYNC_BN_FILES = ("fastssl/models/sync_batch_norm.py", "torch/nn/modules/_functions.py")
_BETWEEN = ("fastssl/planning/", "torch/utils/", "torch/_dynamo/", "torch/_compile.py", "torch/_ops.py")


class Parts:
    """Follows a method while it runs.

    Args:
        method: with modules called backbone, projector or predictor; those that take no gradient are the momentum
            encoder's.
    """

    def __init__(self, method: nn.Module) -> None:
        self._stack: list[str] = []
        self._marks: list[tuple[int, str]] = [(0, LOSS)]  # from which node on, by sequence number, which part
        self._handles: list[Any] = []
        for name, module in method.named_modules():
            part = _part_of(name, module)
            if part:
                self._handles += [
                    module.register_forward_pre_hook(self._enter(part)),
                    module.register_forward_hook(self._leave, always_call=True),
                ]

    def close(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()

    def current(self) -> tuple[str, bool]:
        """The part of the operation that is called now, and whether in the backward pass."""
        backward = torch._C._current_graph_task_id() != -1
        if self._stack:  # in the backward pass: activations computed once more
            return self._stack[-1], backward
        if backward:
            return self._of_node(torch._C._current_autograd_node()), True
        return by_file(), False

    def _of_node(self, node: Any) -> str:
        number = node._sequence_nr() if node is not None else None
        if number is None or number >= 2**62:  # a leaf, where gradients arrive: DistributedDataParallel's hooks
            return GRADIENTS
        return self._marks[bisect_right(self._marks, number, key=lambda mark: mark[0]) - 1][1]

    def _enter(self, part: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any) -> None:
            self._stack.append(part)
            self._marks.append((torch._C._autograd._get_sequence_nr(), part))

        return hook

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._stack.pop()
        outer = self._stack[-1] if self._stack else LOSS
        self._marks.append((torch._C._autograd._get_sequence_nr(), outer))


def by_file() -> str:
    """The part by the innermost known file on the stack; the loss where none is."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        for file, part in FILES:
            if file in name:
                return part
        frame = frame.f_back
    return LOSS


def collective_label(part: str) -> str:
    """What a collective is for: batch norm's are called inside a network, shuffle-BN has several."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and part in (*NETWORK, SHUFFLE):
        code = frame.f_code
        if code.co_filename.endswith(SYNC_BN_FILES):
            return SYNC_BN
        if code.co_filename.endswith("fastssl/ops/shuffle.py") and code.co_name in _SHUFFLES:
            return _SHUFFLES[code.co_name]
        frame = frame.f_back
    return part


def calling_file() -> str:
    """The file from which an operation was called, whatever stands between."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and any(part in frame.f_code.co_filename for part in _BETWEEN):
        frame = frame.f_back
    return "" if frame is None else frame.f_code.co_filename


def _part_of(name: str, module: nn.Module) -> str | None:
    kind = name.rpartition(".")[2]
    if kind not in ("backbone", "projector", "predictor"):
        return None
    trained = any(p.requires_grad for p in module.parameters())
    if kind == "backbone":
        return BACKBONE if trained else MOMENTUM_BACKBONE
    return HEADS if trained else MOMENTUM_HEADS
