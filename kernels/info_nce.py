"""InfoNCE from the kernels: loss and per-row gradients in one pass (forward), the negatives' gradient in another."""

import torch
from fastssl.kernels.info_nce_combine import combine
from fastssl.kernels.info_nce_negatives import negatives_pass
from fastssl.kernels.info_nce_paired import paired_pass
from fastssl.kernels.info_nce_paired_negatives import paired_negatives_pass
from fastssl.kernels.info_nce_split import split_pass
from torch import Tensor


def forward(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None,
    temperature: float,
    temperature_tensor: Tensor | None,
    first: Tensor | None,
    count: Tensor | None,
    negatives_normalized: bool,
    gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Each row's loss and what backward needs of it, in float32.

    Args:
        query: N×D.
        positive_key: N×D.
        negative_keys: M×D, N×M×D (paired), or None: the other rows' positives.
        temperature: T, if there is no tensor.
        temperature_tensor: T as one element on the device, which is read there.
        first: the first valid row of M×D negatives, a 0-d integer tensor; None for all rows.
        count: valid rows from there on, wrapping; given with `first`.
        negatives_normalized: do not normalise them.
        gradients: whether the last three results are wanted; they are empty otherwise.

    Returns:
        loss (N), log-sum-exp of the logits (N), and per row the loss's gradients to the query (N×D), to the positive
        key as positive (N×D) and to the temperature (N).
    """
    query, positive_key = query.contiguous(), positive_key.contiguous()
    if not len(query):
        empty = query.new_empty(0, dtype=torch.float32)
        rows = query.new_empty(query.shape if gradients else (0,), dtype=torch.float32)
        return empty, empty.clone(), rows, rows.clone(), empty.clone()
    t = (float(temperature), temperature_tensor)
    if negative_keys is None:
        partials = split_pass(query, positive_key, *t, None, None, False, True, gradients)
    elif negative_keys.dim() == 2:
        partials = split_pass(query, negative_keys, *t, first, count, negatives_normalized, False, gradients)
    else:
        partials = paired_pass(query, negative_keys, *t, negatives_normalized, gradients)
    return combine(query, positive_key, *t, partials, gradients)


def negatives(
    grad_loss: Tensor,
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
    """The gradient to the negatives, in their dtype; arguments as in `forward`.

    Args:
        grad_loss: the incoming gradient of each row's loss (N).
        lse: the log-sum-exp from `forward` (N).
        query: N×D.
        negative_keys: M×D or N×M×D; in-batch the positive keys, with `exclude_diagonal`.
        temperature: T, if there is no tensor.
        temperature_tensor: T as one element on the device.
        first: the first valid row; rows that are not valid get 0.
        count: valid rows.
        negatives_normalized: the keys were not normalised.
        exclude_diagonal: key i is no negative of query i; the result is float32 then, to be added to the positives'.
    """
    dtype = torch.float32 if exclude_diagonal else negative_keys.dtype
    gradient = negative_keys.new_empty(negative_keys.shape, dtype=dtype)  # contiguous, whatever the keys' strides
    if not gradient.numel():
        return gradient
    if not len(query):
        return gradient.zero_()
    arguments = (grad_loss.contiguous(), lse.contiguous(), query.contiguous(), negative_keys)
    t = (float(temperature), temperature_tensor)
    if negative_keys.dim() == 2:
        negatives_pass(*arguments, *t, first, count, negatives_normalized, exclude_diagonal, gradient)
    else:
        paired_negatives_pass(*arguments, *t, negatives_normalized, gradient)
    return gradient
