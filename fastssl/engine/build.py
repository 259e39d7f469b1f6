"""From a configuration to the things it names: method and images."""

from typing import Any

import torch
from torch import nn

from fastssl.data.augmentation import Augmentation
from fastssl.data.order import mixed_seed
from fastssl.data.sources import Source, in_memory, open_source
from fastssl.engine.config import Config, MoCoConfig
from fastssl.errors import FastsslError
from fastssl.methods import BYOL, MoCo
from fastssl.models import create_backbone


def build_method(config: Config, total_steps: int) -> MoCo | BYOL:
    """The method with the random weights that the configuration's seed gives, the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(mixed_seed(config.seed, "weights"))
        backbone = create_backbone(config.backbone, small_images=config.small_images)
        if isinstance(config, MoCoConfig):
            return MoCo(
                backbone,
                dim=config.dim,
                queue_size=config.queue_size,
                momentum=config.momentum,
                temperature=config.temperature,
                head=config.head,
                symmetric=config.symmetric,
                bn_splits=config.bn_splits,
                seed=config.seed,
            )
        return BYOL(
            backbone,
            projection_dim=config.projection_dim,
            hidden_dim=config.hidden_dim,
            base_momentum=config.base_momentum,
            total_steps=total_steps,
        )


def load_weights(method: nn.Module, state: dict[str, Any]) -> None:
    """Load a checkpoint's weights into the method of the same configuration.

    Raises:
        FastsslError: they do not fit.
    """
    try:
        method.load_state_dict(state["model"])
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise FastsslError(f"the checkpoint's weights do not fit its configuration: {reason}") from None


def build_source(config: Config, augmentation: Augmentation) -> Source:
    """The images, in memory where all have one size and fit.

    Raises:
        FastsslError: nothing to read, or an image that cannot be read.
    """
    if len(augmentation.views) != 2:
        raise FastsslError(
            f"{config.method} takes two views, augmentation '{config.augmentation}' has {len(augmentation.views)}"
        )
    source = open_source(config.data, config.holdout, config.seed, config.exclude)
    test = None if source.test is None else in_memory(source.test)
    return Source(source.name, in_memory(source.train), test)
