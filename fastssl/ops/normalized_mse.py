"""BYOL's loss: the squared distance between two normalised vectors."""

from typing import Any

import torch
from torch import Tensor

from fastssl.errors import FastsslError
from fastssl.ops import backend, library, reference


def normalized_mse(prediction: Tensor, target: Tensor) -> Tensor:
    """‖p̂ - ẑ‖² = 2 - 2·cos(prediction, target) for every row; no gradient flows to `target`.

    With p̂ = p/‖p‖ and likewise ẑ (BYOL, arXiv:2006.07733, eq. 2); half inputs are computed in float32.

    Args:
        prediction: N×D, of a floating dtype.
        target: N×D, of the same dtype.

    Returns:
        N losses in 0…4, in the dtype of `prediction`; under autocast, float32.

    Raises:
        ValueError: shapes, dtypes or devices differ, or are none of the above.

    Example:
        >>> import torch
        >>> loss = normalized_mse(torch.randn(32, 256), torch.randn(32, 256)).mean()
    """
    if prediction.dim() != 2 or prediction.shape != target.shape:
        shapes = f"{tuple(prediction.shape)} and {tuple(target.shape)}"
        raise FastsslError(f"prediction and target must be N×D of the same shape, got {shapes}")
    if prediction.dtype != target.dtype:
        raise FastsslError(f"prediction is {prediction.dtype} and target {target.dtype}: give both the same dtype")
    if not prediction.is_floating_point():
        raise FastsslError(f"prediction must be of a floating dtype, got {prediction.dtype}")
    if prediction.device != target.device:
        raise FastsslError(f"prediction is on {prediction.device} and target on {target.device}")
    if library.functorch():
        run = backend.only_reference("normalized_mse", "inside a functorch transform")
    else:
        run = backend.implementation("normalized_mse", prediction.device, prediction.dtype)
    loss: Tensor = run(prediction, target)
    return loss


def _fused(name: str, prediction: Tensor, target: Tensor) -> Tensor:
    library.refuse_forward_mode("normalized_mse", prediction, target)
    gradients = torch.is_grad_enabled() and prediction.requires_grad
    loss: Tensor = library.call("normalized_mse", name, prediction, target.detach(), gradients)[0]
    return loss.to(reference.loss_dtype(prediction))


def _fake(prediction: Tensor, target: Tensor, gradients: bool) -> tuple[Tensor, Tensor]:
    n, d = prediction.shape
    return tuple(prediction.new_empty(shape, dtype=torch.float32) for shape in ((n,), (n, d) if gradients else (0,)))  # type: ignore[return-value]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    prediction, target, ctx.gradients = inputs
    _, dprediction = output
    ctx.save_for_backward(prediction, target, dprediction)
    ctx.mark_non_differentiable(dprediction)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, None, None]:
    prediction, target, dprediction = ctx.saved_tensors
    if grad is None:
        return None, None, None
    if not ctx.gradients:
        raise library.captured_without_gradients("normalized_mse")
    return library.scale_rows(grad, dprediction, prediction.dtype, [prediction, target]), None, None  # N×D


library.define(
    "normalized_mse",
    "(Tensor prediction, Tensor target, bool gradients) -> (Tensor loss, Tensor dprediction)",
    kernel="normalized_mse.forward",
    fake=_fake,
    setup_context=_setup_context,
    backward=lambda _: _backward,
)
for _name, _implementation in library.implementations(_fused).items():
    backend.register("normalized_mse", _name, _implementation)
backend.register("normalized_mse", "reference", backend.Implementation(reference.normalized_mse))
