"""Batch norm over the batches of all processes: torch's on GPUs, the same function elsewhere, or NVIDIA apex's."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from fastssl.apex import find as find_apex
from fastssl.errors import FastsslError
from fastssl.models.split_batch_norm import SplitBatchNorm2d
from fastssl.ops.reference import gather, in_float, world_size

CONVERTED = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class SyncBatchNorm(_BatchNorm):
    """torch's SyncBatchNorm that also runs on the CPU (gloo), where torch's own raises.

    In training, x is normalised by the mean and variance of the values of all processes of `process_group`; what each
    process has of them is combined as in Chan et al. (1979, "Updating formulae", equation 2.1), so batches may differ
    in size. Statistics are float32 for half inputs. The gradients of weight and bias are of this process's values, as
    torch's are: DistributedDataParallel averages them. In evaluation, alone, or in a group of one: plain batch norm.

    It is not a subclass of torch's, because DistributedDataParallel refuses those on the CPU.

    Args:
        num_features: C, channels; the others are torch's too, and `process_group` (None: all processes).

    Raises:
        ValueError: in `forward`, for fewer than two values per channel in all processes together.
    """

    _check_input_dim: Any = nn.SyncBatchNorm._check_input_dim
    _check_non_zero_input_channels: Any = nn.SyncBatchNorm._check_non_zero_input_channels

    def __init__(
        self, num_features: int, *options: Any, process_group: dist.ProcessGroup | None = None, **more: Any
    ) -> None:
        super().__init__(num_features, *options, **more)
        self.process_group = process_group

    def forward(self, x: Tensor) -> Tensor:
        """N×C or N×C×…, normalised; layout and dtype are those of `x`."""
        if x.device.type != "cpu" and not isinstance(x, FakeTensor):
            return nn.SyncBatchNorm.forward(self, x)  # type: ignore[arg-type]
        if not self.training or world_size(self.process_group) == 1:
            return _BatchNorm.forward(self, x)
        self._check_input_dim(x)
        self._check_non_zero_input_channels(x)
        with torch.no_grad():
            mean, squares, count = _statistics(x, self.process_group)
            self._track(mean, squares / (count - 1))
        return _Normalise.apply(x, self.weight, self.bias, mean, squares / count, count, self.eps, self.process_group)

    def _track(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running statistics; `variance` is the unbiased one."""
        if not self.track_running_stats:
            return
        assert self.num_batches_tracked is not None and self.running_mean is not None and self.running_var is not None
        self.num_batches_tracked.add_(1)
        # A tensor where the mean is cumulative: reading the count would make the host wait for the device.
        factor = 1 / self.num_batches_tracked.double() if self.momentum is None else self.momentum
        for running, now in ((self.running_mean, mean), (self.running_var, variance)):
            running.mul_(1 - factor).add_(factor * now)

    def __deepcopy__(self, memo: dict[int, Any]) -> "SyncBatchNorm":
        """A copy in the same process group, which cannot be copied itself."""
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        memo[id(self.process_group)] = self.process_group
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return copied


class _Normalise(torch.autograd.Function):
    """y = (x − mean)/√(var + eps)·weight + bias, where mean and var are functions of all processes' x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        variance: Tensor,
        count: Tensor,
        eps: float,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, variance, count)
        ctx.eps, ctx.group = eps, group
        weight, bias = (None if p is None else p.to(mean.dtype) for p in (weight, bias))
        return F.batch_norm(in_float(x), mean, variance, weight, bias, eps=eps).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """dx = (dy − Σdy/n − x̂·Σ(dy·x̂)/n)·weight/√(var + eps), sums and n over all processes (Ioffe and Szegedy).

        The paper is arXiv:1502.03167; these are the gradients of its section 3, put together.
        """
        x, weight, mean, variance, count = ctx.saved_tensors
        dy_wide = in_float(dy)
        x_hat = F.batch_norm(in_float(x), mean, variance, eps=ctx.eps)
        dims = _all_but_channels(x)
        sums = torch.stack([dy_wide.sum(dims), (dy_wide * x_hat).sum(dims)])  # 2×C
        d_bias, d_weight = (s if weight is None else s.to(weight.dtype) for s in sums.clone())
        dx = None
        if ctx.needs_input_grad[0]:
            dist.all_reduce(sums, group=ctx.group)
            mean_dy, mean_dy_x = sums / count
            scale = -torch.rsqrt(variance + ctx.eps)
            if weight is not None:
                scale = scale * weight
            # In the place of x̂: it has the layout of x.
            x_hat.mul_(_over(x, mean_dy_x)).add_(_over(x, mean_dy)).sub_(dy_wide).mul_(_over(x, scale))
            dx = x_hat.to(x.dtype)
        needs_weight, needs_bias = ctx.needs_input_grad[1:3]
        return dx, d_weight if needs_weight else None, d_bias if needs_bias else None, None, None, None, None, None


def _statistics(x: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor]:
    """Of all processes' values: the mean, C, the sum of squared deviations from it, C, and the count, a 0-d tensor."""
    size, wide, dims = x.numel() // x.shape[1], in_float(x), _all_but_channels(x)
    mean = wide.sum(dims) / max(size, 1)
    # Two passes: five times as fast on the CPU as torch.var_mean, and as exact.
    squares = (wide - _over(x, mean)).square_().sum(dims)
    mine = torch.cat([mean, squares, mean.new_full((1,), size)])
    means, parts, counts = gather(mine[None], group).split([len(mean), len(mean), 1], dim=1)  # one row a process
    count = counts.sum()
    if size < 2 and not isinstance(x, FakeTensor) and count < 2:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {tuple(x.shape)}")
    mean = (counts * means).sum(0) / count
    return mean, (parts + counts * (means - mean).square()).sum(0), count


def _all_but_channels(x: Tensor) -> list[int]:
    return [0, *range(2, x.ndim)]


def _over(x: Tensor, channels: Tensor) -> Tensor:
    """C values in the shape that broadcasts over `x`."""
    return channels.view(-1, *[1] * (x.ndim - 2))


def sync_batch_norms(network: nn.Module, group: dist.ProcessGroup | None = None, *, apex: bool = False) -> nn.Module:
    """Replace every batch norm of `network`, in place, by one over the batches of all processes.

    Parameters, buffers and hooks are the same objects afterwards, so a state_dict or an optimizer keeps fitting.

    Args:
        network: with BatchNorm1d, 2d or 3d; if it is one itself, what is returned takes its place.
        group: the processes that share statistics (`batch_norm_group`); None: all.
        apex: use apex.parallel.SyncBatchNorm of NVIDIA apex, which runs on CUDA only and, with a `group`, cannot be
            deep-copied: replace after the momentum copy is made.

    Raises:
        FastsslError: there is no batch norm, or one of another kind, as bn_splits makes; or apex is missing.
    """
    make = _apex_batch_norm(group) if apex else lambda old: SyncBatchNorm(old.num_features, device="meta")
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    _check_kinds(network, norms)
    replacements: dict[nn.Module, nn.Module] = {}
    for old in norms:
        new = make(old)
        vars(new).update(vars(old))
        new.process_group = group  # type: ignore[assignment]
        replacements[old] = new
    for module in list(network.modules()):
        for name, child in module._modules.items():
            if child in replacements:
                module._modules[name] = replacements[child]
    return replacements.get(network, network)


def _check_kinds(network: nn.Module, norms: list[_BatchNorm]) -> None:
    if not norms:
        raise FastsslError(f"{type(network).__name__} has no batch norm to synchronise; leave sync_bn off")
    for norm in norms:
        if isinstance(norm, SplitBatchNorm2d):
            raise FastsslError(
                f"bn_splits {norm.splits} and sync_bn exclude each other: statistics are either of a part of one "
                "process's batch or of the batches of all; use one of the two"
            )
        if type(norm) not in (*CONVERTED, SyncBatchNorm):
            known = ", ".join(kind.__name__ for kind in CONVERTED)
            raise FastsslError(f"cannot synchronise {type(norm).__name__}, only {known}; leave sync_bn off")


def _apex_batch_norm(group: dist.ProcessGroup | None) -> Callable[[_BatchNorm], nn.Module]:
    kind = find_apex("parallel", "SyncBatchNorm")
    return lambda old: kind(
        old.num_features, old.eps, old.momentum, old.affine, old.track_running_stats, process_group=group
    )


def batch_norm_group(size: int) -> dist.ProcessGroup | None:
    """The process group of this rank when batch norm is synchronised among `size` consecutive ranks.

    All ranks must call it, since making a group takes all of them.

    Args:
        size: ranks that share statistics; 0 or all of them: None, which stands for all.

    Raises:
        FastsslError: `size` is negative or does not divide the number of processes.
    """
    world = world_size(None)
    if size in (0, world):
        return None
    if size < 0 or world % size:
        raise FastsslError(f"bn_group {size} must divide the number of processes, {world} (0: all of them in one)")
    group, _ = dist.new_subgroups(size)
    return group
