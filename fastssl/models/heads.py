"""Projection and prediction heads."""

from torch import nn


def moco_head(features: int, dim: int, kind: str) -> nn.Module:
    """MoCo's projection: "fc", one linear layer (v1), or "mlp", features-ReLU-dim (v2, arXiv:2003.04297).

    Args:
        features: of the backbone.
        dim: D, components of a query or key.
        kind: "fc" or "mlp".
    """
    if kind == "fc":
        return nn.Linear(features, dim)
    return nn.Sequential(nn.Linear(features, features), nn.ReLU(inplace=True), nn.Linear(features, dim))


def byol_head(features: int, hidden_dim: int, projection_dim: int) -> nn.Sequential:
    """BYOL's projector and predictor: linear, batch norm, ReLU, linear without bias (arXiv:2006.07733, section 3.3)."""
    return nn.Sequential(
        nn.Linear(features, hidden_dim),
        nn.BatchNorm1d(hidden_dim),
        nn.ReLU(inplace=True),
        nn.Linear(hidden_dim, projection_dim, bias=False),
    )
