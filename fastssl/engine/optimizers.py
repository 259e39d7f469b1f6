"""Optimizers and the parameters they leave out: torch's SGD, and LARS as BYOL's authors wrote it."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastssl.engine.config import Recipe


class LARS(Optimizer):
    """Layer-wise adaptive rate scaling (You et al., arXiv:1708.03888) in the form of BYOL's code.

    For each weight w with gradient g: g ← g + wd·w; g ← g·η‖w‖/‖g‖ (factor 1 where either norm is 0);
    μ ← momentum·μ + g; w ← w - lr·μ. Groups with ``adapt=False`` use the raw gradient and the same μ.

    Args:
        params: parameters or groups; a group may set `adapt`, `lr`, `weight_decay`.
        lr: learning rate.
        momentum: of μ.
        weight_decay: wd.
        eta: η, the trust coefficient.

    Raises:
        ValueError: a negative value.

    Example:
        >>> layer = nn.Linear(4, 2)
        >>> optimizer = LARS([{"params": [layer.weight]}, {"params": [layer.bias], "adapt": False}], lr=0.2)
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        eta: float = 1e-3,
    ) -> None:
        for name, value in (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay), ("eta", eta)):
            if not value >= 0:
                raise ValueError(f"{name} must be 0 or more, got {value}")
        super().__init__(
            params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "eta": eta, "adapt": True}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """Make one update of all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if weights:
                self._update(weights, group)
        return loss

    def _update(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        gradients: list[Tensor] = [p.grad for p in weights]  # type: ignore[misc]
        if group["adapt"]:
            gradients = list(torch._foreach_add(gradients, weights, alpha=group["weight_decay"]))
            w_norms, g_norms = torch._foreach_norm(weights), torch._foreach_norm(gradients)
            ratios = [
                torch.where((w > 0) & (g > 0), group["eta"] * w / g, 1.0) for w, g in zip(w_norms, g_norms, strict=True)
            ]
            torch._foreach_mul_(gradients, ratios)
        for p in weights:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum_buffer"] for p in weights]
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, gradients)
        torch._foreach_add_(weights, buffers, alpha=-group["lr"])


def parameter_groups(module: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """The trainable parameters; bias and normalisation apart, without decay and adaptation, where the recipe says so.

    These are the parameters of one dimension: every other one is a matrix or a kernel.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    if recipe.decay_norm_and_bias:
        return [{"params": parameters}]
    return [
        {"params": [p for p in parameters if p.ndim > 1]},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0, "adapt": False},
    ]


def make_optimizer(module: nn.Module, recipe: Recipe) -> Optimizer:
    """The recipe's optimizer over the trainable parameters of `module`; its lr is set at every step."""
    groups = parameter_groups(module, recipe)
    if recipe.optimizer == "lars":
        return LARS(groups, recipe.lr, recipe.optimizer_momentum, recipe.weight_decay, recipe.lars_eta)
    for group in groups:
        group.pop("adapt", None)
    return torch.optim.SGD(groups, recipe.lr, recipe.optimizer_momentum, weight_decay=recipe.weight_decay)
