"""Batch norm over parts of the batch: the statistics of many GPUs on one (MoCo's authors' CIFAR-10 notebook)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.errors import FastsslError


class SplitBatchNorm2d(nn.BatchNorm2d):
    """Normalises `splits` contiguous, equal parts of the batch by themselves in training; plain batch norm otherwise.

    Running statistics are the mean over the parts, as the buffers of one process would be after all parts passed.

    Args:
        num_features: C, channels.
        splits: parts; the batch must be divisible by it.

    Raises:
        FastsslError: in `forward`, when the batch cannot be split evenly.
    """

    def __init__(self, num_features: int, splits: int, **options: float) -> None:
        super().__init__(num_features, **options)  # type: ignore[arg-type]
        self.splits = splits

    def forward(self, x: Tensor) -> Tensor:
        """N×C×H×W, normalised."""
        if not self.training:
            return super().forward(x)
        if len(x) % self.splits:
            raise FastsslError(f"bn_splits {self.splits} does not divide the batch of {len(x)}")
        mean, var = self.running_mean, self.running_var
        assert mean is not None and var is not None and self.num_batches_tracked is not None
        # Each part moves a copy of the running statistics, as each GPU would; what is kept is the copies' mean.
        means, variances = mean.repeat(self.splits, 1), var.repeat(self.splits, 1)
        momentum = 0.1 if self.momentum is None else self.momentum
        parts = [
            F.batch_norm(part, means[i], variances[i], self.weight, self.bias, True, momentum, self.eps)
            for i, part in enumerate(x.chunk(self.splits))
        ]
        with torch.no_grad():
            mean.copy_(means.mean(0))
            var.copy_(variances.mean(0))
            self.num_batches_tracked.add_(1)
        return torch.cat(parts)


def split_batch_norms(network: nn.Module, splits: int) -> nn.Module:
    """Replace every BatchNorm2d of `network`, in place, by one over `splits` parts with the same weights and buffers.

    Raises:
        FastsslError: `splits` is below 1, or the network has no BatchNorm2d to split.
    """
    if splits < 1:
        raise FastsslError(f"bn_splits must be 1 or more, got {splits}")
    if splits == 1:
        return network
    found = False
    for module in list(network.modules()):
        for name, child in module.named_children():
            if type(child) is nn.BatchNorm2d:
                split = SplitBatchNorm2d(
                    child.num_features,
                    splits,
                    eps=child.eps,
                    momentum=0.1 if child.momentum is None else child.momentum,
                )
                split.load_state_dict(child.state_dict())
                split.to(child.weight.device, child.weight.dtype)
                setattr(module, name, split)
                found = True
    if not found:
        raise FastsslError(f"bn_splits {splits}: {type(network).__name__} has no BatchNorm2d; use bn_splits 1")
    return network
