"""Learning rates and optimizers against their formulas."""

import math

import pytest
import torch
from torch import Tensor, nn

from fastssl.engine.config import BYOLConfig, MoCoConfig, Recipe
from fastssl.engine.optimizers import LARS, make_optimizer, parameter_groups
from fastssl.engine.schedules import learning_rate


def rates(recipe: Recipe, steps_per_epoch: int, total: int) -> list[float]:
    rate = learning_rate(recipe, steps_per_epoch, total)
    return [rate(k) for k in range(total)]


def test_cosine_per_epoch_is_mocos() -> None:
    """MoCo's code: lr *= 0.5 * (1 + cos(pi * epoch / epochs)), once an epoch."""
    got = rates(MoCoConfig(lr=0.03, epochs=20), 5, 100)
    expected = [0.03 * 0.5 * (1.0 + math.cos(math.pi * (k // 5) / 20)) for k in range(100)]
    assert got == pytest.approx(expected, abs=1e-15)


def test_step_is_mocos() -> None:
    """MoCo's code: for milestone in schedule: lr *= 0.1 if epoch >= milestone else 1."""
    got = rates(MoCoConfig(lr=0.03, epochs=20, lr_schedule="step", lr_milestones=[12, 16]), 5, 100)
    expected = [0.03 * (0.1 if k // 5 >= 12 else 1.0) * (0.1 if k // 5 >= 16 else 1.0) for k in range(100)]
    assert got == pytest.approx(expected, abs=1e-15)


def test_exponential_is_moco_ig1bs() -> None:
    recipe = MoCoConfig(lr=0.12, lr_schedule="exponential", lr_gamma=0.9, lr_decay_steps=7)
    assert rates(recipe, 1000, 30) == pytest.approx([0.12 * 0.9 ** (k // 7) for k in range(30)], abs=1e-15)


def test_warmup_and_cosine_are_byols() -> None:
    """base·k/warm-up, then a cosine over K - warm-up; base = lr·batch/256."""
    recipe = BYOLConfig(lr=0.2, lr_batch=256, batch_size=4096, warmup_epochs=10, lr_per_epoch=False, epochs=40)
    base, rise, total = 0.2 * 4096 / 256, 50, 200
    expected = [
        base * k / rise if k < rise else base * 0.5 * (1 + math.cos(math.pi * (k - rise) / (total - rise)))
        for k in range(total)
    ]
    assert rates(recipe, 5, total) == pytest.approx(expected, abs=1e-12)


def lars_by_hand(w: Tensor, grads: list[Tensor], lr: float, wd: float, eta: float, adapt: bool) -> Tensor:
    mu = torch.zeros_like(w)
    for g in grads:
        if adapt:
            g = g + wd * w
            w_norm, g_norm = float(w.norm()), float(g.norm())
            g = g * (eta * w_norm / g_norm if w_norm > 0 and g_norm > 0 else 1.0)
        mu = 0.9 * mu + g
        w = w - lr * mu
    return w


@pytest.mark.parametrize("adapt", [True, False])
@pytest.mark.parametrize("zero", ["neither", "weight", "gradient"])
def test_lars_is_byols(adapt: bool, zero: str) -> None:
    w = torch.randn(4, 3, dtype=torch.float64) * (zero != "weight")
    grads = [torch.randn(4, 3, dtype=torch.float64) * (zero != "gradient") for _ in range(20)]
    wd = 0.0 if zero == "gradient" else 0.01
    p = nn.Parameter(w.clone())
    optimizer = LARS([{"params": [p], "adapt": adapt}], lr=0.3, momentum=0.9, weight_decay=wd, eta=0.02)
    for g in grads:
        p.grad = g.clone()
        optimizer.step()
        assert torch.equal(p.grad, g)  # the gradient is the caller's
    assert (p - lars_by_hand(w, grads, 0.3, wd, 0.02, adapt)).abs().max() < 1e-10


def test_lars_refuses_negative_values() -> None:
    with pytest.raises(ValueError, match="eta"):
        LARS([nn.Parameter(torch.zeros(1))], lr=0.1, eta=-1.0)


NETWORK = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))


def test_byol_excludes_bias_and_normalisation() -> None:
    adapted, excluded = parameter_groups(NETWORK, BYOLConfig(decay_norm_and_bias=False))
    assert {id(p) for p in adapted["params"]} == {id(NETWORK[0].weight), id(NETWORK[2].weight)}
    assert len(excluded["params"]) == 4
    assert (excluded["weight_decay"], excluded["adapt"]) == (0.0, False)


def test_moco_decays_everything() -> None:
    [group] = make_optimizer(NETWORK, MoCoConfig(weight_decay=1e-4)).param_groups
    assert len(group["params"]) == 6
    assert (group["weight_decay"], group["momentum"], group["nesterov"]) == (1e-4, 0.9, False)


def test_excluded_parameters_move_by_the_raw_gradient() -> None:
    layer = nn.Linear(3, 2)
    optimizer = make_optimizer(layer, BYOLConfig(optimizer="lars", decay_norm_and_bias=False, lr=1.0))
    bias = layer.bias.detach().clone()
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert torch.allclose(layer.bias, bias - 1)
