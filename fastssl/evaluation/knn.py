"""Weighted k-nearest-neighbour classification of frozen features."""

import torch
from torch import Tensor

from fastssl.errors import FastsslError


def knn_accuracy(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    *,
    k: int = 200,
    temperature: float = 0.1,
    chunk: int = 1024,
) -> float:
    """Top-1 accuracy, 0…1, of the vote of the k nearest features, each with weight exp(cosine / temperature).

    Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination" (arXiv:1805.01978, section
    3.4), as used by MoCo's CIFAR-10 notebook (k = 200, temperature = 0.1).

    Args:
        bank: N×F, rows of length 1.
        bank_labels: N, int64.
        queries: M×F, rows of length 1.
        query_labels: M, int64.
        k: neighbours; all of the bank if it is smaller.
        temperature: above 0.
        chunk: queries compared at a time; memory is chunk×N.

    Raises:
        FastsslError: k below 1, temperature not above 0, or an empty bank.

    Example:
        >>> bank = torch.eye(2)
        >>> knn_accuracy(bank, torch.tensor([0, 1]), bank, torch.tensor([0, 1]), k=1)
        1.0
    """
    if k < 1 or not temperature > 0:
        raise FastsslError(f"kNN needs k >= 1 and temperature > 0, got {k} and {temperature}")
    if not len(bank) or not len(queries):
        raise FastsslError(f"kNN needs images on both sides, got {len(bank)} in the bank and {len(queries)} queries")
    classes = int(max(bank_labels.max(), query_labels.max())) + 1
    correct = 0
    for rows, labels in zip(queries.split(chunk), query_labels.split(chunk), strict=True):
        similarity, index = (rows @ bank.T).topk(min(k, len(bank)), dim=1)  # chunk×k
        # The largest is taken off before exp, which changes no vote and cannot overflow.
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
        votes = torch.zeros(len(rows), classes, dtype=weights.dtype, device=weights.device)
        votes.scatter_add_(1, bank_labels[index], weights)
        correct += int((votes.argmax(1) == labels).sum())
    return correct / len(queries)
