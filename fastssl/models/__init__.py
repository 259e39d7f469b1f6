"""The networks: backbones by name, heads, batch norm over parts of a batch or all processes, checkpointed blocks."""

from fastssl.models.activation_checkpointing import checkpoint_activations
from fastssl.models.backbones import create_backbone, feature_dim
from fastssl.models.heads import byol_head, moco_head
from fastssl.models.split_batch_norm import SplitBatchNorm2d, split_batch_norms
from fastssl.models.sync_batch_norm import SyncBatchNorm, batch_norm_group, sync_batch_norms

__all__ = [
    "SplitBatchNorm2d",
    "SyncBatchNorm",
    "batch_norm_group",
    "byol_head",
    "checkpoint_activations",
    "create_backbone",
    "feature_dim",
    "moco_head",
    "split_batch_norms",
    "sync_batch_norms",
]
