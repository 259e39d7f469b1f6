"""Synchronised batch norm as on a GPU: torch's own function, for whose CUDA kernels the shapes are told here."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm as Function
from torch.nn.modules.batchnorm import _BatchNorm

from fastssl.models.sync_batch_norm import SyncBatchNorm

ATEN = torch.ops.aten
FILE = "torch/nn/modules/_functions.py"


class _OnGpu(_BatchNorm):
    """Runs what torch's SyncBatchNorm runs on a GPU; by itself torch's refuses anything that is on a CPU."""

    process_group: dist.ProcessGroup | None

    def forward(self, x: Tensor) -> Tensor:
        group = dist.group.WORLD if self.process_group is None else self.process_group
        world = dist.get_world_size(group)
        if not self.training or world == 1:
            return super().forward(x)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        y: Tensor = Function.apply(
            x, self.weight, self.bias, self.running_mean, self.running_var, self.eps, self.momentum, group, world
        )
        return y

    def _check_input_dim(self, x: Tensor) -> None:
        """Any will do."""


def as_on_a_gpu(method: nn.Module) -> None:
    """Let the synchronised batch norms of `method` run what they run on a GPU, not what they run on fake tensors."""
    for module in method.modules():
        if isinstance(module, SyncBatchNorm):
            module.__class__ = _OnGpu  # type: ignore[assignment]


def kernel(func: Any, args: Any) -> Any:
    """What a CUDA kernel of synchronised batch norm returns, by shape; None for any other operation."""
    if func is ATEN.batch_norm_stats.default:
        return args[0].new_empty((2, args[0].shape[1]), dtype=torch.float32).unbind()
    if func is ATEN.batch_norm_gather_stats_with_counts.default:
        return torch.empty_like(args[1][0]), torch.empty_like(args[1][0])
    if func in (ATEN.batch_norm_elemt.default, ATEN.batch_norm_backward_elemt.default):
        return torch.empty_like(args[0])
    if func is ATEN.batch_norm_backward_reduce.default:
        return tuple(torch.empty_like(args[2]) for _ in range(4))
    return None


def is_choice_of_ranks(func: Any, args: Any, file: str) -> bool:
    """Whether this picks the ranks that have images, all of them here; on a GPU the host waits for it."""
    if func is not ATEN.index.Tensor or not file.endswith(FILE):
        return False
    return any(x is not None and x.dtype is torch.bool for x in args[1])
