"""BYOL's loss: the squared distance between two normalised vectors."""

from torch import Tensor

from fastssl.errors import FastsslError
from fastssl.ops import backend, reference

backend.register("normalized_mse", "reference", backend.Implementation(reference.normalized_mse))


def normalized_mse(prediction: Tensor, target: Tensor) -> Tensor:
    """2 - 2·cos(prediction, target) for every row; no gradient flows to `target` (BYOL, arXiv:2006.07733, eq. 2).

    Args:
        prediction: N×D.
        target: N×D, of the same dtype.

    Returns:
        N losses in 0…4.

    Raises:
        ValueError: the shapes or dtypes differ, or there are not two dimensions.

    Example:
        >>> import torch
        >>> loss = normalized_mse(torch.randn(32, 256), torch.randn(32, 256)).mean()
    """
    if prediction.dim() != 2 or prediction.shape != target.shape:
        shapes = f"{tuple(prediction.shape)} and {tuple(target.shape)}"
        raise FastsslError(f"prediction and target must be N×D of the same shape, got {shapes}")
    if prediction.dtype != target.dtype:
        raise FastsslError(f"prediction is {prediction.dtype} and target {target.dtype}: give both the same dtype")
    loss: Tensor = backend.implementation("normalized_mse", prediction.device, prediction.dtype)(prediction, target)
    return loss
