"""InfoNCE: the loss of contrastive learning, a drop-in for the package info-nce-pytorch 0.1.4."""

from typing import Any

import torch
from torch import Tensor, nn

from fastssl.ops import backend, info_nce_inputs, library, reference
from fastssl.ops.reference import Valid


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
    ``loss = -log( exp(q̂·k̂⁺/T) / (exp(q̂·k̂⁺/T) + Σⱼ exp(q̂·k̂ⱼ/T)) )``: M negatives and the positive, M+1 terms.

    One pass over the negatives gives the loss and all gradients (docs/info_nce.md). float64, functorch transforms
    (`torch.func`) and temperatures of several elements are computed in plain PyTorch, with N×M logits.

    Args:
        query: N×D, of a floating dtype; half inputs are computed in float32.
        positive_key: N×D of the same dtype; row i belongs to query i.
        negative_keys: M×D shared by all queries ("unpaired"), N×M×D of their own ("paired"), or None: then the
            positives of the other queries are the negatives. Of the same dtype; a float32 query may have bfloat16 or
            float16 negatives.
        temperature: T, a number above 0, or a tensor that can be broadcast to the logits N×(1+M); gradient flows to it.
        reduction: "mean", "sum", or "none" (N losses).
        negative_mode: "unpaired" or "paired".
        negatives_normalized: the negatives have length 1 already (a key queue), so skip it.
        valid: (first, count), each an int or an integer tensor of one element, which is read on its device: only the
            rows first, first+1, … first+count-1 (modulo M) of unpaired negatives count. 0 ≤ count ≤ M, to which a
            tensor is clamped. With count 0, or M = 0, the loss is 0.

    Returns:
        The loss, in the dtype of `query`. Under autocast the dtypes may differ, and the loss is float32.

    Raises:
        ValueError: shapes, dtypes, reduction, negative_mode or valid do not fit; the message says which.

    Example:
        >>> import torch
        >>> query, key, queue = torch.randn(32, 128), torch.randn(32, 128), torch.randn(4096, 128)
        >>> loss = info_nce(query, key, queue, temperature=0.2)
    """
    if reference.autocast(query):
        query, positive_key = info_nce_inputs.widened(query, positive_key, negative_keys)
    info_nce_inputs.check(query, positive_key, negative_keys, temperature, reduction, negative_mode, valid)
    if valid is not None and negative_keys is not None:
        valid = info_nce_inputs.reduced(valid, negative_keys.shape[0])
    if why := info_nce_inputs.beyond_the_kernels(query, temperature):
        run = backend.only_reference("info_nce", why)
    else:
        run = backend.implementation("info_nce", query.device, query.dtype)
    loss: Tensor = run(
        query, positive_key, negative_keys, temperature, reduction, negative_mode, negatives_normalized, valid
    )
    return loss


class InfoNCE(nn.Module):
    """`info_nce` as a module, with the package's arguments; a queue's `valid` needs the function.

    Args:
        temperature: as in `info_nce`.
        reduction: as in `info_nce`.
        negative_mode: as in `info_nce`.

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
    number: Any = 0.0
    tensor = None
    if isinstance(temperature, Tensor):
        library.refuse_forward_mode("info_nce", temperature)
        tensor = temperature.to(query.device)
    else:
        number = temperature
        if not isinstance(number, torch.SymFloat):
            number = float(number)
    first, count = (None, None) if valid is None else (_on(query.device, value) for value in valid)
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
    return losses.to(reference.loss_dtype(query))


def _on(device: torch.device, value: int | Tensor) -> Tensor:
    """A 0-d tensor on the device; an int is filled in there, without synchronisation."""
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
    query, positive_key, negative_keys, temperature, tensor, first, count, normalized, gradients = inputs
    _, lse, dquery, dpositive, dtemperature = output
    ctx.in_batch, ctx.temperature, ctx.normalized = negative_keys is None, temperature, normalized
    ctx.gradients = gradients
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
        if not ctx.gradients and (needs_query or needs_positive or needs_temperature):
            raise library.captured_without_gradients("info_nce")
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
