"""The momentum update of a target network, over lists of tensors."""

from collections.abc import Iterable

import torch
from torch import Tensor

from fastssl.ops import backend, ema_inputs, library, reference


@torch.no_grad()
def ema_update_(
    targets: Iterable[Tensor],
    sources: Iterable[Tensor],
    momentum: float | Tensor,
    *,
    shadows: Iterable[Tensor] | None = None,
) -> None:
    """θ_k ← m·θ_k + (1-m)·θ_q in place (MoCo, arXiv:1911.05722, eq. 2).

    All tensors are updated in one pass: one kernel launch on a GPU, and no synchronisation, so a CUDA graph can capture
    it. The memory addresses are read at every call.

    Args:
        targets: tensors to update, float32 or float64; integer and bool ones are copied, whatever m is. Any strides.
            Batch-norm statistics are buffers, not parameters: pass ``module.state_dict().values()`` to include them.
        sources: as many tensors of the same shapes, float32, float64, bfloat16 or float16; for an integer target of
            its dtype.
        momentum: m in 0…1, a float, or a tensor of one element; on a GPU it is read there, and its range not checked.
        shadows: as many tensors that receive the updated values in their own dtype, for example bfloat16 copies for
            the forward pass.

    Raises:
        ValueError: lengths, shapes, dtypes or devices do not fit; a target is float16 or bfloat16 (at m = 0.999 the
            change is smaller than its rounding, so it would never move); tensors that are written share memory with
            others (not checked for what torch.compile traces); m lies outside 0…1.

    Example:
        >>> import torch
        >>> key, query = torch.nn.Linear(4, 2), torch.nn.Linear(4, 2)
        >>> ema_update_(key.parameters(), query.parameters(), 0.999)
    """
    targets, sources = list(targets), list(sources)
    copies = [] if shadows is None else list(shadows)
    momentum = ema_inputs.as_momentum(momentum)
    ema_inputs.check(targets, sources, None if shadows is None else copies, momentum)
    if not targets:
        return
    if why := library.beyond_the_kernels([*targets, *sources, *copies]):
        run = backend.only_reference("ema_update_", why)
    else:
        run = backend.implementation("ema_update_", targets[0].device, targets[0].dtype)
    run(targets, sources, copies, momentum)


def _fused(
    name: str, targets: list[Tensor], sources: list[Tensor], shadows: list[Tensor], momentum: float | Tensor
) -> None:
    tensor, number = (momentum, 0.0) if isinstance(momentum, Tensor) else (None, momentum)
    library.call("ema_update", name, targets, sources, shadows, number, tensor)


library.define(
    "ema_update",
    "(Tensor(a!)[] targets, Tensor[] sources, Tensor(b!)[] shadows, float momentum, Tensor? momentum_tensor) -> ()",
    fake=lambda *_: None,
)
for _name, _implementation in library.compiled_implementations(_fused).items():
    backend.register("ema_update_", _name, _implementation)
backend.register("ema_update_", "reference", backend.Implementation(reference.ema_update_))
