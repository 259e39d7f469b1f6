"""Activation checkpointing: a block keeps its input only and runs again in the backward pass (arXiv:1604.06174)."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock, Bottleneck

from fastssl.errors import FastsslError


def checkpoint_activations(backbone: nn.Module) -> None:
    """Make every residual block of `backbone` keep its input only, and run again in the backward pass, in place.

    Memory for activations falls to about the blocks' inputs and one block; a step takes about a third longer.
    Outputs, gradients and batch-norm statistics stay the same to the bit: running again moves no statistics.

    Args:
        backbone: a torchvision ResNet, our SmallResNet, or a model of timm that can do it.

    Raises:
        FastsslError: any other network.
    """
    if callable(getattr(backbone, "set_grad_checkpointing", None)):
        _checkpoint_timm(backbone)
        return
    blocks = [block for block in backbone.modules() if isinstance(block, (BasicBlock, Bottleneck))]
    for block in blocks:
        kind = CHECKPOINTED.get(type(block))
        if kind is not None:
            block.__class__ = kind
        elif not isinstance(block, _Checkpointed):
            raise FastsslError(f"cannot checkpoint the activations of {type(block).__name__}, a block of its own kind")
    if not blocks:
        raise FastsslError(
            f"cannot checkpoint the activations of {type(backbone).__name__}: it has no residual blocks of "
            "torchvision, and no set_grad_checkpointing as timm's models have; leave checkpoint_activations off"
        )


# A block changes its class, which keeps the names of its parameters, and its copies are checkpointed by themselves.
class _Checkpointed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        # The compiler runs a block twice without moving its buffers twice, and takes no contexts.
        contexts: Any = {} if torch.compiler.is_compiling() else {"context_fn": partial(_contexts, self)}
        return checkpoint(super().forward, x, use_reentrant=False, preserve_rng_state=True, **contexts)


class CheckpointedBasicBlock(_Checkpointed, BasicBlock):
    """torchvision's BasicBlock, checkpointed."""


class CheckpointedBottleneck(_Checkpointed, Bottleneck):
    """torchvision's Bottleneck, checkpointed."""


CHECKPOINTED: dict[type[nn.Module], type[nn.Module]] = {
    BasicBlock: CheckpointedBasicBlock,
    Bottleneck: CheckpointedBottleneck,
}


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Of the forward pass and of running again."""
    return nullcontext(), _statistics_set_aside(block)


@contextmanager
def _statistics_set_aside(module: nn.Module) -> Iterator[None]:
    """Let the batch norms of `module` write to copies of their buffers; afterwards they have their own again.

    A momentum of 0 would not do for all kinds of batch norm, and the buffers would be written to.
    """
    norms = [norm for norm in module.modules() if isinstance(norm, _BatchNorm) and norm.training]
    buffers = [norm._buffers for norm in norms]
    for norm in norms:
        norm._buffers = {name: None if b is None else b.clone() for name, b in norm._buffers.items()}
    try:
        yield
    finally:
        for norm, own in zip(norms, buffers, strict=True):
            norm._buffers = own


def _checkpoint_timm(backbone: nn.Module) -> None:
    """By timm's own means, which take no contexts: the modules themselves notice that they run again."""
    try:
        backbone.set_grad_checkpointing(True)  # type: ignore[operator]
    except AssertionError as error:  # the way of timm
        raise FastsslError(f"cannot checkpoint the activations of {type(backbone).__name__}: {error}") from None
    for module in backbone.modules():
        if any(isinstance(part, _BatchNorm) for part in module.modules()) and "_aside" not in vars(module):
            module._aside = []  # type: ignore[assignment]
            module.register_forward_pre_hook(_set_aside)
            module.register_forward_hook(_put_back, always_call=True)  # also when checkpoint stops it half-way


def _set_aside(module: nn.Module, _: Any) -> None:
    # A forward pass inside of a backward pass.
    if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
        aside = _statistics_set_aside(module)
        aside.__enter__()
        module._aside.append(aside)  # type: ignore[operator, union-attr]


def _put_back(module: nn.Module, *_: Any) -> None:
    if module._aside:
        module._aside.pop().__exit__(None, None, None)  # type: ignore[operator, union-attr]
