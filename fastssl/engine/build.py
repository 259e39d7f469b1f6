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
from fastssl.models import batch_norm_group, checkpoint_activations, create_backbone, sync_batch_norms


def build_method(config: Config, total_steps: int, world: int = 1) -> MoCo | BYOL:
    """The method with the random weights that the configuration's seed gives, the same every time and everywhere.

    Args:
        config: what to build.
        total_steps: of the training.
        world: processes that the batch is spread over; they must have met if batch norm is over all of them.
    """
    method = _seeded(config, total_steps, world)
    if config.sync_bn and world > 1:
        sync_batch_norms(method, batch_norm_group(config.bn_group), apex=config.apex)
    if config.checkpoint_activations:
        checkpoint_activations(method.backbone)
    return method


def _seeded(config: Config, total_steps: int, world: int) -> MoCo | BYOL:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(mixed_seed(config.seed, "weights"))
        backbone = create_backbone(config.backbone, small_images=config.small_images)
        if isinstance(config, MoCoConfig):
            return MoCo(
                backbone,
                dim=config.dim,
                queue_size=config.queue_size,
                queue_dtype=getattr(torch, config.queue_dtype),
                momentum=config.momentum,
                temperature=config.temperature,
                head=config.head,
                symmetric=config.symmetric,
                bn_splits=max(1, config.bn_splits // world),
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
