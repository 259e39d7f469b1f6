"""What the methods with a momentum encoder share: the copy, and buffers that every process keeps for itself."""

import copy

from torch import nn
from torch.nn.parallel import DistributedDataParallel


def momentum_copy(network: nn.Module) -> nn.Module:
    """A copy that takes no gradient: it moves by `ema_update_` alone, its batch-norm buffers by its own batches."""
    return copy.deepcopy(network).requires_grad_(False)


def keep_buffers_local(method: nn.Module) -> None:
    """Exclude the buffers (queue, batch-norm statistics) from DistributedDataParallel's broadcast.

    It would copy rank 0's over the others at every forward, and hide that they differ.
    """
    names = [name for name, _ in method.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(method, names)
