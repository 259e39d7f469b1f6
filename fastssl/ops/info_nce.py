"""InfoNCE: the loss of contrastive learning, a drop-in for the package info-nce-pytorch 0.1.4."""

from typing import Any

import torch
from torch import Tensor, nn

from fastssl.errors import FastsslError
from fastssl.ops import backend, library, reference
from fastssl.ops.reference import Valid

HALF = (torch.float16, torch.bfloat16)


def info_nce(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    reduction: str = "mean",
    negative_mode: str = "unpaired",
    *,
    negatives_normalized: bool = False,
    valid: Valid | None = None,
) -> Tensor:
    """InfoNCE (van den Oord et al., arXiv:1807.03748, eq. 4), as in MoCo (arXiv:1911.05722, eq. 1).

    For every row, with q̂ = q/‖q‖ and likewise for keys,
    ``loss = -log( exp(q̂·k̂⁺/T) / (exp(q̂·k̂⁺/T) + Σⱼ exp(q̂·k̂ⱼ/T)) )``: K negatives and the positive, K+1 terms.

    Args:
        query: N×D.
        positive_key: N×D; row i belongs to query i.
        negative_keys: M×D shared by all queries ("unpaired"), N×M×D of their own ("paired"), or None: then the
            positives of the other queries are the negatives.
        temperature: T, a number above 0 or a tensor; gradient flows to a tensor.
        reduction: "mean", "sum", or "none" (N losses).
        negative_mode: "unpaired" or "paired".
        negatives_normalized: the negatives have length 1 already (a key queue), so skip it.
        valid: (first, count), each an int or a 0-d tensor: only the rows first, first+1, … first+count-1 (modulo M)
            of unpaired negatives count. With count 0, or M = 0, the loss is 0.

    Returns:
        The loss, in the dtype of `query`.

    Raises:
        ValueError: shapes, dtypes, reduction, negative_mode or valid do not fit; the message says which.

    Example:
        >>> import torch
        >>> query, key, queue = torch.randn(32, 128), torch.randn(32, 128), torch.randn(4096, 128)
        >>> loss = info_nce(query, key, queue, temperature=0.2)
    """
    _check(query, positive_key, negative_keys, temperature, reduction, negative_mode, valid)
    if why := _beyond_the_kernels(query, temperature):
        run = backend.only_reference("info_nce", why)
    else:
        run = backend.implementation("info_nce", query.device, query.dtype)
    loss: Tensor = run(
        query, positive_key, negative_keys, temperature, reduction, negative_mode, negatives_normalized, valid
    )
    return loss


class InfoNCE(nn.Module):
    """`info_nce` as a module; the arguments of `forward` and their shapes are the function's.

    Example:
        >>> loss = InfoNCE(temperature=0.2)(torch.randn(32, 128), torch.randn(32, 128))
    """

    def __init__(
        self, temperature: float | Tensor = 0.1, reduction: str = "mean", negative_mode: str = "unpaired"
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.reduction = reduction
        self.negative_mode = negative_mode

    def forward(self, query: Tensor, positive_key: Tensor, negative_keys: Tensor | None = None) -> Tensor:
        """The loss of `query` against its positive and negatives."""
        return info_nce(query, positive_key, negative_keys, self.temperature, self.reduction, self.negative_mode)


def _fused(
    name: str,
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None,
    temperature: float | Tensor,
    reduction: str,
    negative_mode: str,
    negatives_normalized: bool,
    valid: Valid | None,
) -> Tensor:
    """The loss from the kernels of the backend `name`: one pass over the negatives gives it and its gradients."""
    library.refuse_forward_mode("info_nce", query, positive_key, negative_keys)
    number, tensor = 0.0, None
    if isinstance(temperature, Tensor):
        library.refuse_forward_mode("info_nce", temperature)
        tensor = temperature.to(query.device)
    else:
        number = float(temperature)
    first, count = (None, None) if valid is None else (_index(value, query.device) for value in valid)
    differentiable = (query, positive_key) if tensor is None else (query, positive_key, tensor)
    gradients = torch.is_grad_enabled() and any(t.requires_grad for t in differentiable)
    losses: Tensor = library.call(
        "info_nce",
        name,
        query,
        positive_key,
        negative_keys,
        number,
        tensor,
        first,
        count,
        negatives_normalized,
        gradients,
    )[0]  # N
    if reduction == "mean":
        losses = losses.mean()
    elif reduction == "sum":
        losses = losses.sum()
    return losses.to(query.dtype)


def _index(value: int | Tensor, device: torch.device) -> Tensor:
    """A 0-d tensor on the device, filled there: no synchronisation."""
    if isinstance(value, Tensor):
        return value.to(device).reshape(())
    return torch.full((), value, dtype=torch.int64, device=device)


def _fake(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None,
    temperature: float,
    temperature_tensor: Tensor | None,
    first: Tensor | None,
    count: Tensor | None,
    negatives_normalized: bool,
    gradients: bool,
) -> tuple[Tensor, ...]:
    n, d = query.shape
    per_row = ((n, d), (n, d), (n,)) if gradients else ((0,), (0,), (0,))
    return tuple(query.new_empty(shape, dtype=torch.float32) for shape in ((n,), (n,), *per_row))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, positive_key, negative_keys, temperature, tensor, first, count, normalized, _ = inputs
    _, lse, dquery, dpositive, dtemperature = output
    ctx.in_batch, ctx.temperature, ctx.normalized = negative_keys is None, temperature, normalized
    if not ctx.needs_input_grad[2]:  # then backward does not need them, and a queue may move on before it
        negative_keys = first = count = None
    ctx.save_for_backward(
        query, positive_key, negative_keys, tensor, first, count, lse, dquery, dpositive, dtemperature
    )
    ctx.mark_non_differentiable(lse, dquery, dpositive, dtemperature)
    ctx.set_materialize_grads(False)


def _backward(name: str) -> Any:
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        query, positive_key, negative_keys, tensor, first, count, lse, dquery, dpositive, dtemperature = (
            ctx.saved_tensors
        )
        needs_query, needs_positive, needs_negatives, _, needs_temperature, *_ = ctx.needs_input_grad
        query_grad = positive_grad = negatives_grad = temperature_grad = None
        if grad is not None:
            inputs = [x for x in (query, positive_key, negative_keys, tensor) if x is not None]
            if needs_query:
                query_grad = library.scale_rows(grad, dquery, query.dtype, inputs)  # N×D
            if needs_positive and not ctx.in_batch:
                positive_grad = library.scale_rows(grad, dpositive, positive_key.dtype, inputs)  # N×D
            elif needs_positive:  # in-batch, a key is also a negative of all other queries
                as_negative = library.call(
                    "info_nce_negatives", name, grad, lse, query, positive_key, ctx.temperature, tensor,
                    None, None, False, True,
                )  # fmt: skip
                as_positive = library.scale_rows(grad, dpositive, torch.float32, inputs)
                positive_grad = as_negative.add_(as_positive).to(positive_key.dtype)
            if needs_negatives:
                negatives_grad = library.call(
                    "info_nce_negatives", name, grad, lse, query, negative_keys, ctx.temperature, tensor,
                    first, count, ctx.normalized, False,
                )  # M×D or N×M×D  # fmt: skip
            if needs_temperature:
                rows = library.scale_rows(grad, dtemperature, torch.float32, inputs)
                temperature_grad = rows.sum().reshape(tensor.shape).to(tensor.dtype)
        return query_grad, positive_grad, negatives_grad, None, temperature_grad, None, None, None, None

    return backward


def _negatives_fake(
    grad: Tensor,
    lse: Tensor,
    query: Tensor,
    negative_keys: Tensor,
    temperature: float,
    temperature_tensor: Tensor | None,
    first: Tensor | None,
    count: Tensor | None,
    negatives_normalized: bool,
    exclude_diagonal: bool,
) -> Tensor:
    return negative_keys.new_empty(
        negative_keys.shape, dtype=torch.float32 if exclude_diagonal else negative_keys.dtype
    )


library.define(
    "info_nce",
    "(Tensor query, Tensor positive_key, Tensor? negative_keys, float temperature, Tensor? temperature_tensor, "
    "Tensor? first, Tensor? count, bool negatives_normalized, bool gradients) "
    "-> (Tensor loss, Tensor lse, Tensor dquery, Tensor dpositive_key, Tensor dtemperature)",
    kernel="info_nce.forward",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
library.define(
    "info_nce_negatives",
    "(Tensor grad, Tensor lse, Tensor query, Tensor negative_keys, float temperature, Tensor? temperature_tensor, "
    "Tensor? first, Tensor? count, bool negatives_normalized, bool exclude_diagonal) -> Tensor",
    kernel="info_nce.negatives",
    fake=_negatives_fake,
)
for _name, _implementation in library.implementations(_fused).items():
    backend.register("info_nce", _name, _implementation)
backend.register("info_nce", "reference", backend.Implementation(reference.info_nce))


def _beyond_the_kernels(query: Tensor, temperature: float | Tensor) -> str | None:
    """Why only plain PyTorch computes this, or None."""
    if query.shape[1] == 0:
        return "the vectors have no components"
    if isinstance(temperature, Tensor):
        if temperature.numel() != 1:
            return f"temperature has {temperature.numel()} elements"
        if temperature.dim() > 0 and temperature.dtype != query.dtype:
            return f"temperature is {temperature.dtype} and not a scalar, which may widen the loss"
    return None


def _check(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None,
    temperature: float | Tensor,
    reduction: str,
    negative_mode: str,
    valid: Valid | None,
) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise FastsslError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if negative_mode not in ("unpaired", "paired"):
        raise FastsslError(f"negative_mode must be 'unpaired' or 'paired', got {negative_mode!r}")
    if not isinstance(temperature, (int, float, Tensor)) or (
        not isinstance(temperature, Tensor) and not temperature > 0
    ):
        raise FastsslError(f"temperature must be a number above 0 or a tensor, got {temperature!r}")
    if not query.is_floating_point():
        raise FastsslError(f"<query> must be of a floating dtype, got {query.dtype}")
    if query.dim() != 2:
        raise FastsslError(f"<query> must have 2 dimensions, got shape {tuple(query.shape)}")
    if positive_key.dim() != 2:
        raise FastsslError(f"<positive_key> must have 2 dimensions, got shape {tuple(positive_key.shape)}")
    if len(query) != len(positive_key):
        raise FastsslError(f"<query> has {len(query)} rows, <positive_key> {len(positive_key)}: give one key a query")
    if query.shape[-1] != positive_key.shape[-1]:
        raise FastsslError(f"<query> has {query.shape[-1]} components and <positive_key> {positive_key.shape[-1]}")
    if query.dtype != positive_key.dtype:
        raise FastsslError(f"<query> is {query.dtype}, <positive_key> {positive_key.dtype}: give both the same dtype")
    if negative_keys is not None:
        _check_negatives(query, negative_keys, negative_mode)
    if isinstance(temperature, Tensor):
        _check_temperature(query, negative_keys, temperature)
    if valid is not None:
        _check_valid(negative_keys, negative_mode, valid)


def _check_negatives(query: Tensor, negative_keys: Tensor, negative_mode: str) -> None:
    dimensions = 2 if negative_mode == "unpaired" else 3
    if negative_keys.dim() != dimensions:
        shape = tuple(negative_keys.shape)
        raise FastsslError(f"{negative_mode} <negative_keys> must have {dimensions} dimensions, got shape {shape}")
    if negative_mode == "paired" and len(negative_keys) != len(query):
        raise FastsslError(f"paired <negative_keys> has {len(negative_keys)} rows for {len(query)} queries")
    if negative_keys.shape[-1] != query.shape[-1]:
        raise FastsslError(f"<query> has {query.shape[-1]} components and <negative_keys> {negative_keys.shape[-1]}")
    half_queue = query.dtype == torch.float32 and negative_keys.dtype in HALF
    if negative_keys.dtype != query.dtype and not half_queue:
        raise FastsslError(
            f"<query> is {query.dtype} and <negative_keys> {negative_keys.dtype}: give both the same dtype "
            "(only a float32 query may have bfloat16 or float16 negatives)"
        )


def _check_temperature(query: Tensor, negative_keys: Tensor | None, temperature: Tensor) -> None:
    columns = len(query) if negative_keys is None else 1 + negative_keys.shape[-2]
    shape = (len(query), columns)  # of the logits
    sizes = temperature.shape
    if len(sizes) > 2 or any(size not in (1, full) for size, full in zip(sizes[::-1], shape[::-1], strict=False)):
        raise FastsslError(f"temperature of shape {tuple(sizes)} cannot be broadcast to the logits' shape {shape}")


def _check_valid(negative_keys: Tensor | None, negative_mode: str, valid: Valid) -> None:
    if negative_keys is None or negative_mode == "paired":
        raise FastsslError("valid=(first, count) needs unpaired <negative_keys>")
    if not isinstance(valid, tuple) or len(valid) != 2 or not all(isinstance(v, (int, Tensor)) for v in valid):
        raise FastsslError(f"valid must be the pair (first, count) of ints or 0-d tensors, got {valid!r}")
    count = valid[1]
    if isinstance(count, int) and not 0 <= count <= len(negative_keys):
        raise FastsslError(f"valid: count must lie in 0…{len(negative_keys)}, got {count}")
