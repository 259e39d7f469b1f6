"""Learning rates and optimizers against their formulas."""

import importlib
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from fastssl.engine.config import BYOLConfig, MoCoConfig, Recipe
from fastssl.engine.optimizers import LARS, make_optimizer, parameter_groups
from fastssl.engine.schedules import learning_rate
from fastssl.errors import FastsslError


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


def run_steps(optimizer: Optimizer, parameters: list[Tensor], count: int = 3) -> None:
    draw = torch.Generator().manual_seed(4)
    for _ in range(count):
        for p in parameters:
            p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=draw).to(p))
        optimizer.step()


def network(seed: int = 2, device: str = "cpu") -> nn.Sequential:
    torch.manual_seed(seed)
    with torch.device(device):
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 5))


def kernel_of(module: nn.Sequential) -> Tensor:
    assert isinstance(module[0], nn.Conv2d)
    return module[0].weight


SGD, LARS_ = MoCoConfig(lr=0.1, weight_decay=1e-2), BYOLConfig(optimizer="lars", lr=0.1, decay_norm_and_bias=False)


@pytest.mark.parametrize("fused", [None, True, False])
def test_sgd_is_the_formula_and_fused_where_it_can_be(fused: bool | None) -> None:
    """μ ← .9·μ + g + wd·w; w ← w - lr·μ."""
    module = network().double()
    optimizer = make_optimizer(module, SGD, fused=fused)
    assert optimizer.param_groups[0]["fused"] is (fused is not False)
    expected = [p.detach().clone() for p in module.parameters()]
    draw, moving = torch.Generator().manual_seed(4), [torch.zeros_like(p) for p in expected]
    for _ in range(3):
        for w, mu in zip(expected, moving, strict=True):
            mu.mul_(0.9).add_(torch.randn(w.shape, generator=draw).to(w) + 1e-2 * w)
            w.sub_(0.1 * mu)
    run_steps(optimizer, list(module.parameters()))
    assert all(torch.allclose(p, w, atol=1e-14) for p, w in zip(module.parameters(), expected, strict=True))


@pytest.mark.parametrize("recipe", [SGD, LARS_])
def test_two_runs_are_the_same_bits_also_through_a_checkpoint(recipe: Recipe, tmp_path: Path) -> None:
    ends = []
    for interrupted in (False, False, True):
        module = network()
        optimizer = make_optimizer(module, recipe)
        run_steps(optimizer, list(module.parameters()))
        if interrupted:
            torch.save([module.state_dict(), optimizer.state_dict()], tmp_path / "state")
            weights, state = torch.load(tmp_path / "state", weights_only=True)
            module = network(seed=9)
            module.load_state_dict(weights)
            optimizer = make_optimizer(module, recipe)
            optimizer.load_state_dict(state)
        run_steps(optimizer, list(module.parameters()), 2)
        ends.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2])


def test_a_checkpoint_does_not_choose_the_kernel() -> None:
    module = network()
    old = torch.optim.SGD(module.parameters(), 0.1, 0.9)
    run_steps(old, list(module.parameters()))
    optimizer = make_optimizer(module, SGD)
    optimizer.load_state_dict(old.state_dict())
    assert optimizer.param_groups[0]["fused"] is True
    assert len(optimizer.state) == 6


@pytest.mark.parametrize("recipe", [SGD, LARS_])
def test_channels_last_parameters_get_the_same_update(recipe: Recipe) -> None:
    plain, other = network(), network().to(memory_format=torch.channels_last)
    for module in (plain, other):
        optimizer = make_optimizer(module, recipe)
        run_steps(optimizer, list(module.parameters()))
    kernel = kernel_of(other)
    assert kernel.is_contiguous(memory_format=torch.channels_last)
    momentum = optimizer.state[kernel]["momentum_buffer"]
    assert momentum.is_contiguous(memory_format=torch.channels_last)
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(plain.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_lars_needs_no_values(device: str) -> None:
    """A fake tensor has none: an optimizer that made the host wait for the device would fail here."""
    with FakeTensorMode():
        module = network(device=device)
        optimizer = make_optimizer(module, LARS_)
        for p in module.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        assert optimizer.state[kernel_of(module)]["momentum_buffer"].device.type == device


class Calls(TorchDispatchMode):
    """Counts the foreach calls."""

    def __init__(self) -> None:
        super().__init__()
        self.foreach: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "_foreach" in str(func):
            self.foreach.append(str(func).split(".")[1])
        return func(*args, **(kwargs or {}))


def test_lars_takes_eight_calls_for_any_number_of_weights() -> None:
    module = nn.Sequential(*[network() for _ in range(4)])
    optimizer = make_optimizer(module, LARS_)
    for p in module.parameters():
        p.grad = torch.zeros_like(p)
    with Calls() as calls:
        optimizer.step()
    adapted = ["_foreach_mul_", "_foreach_add", "_foreach_norm", "_foreach_addcmul_", "_foreach_add_"]
    assert calls.foreach == [*adapted, "_foreach_mul_", "_foreach_add_", "_foreach_add_"]


FUSED_SGD = """
import torch
class FusedSGD(torch.optim.SGD):
    def __init__(self, params, lr, momentum=0, dampening=0, weight_decay=0, nesterov=False, wd_after_momentum=False):
        super().__init__(params, lr, momentum, dampening, weight_decay, nesterov)
"""
WITHOUT_CUDA = """
class FusedSGD:
    def __init__(self, params, lr, momentum, weight_decay):
        raise RuntimeError("apex.optimizers.FusedSGD requires cuda extensions")
"""


@pytest.fixture
def apex(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file that stands for apex.optimizers."""
    (tmp_path / "apex" / "optimizers").mkdir(parents=True)
    (tmp_path / "apex" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path / "apex" / "optimizers" / "__init__.py"
    for name in [name for name in sys.modules if name.split(".")[0] == "apex"]:
        del sys.modules[name]
    importlib.invalidate_caches()


def test_apex_fused_sgd(apex: Path) -> None:
    apex.write_text(FUSED_SGD)
    with FakeTensorMode():  # CUDA parameters without CUDA
        optimizer = make_optimizer(network(device="cuda"), SGD, apex=True)
    assert type(optimizer).__module__ == "apex.optimizers"
    [group] = optimizer.param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"], len(group["params"])) == (0.1, 0.9, 1e-2, 6)


def test_apex_takes_what_it_can_update(apex: Path) -> None:
    apex.write_text(WITHOUT_CUDA)
    with pytest.raises(FastsslError, match=r"got torch.float32 on cpu"):
        make_optimizer(network(), SGD, apex=True)
    with FakeTensorMode():
        with pytest.raises(FastsslError, match=r"got torch.bfloat16 on cuda"):
            make_optimizer(nn.Linear(3, 2, device="cuda", dtype=torch.bfloat16), SGD, apex=True)
        with pytest.raises(FastsslError, match=r"requires cuda extensions: install .*NVIDIA/apex"):
            make_optimizer(network(device="cuda"), SGD, apex=True)
    with pytest.raises(FastsslError, match="fused=True is for torch's SGD"):
        make_optimizer(network(), SGD, apex=True, fused=True)


def test_lars_is_ours() -> None:
    with pytest.raises(FastsslError, match="apex has no LARS as BYOL's authors wrote it"):
        make_optimizer(network(), LARS_, apex=True)
    with pytest.raises(FastsslError, match="LARS has no fused kernel"):
        make_optimizer(network(), LARS_, fused=True)
    assert isinstance(make_optimizer(network(), LARS_, fused=False), LARS)
