"""The momentum update of a target network, over lists of tensors."""

from collections.abc import Iterable

from torch import Tensor

from fastssl.errors import FastsslError
from fastssl.ops import backend, reference

backend.register("ema_update_", "reference", backend.Implementation(reference.ema_update_))


def ema_update_(
    targets: Iterable[Tensor],
    sources: Iterable[Tensor],
    momentum: float | Tensor,
    *,
    shadows: Iterable[Tensor] | None = None,
) -> None:
    """θ_k ← m·θ_k + (1-m)·θ_q in place (MoCo, arXiv:1911.05722, eq. 2).

    Args:
        targets: tensors to update, float32 or float64 (integer ones are copied).
        sources: as many tensors of the same shapes; bfloat16 and float16 are allowed.
        momentum: m in 0…1, a float or a 0-d tensor on the targets' device.
        shadows: as many tensors that receive the updated values in their own dtype.

    Raises:
        ValueError: lengths, shapes or devices differ; a target is float16 or bfloat16 (at m = 0.999 the change is
            smaller than its rounding, so it would never move); m lies outside 0…1.

    Example:
        >>> import torch
        >>> key, query = torch.nn.Linear(4, 2), torch.nn.Linear(4, 2)
        >>> ema_update_(key.parameters(), query.parameters(), 0.999)
    """
    targets, sources = list(targets), list(sources)
    copies = None if shadows is None else list(shadows)
    if not isinstance(momentum, Tensor) and not 0 <= momentum <= 1:
        raise FastsslError(f"momentum must lie in 0…1, got {momentum!r}")
    for name, tensors in (("sources", sources), ("shadows", copies)):
        if tensors is None:
            continue
        if len(tensors) != len(targets):
            raise FastsslError(f"{len(targets)} targets and {len(tensors)} {name}: give as many of both")
        for i, (target, other) in enumerate(zip(targets, tensors, strict=True)):
            if target.shape != other.shape or target.device != other.device:
                raise FastsslError(
                    f"tensor {i}: target is {tuple(target.shape)} on {target.device}, "
                    f"{name} {tuple(other.shape)} on {other.device}"
                )
    for i, target in enumerate(targets):
        if target.dtype in reference.HALF:
            raise FastsslError(f"target {i} is {target.dtype}, too coarse to move at m near 1: keep targets in float32")
    if targets:
        run = backend.implementation("ema_update_", targets[0].device, targets[0].dtype)
        run(targets, sources, momentum, copies)
