"""The methods: what each paper changes, usable in anybody's own loop."""

from fastssl.methods.byol import BYOL
from fastssl.methods.moco import MoCo

__all__ = ["BYOL", "MoCo"]
