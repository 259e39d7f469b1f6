"""The ops: import one into your own code, ``from fastssl.ops import info_nce``."""

from fastssl import _extension
from fastssl.ops.backend import use_backend
from fastssl.ops.ema import ema_update_
from fastssl.ops.info_nce import InfoNCE, info_nce
from fastssl.ops.normalized_mse import normalized_mse
from fastssl.ops.queue import KeyQueue
from fastssl.ops.shuffle import shuffle_batch, unshuffle_and_gather, unshuffle_batch

_extension.warn_once()

__all__ = [
    "InfoNCE",
    "KeyQueue",
    "ema_update_",
    "info_nce",
    "normalized_mse",
    "shuffle_batch",
    "unshuffle_and_gather",
    "unshuffle_batch",
    "use_backend",
]
