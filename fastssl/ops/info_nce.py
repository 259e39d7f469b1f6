"""InfoNCE: the loss of contrastive learning, a drop-in for the package info-nce-pytorch 0.1.4."""

import torch
from torch import Tensor, nn

from fastssl.errors import FastsslError
from fastssl.ops import backend, reference
from fastssl.ops.reference import Valid

HALF = (torch.float16, torch.bfloat16)

backend.register("info_nce", "reference", backend.Implementation(reference.info_nce))


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


def _check_valid(negative_keys: Tensor | None, negative_mode: str, valid: Valid) -> None:
    if negative_keys is None or negative_mode == "paired":
        raise FastsslError("valid=(first, count) needs unpaired <negative_keys>")
    if not isinstance(valid, tuple) or len(valid) != 2 or not all(isinstance(v, (int, Tensor)) for v in valid):
        raise FastsslError(f"valid must be the pair (first, count) of ints or 0-d tensors, got {valid!r}")
    count = valid[1]
    if isinstance(count, int) and not 0 <= count <= len(negative_keys):
        raise FastsslError(f"valid: count must lie in 0…{len(negative_keys)}, got {count}")
