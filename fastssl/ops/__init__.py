"""The ops: import one into your own code, ``from fastssl.ops import info_nce``."""

from fastssl import _extension
from fastssl.ops.augment import augment_
from fastssl.ops.backend import use_backend
from fastssl.ops.ema import ema_update_
from fastssl.ops.info_nce import InfoNCE, info_nce
from fastssl.ops.normalized_mse import normalized_mse
from fastssl.ops.photometric import ColorJitter, GaussianBlur, Grayscale, RandomErasing, Solarize, draw_augmentation
from fastssl.ops.queue import KeyQueue
from fastssl.ops.shuffle import shuffle_batch, unshuffle_and_gather, unshuffle_batch

_extension.warn_once()

__all__ = [
    "ColorJitter",
    "GaussianBlur",
    "Grayscale",
    "InfoNCE",
    "KeyQueue",
    "RandomErasing",
    "Solarize",
    "augment_",
    "draw_augmentation",
    "ema_update_",
    "info_nce",
    "normalized_mse",
    "shuffle_batch",
    "unshuffle_and_gather",
    "unshuffle_batch",
    "use_backend",
]
