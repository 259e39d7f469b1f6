"""The course of the learning rate: one function a formula, and the recipe's choice among them."""

import math
from collections.abc import Callable, Sequence

from fastssl.engine.config import Recipe


def cosine(k: float, total: float, base: float) -> float:
    """Half a cosine from `base` at k = 0 to 0 at k = total (arXiv:1608.03983, eq. 5, without restarts)."""
    return base * 0.5 * (1 + math.cos(math.pi * min(k, total) / total))


def multistep(epoch: float, base: float, milestones: Sequence[float], gamma: float) -> float:
    """`base` times `gamma` for every milestone that has been reached."""
    return base * gamma ** sum(epoch >= milestone for milestone in milestones)


def exponential(step: int, base: float, gamma: float, every: int) -> float:
    """`base` times `gamma` after every `every` steps (MoCo on Instagram-1B: .9 every 62,500)."""
    return base * gamma ** (step // every)


def warmup(step: int, steps: float, base: float) -> float:
    """Linear from 0 at step 0 to `base` at step `steps` (BYOL: base·k/warm-up)."""
    return base * step / steps


def peak(recipe: Recipe) -> float:
    """The learning rate at its highest: scaled with the batch where the recipe says so."""
    return recipe.lr * (recipe.batch_size / recipe.lr_batch if recipe.lr_batch else 1.0)


def learning_rate(recipe: Recipe, steps_per_epoch: int, total_steps: int) -> Callable[[int], float]:
    """The learning rate of every step, counted from 0."""
    base = peak(recipe)
    rise = recipe.warmup_epochs * steps_per_epoch

    def rate(step: int) -> float:
        if step < rise:
            return warmup(step, rise, base)
        k = max(rise, step // steps_per_epoch * steps_per_epoch if recipe.lr_per_epoch else step)
        if recipe.lr_schedule == "cosine":
            return cosine(k - rise, max(1.0, total_steps - rise), base)
        if recipe.lr_schedule == "step":
            return multistep(k / steps_per_epoch, base, recipe.lr_milestones or (), recipe.lr_gamma)
        if recipe.lr_schedule == "exponential":
            return exponential(step, base, recipe.lr_gamma, recipe.lr_decay_steps)
        return base

    return rate
