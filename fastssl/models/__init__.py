"""The networks: backbones by name, projection and prediction heads, batch norm over parts of a batch."""

from fastssl.models.backbones import create_backbone, feature_dim
from fastssl.models.heads import byol_head, moco_head
from fastssl.models.split_batch_norm import SplitBatchNorm2d, split_batch_norms

__all__ = ["SplitBatchNorm2d", "byol_head", "create_backbone", "feature_dim", "moco_head", "split_batch_norms"]
