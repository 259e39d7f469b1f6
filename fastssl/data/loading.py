"""How batches are made: what loaders are told beside the images and the recipe."""

from dataclasses import dataclass

import torch

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Loading:
    """The options that all loaders share.

    Args:
        kind: "dali", "torchvision", or "auto": dali where it is installed.
        color: with dali, who changes the colours: "exact", the op `augment_`, which does what torchvision does; or
            "dali" itself.
        device: where the views are made (dali) or go (torchvision: they are made on the CPU).
        dtype: of the views: float32, bfloat16 or float16.
        workers: threads (dali) or processes (torchvision) that read, decode and augment.
        prefetch: batches that are made ahead.
        seed: of the order and of the augmentations.
        rank, world: this process among those that share the batches.
        last_batch: "drop", "fill" or "partial"; see `Order`.
    """

    kind: str = "auto"
    color: str = "exact"
    device: torch.device = CPU
    dtype: torch.dtype = torch.float32
    workers: int = 2
    prefetch: int = 2
    seed: int = 0
    rank: int = 0
    world: int = 1
    last_batch: str = "drop"
