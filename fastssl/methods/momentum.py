"""A network and the momentum copy of it that gives the keys or targets."""

import copy

from torch import nn


def momentum_copy(network: nn.Module) -> nn.Module:
    """A copy that takes no gradient: it moves by `ema_update_` alone, its batch-norm buffers by its own batches."""
    return copy.deepcopy(network).requires_grad_(False)
