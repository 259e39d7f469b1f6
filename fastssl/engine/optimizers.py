"""Optimizers and the parameters they leave out: torch's SGD, and LARS as BYOL's authors wrote it."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastssl.apex import INSTALL as INSTALL_APEX
from fastssl.apex import find as find_apex
from fastssl.engine.config import Recipe
from fastssl.errors import FastsslError


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
        buffers = [self._momentum(p) for p in weights]
        torch._foreach_mul_(buffers, group["momentum"])
        if group["adapt"]:
            gradients = list(torch._foreach_add(gradients, weights, alpha=group["weight_decay"]))
            # μ + factor·g at once: one pass over memory less than g·factor before.
            torch._foreach_addcmul_(buffers, gradients, _adaptation(weights, gradients, group["eta"]))
        else:
            torch._foreach_add_(buffers, gradients)
        torch._foreach_add_(weights, buffers, alpha=-group["lr"])

    def _momentum(self, p: Tensor) -> Tensor:
        if "momentum_buffer" not in self.state[p]:
            self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        return self.state[p]["momentum_buffer"]


def _adaptation(weights: list[Tensor], gradients: list[Tensor], eta: float) -> list[Tensor]:
    """The factor η‖w‖/‖g‖ of each weight, 0-d tensors: all of them in a few launches, and none read by the host."""
    w, g = torch.stack(torch._foreach_norm([*weights, *gradients])).chunk(2)
    return list(torch.where((w > 0) & (g > 0), eta * w / g, 1.0).unbind())


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


def make_optimizer(module: nn.Module, recipe: Recipe, *, fused: bool | None = None, apex: bool = False) -> Optimizer:
    """The recipe's optimizer over the trainable parameters of `module`; its lr is set at every step.

    Args:
        module: parameters on the device they are trained on.
        recipe: optimizer, momentum, weight decay.
        fused: torch's SGD as one kernel; None: wherever there is one, which is on CUDA and on the CPU.
        apex: the FusedSGD of NVIDIA apex instead of torch's.

    Raises:
        FastsslError: what is asked for does not exist together, or apex is missing or cannot take the parameters.
    """
    groups = parameter_groups(module, recipe)
    if recipe.optimizer == "lars":
        if apex:
            raise FastsslError("NVIDIA apex has no LARS as BYOL's authors wrote it: leave apex off to use fastssl's")
        if fused:
            raise FastsslError("LARS has no fused kernel: leave fused out, it updates all parameters together as it is")
        return LARS(groups, recipe.lr, recipe.optimizer_momentum, recipe.weight_decay, recipe.lars_eta)
    for group in groups:
        group.pop("adapt", None)
    options = {"lr": recipe.lr, "momentum": recipe.optimizer_momentum, "weight_decay": recipe.weight_decay}
    if apex:
        return _apex_sgd(groups, options, fused)
    return _torch_sgd(groups, options, fused)


def _torch_sgd(groups: list[dict[str, Any]], options: dict[str, float], fused: bool | None) -> Optimizer:
    if fused is None:
        # On two CPU cores ResNet-18's parameters take 5 ms instead of 20 (torch 2.14).
        devices = {p.device.type for group in groups for p in group["params"]}
        fused = devices <= {"cpu", "cuda"}
    optimizer = torch.optim.SGD(groups, **options, fused=fused)  # type: ignore[arg-type]

    def stay_fused(loaded: Optimizer) -> None:
        """The kernel is this machine's choice; a checkpoint would bring its own along."""
        for group in loaded.param_groups:
            group["fused"] = fused

    optimizer.register_load_state_dict_post_hook(stay_fused)
    return optimizer


def _apex_sgd(groups: list[dict[str, Any]], options: dict[str, float], fused: bool | None) -> Optimizer:
    if fused is not None:
        raise FastsslError(f"fused={fused} is for torch's SGD; apex's is always fused, leave one of the two out")
    for p in (p for group in groups for p in group["params"]):
        # It would pass over other dtypes without a word.
        if p.device.type != "cuda" or p.dtype not in (torch.float32, torch.float16):
            raise FastsslError(
                f"apex's FusedSGD takes float32 or float16 parameters on cuda, got {p.dtype} on {p.device.type}; "
                "leave apex off"
            )
    kind = find_apex("optimizers", "FusedSGD")
    try:
        return kind(groups, **options)
    except RuntimeError as error:
        raise FastsslError(f"{error}: install apex with its CUDA extensions, {INSTALL_APEX}") from None
