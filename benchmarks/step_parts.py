"""The parts of a training step, and the ranges of the profiler that tell them apart in a trace.

Hooks at the networks and wrappers around the rest open a range for each part; the innermost one counts. Autograd
numbers its nodes in the order in which the forward pass makes them. A range's name has the number with which it begins,
and that of a mark after it the number from which on nodes belong to the part around it again.
"""

import re
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from torch import nn

from fastssl import ops
from fastssl.engine.step import TrainingStep

FORWARD, MOMENTUM_FORWARD, BACKWARD = "backbone forward", "momentum backbone forward", "backbone backward"
BACKBONE = (FORWARD, MOMENTUM_FORWARD, BACKWARD)
HEADS, LOSS, SHUFFLE, QUEUE = "heads", "loss", "shuffle", "queue"
MOMENTUM, OPTIMIZER, CHECKS, REST = "momentum update", "optimizer", "gradient checks", "rest"
PARTS = (*BACKBONE, HEADS, LOSS, SHUFFLE, QUEUE, MOMENTUM, OPTIMIZER, CHECKS, REST)

STEP = "fastssl step"  # the range around each step
RANGE = re.compile(r"fastssl (?P<kind>part|mark)=(?P<part>.*) seq=(?P<number>\d+)")


class Ranges(ExitStack):
    """Opens ranges until it is closed.

    Args:
        step: whose method, optimizer and checks are followed.
    """

    def __init__(self, step: TrainingStep) -> None:
        super().__init__()
        self._open: list[tuple[str, torch.autograd.profiler.record_function]] = []
        method = step.method
        self._follow(method, LOSS)  # what is in its forward and in no network is the loss
        for name, module in method.named_modules():
            kind = name.rpartition(".")[2]
            if kind in ("projector", "predictor"):
                self._follow(module, HEADS)
            elif kind == "backbone":
                trained = any(parameter.requires_grad for parameter in module.parameters())
                self._follow(module, FORWARD if trained else MOMENTUM_FORWARD)
        self.callback(step.optimizer.register_step_pre_hook(lambda *_: self._enter(OPTIMIZER)).remove)
        self.callback(step.optimizer.register_step_post_hook(lambda *_: self._leave()).remove)
        self._wrap(step, "_finite", CHECKS)
        self._wrap(method, "after_step", MOMENTUM)
        if hasattr(method, "queue"):
            self._wrap(method.queue, "enqueue_", QUEUE)  # called in after_step
        for name in ("shuffle_batch", "unshuffle_and_gather"):
            self._wrap(ops, name, SHUFFLE)

    def _enter(self, part: str) -> None:
        opened = _range("part", part)
        opened.__enter__()
        self._open.append((part, opened))

    def _leave(self) -> None:
        self._open.pop()[1].__exit__(None, None, None)
        with _range("mark", self._open[-1][0] if self._open else REST):
            pass

    def _follow(self, module: nn.Module, part: str) -> None:
        def enter(*_: Any) -> None:
            if not _in_backward():  # where activations are computed once more, for the node that needs them
                self._enter(part)

        def leave(*_: Any) -> None:
            if not _in_backward():
                self._leave()

        self.callback(module.register_forward_pre_hook(enter).remove)
        self.callback(module.register_forward_hook(leave, always_call=True).remove)

    def _wrap(self, owner: Any, name: str, part: str) -> None:
        function: Callable[..., Any] = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self._enter(part)
            try:
                return function(*args, **kwargs)
            finally:
                self._leave()

        self.enter_context(mock.patch.object(owner, name, wrapped))


def _range(kind: str, part: str) -> torch.autograd.profiler.record_function:
    return torch.profiler.record_function(f"fastssl {kind}={part} seq={torch._C._autograd._get_sequence_nr()}")


def _in_backward() -> bool:
    return bool(torch._C._current_graph_task_id() != -1)
