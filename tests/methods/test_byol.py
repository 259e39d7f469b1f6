"""BYOL against a literal transcription of its paper's equations."""

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from fastssl import _extension
from fastssl.errors import FastsslError
from fastssl.methods import BYOL, MoCo
from fastssl.ops import backend, use_backend

from .test_moco import LR, STEPS, Tiny, train, views
from .test_moco import make as make_moco

TAU = 0.9


def make() -> BYOL:
    torch.manual_seed(0)
    return BYOL(Tiny(), projection_dim=8, hidden_dim=32, base_momentum=TAU, total_steps=STEPS).double()


def transcription(online: nn.Module, target: nn.Module, predictor: nn.Module) -> list[float]:
    """Section 3.1 and algorithm 1 of arXiv:2006.07733 with plain SGD."""
    optimizer = torch.optim.SGD([*online.parameters(), *predictor.parameters()], LR)
    losses = []
    for k, (v, v_prime) in enumerate(views()):

        def loss_of(view: Tensor, other: Tensor) -> Tensor:
            q = predictor(online(view))
            z = target(other).detach()
            q_bar, z_bar = q / q.norm(dim=1, keepdim=True), z / z.norm(dim=1, keepdim=True)
            return (q_bar - z_bar).square().sum(1).mean()  # eq. 2

        loss = loss_of(v, v_prime) + loss_of(v_prime, v)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        tau = 1 - (1 - TAU) * (math.cos(math.pi * k / STEPS) + 1) / 2
        for xi, theta in zip(target.parameters(), online.parameters(), strict=True):
            xi.data = tau * xi.data + (1 - tau) * theta.data
        losses.append(loss.item())
    return losses


def test_twenty_steps_equal_the_equations() -> None:
    method = make()
    online, target, predictor = (copy.deepcopy(m) for m in (method.online, method.target, method.predictor))
    expected = transcription(online, target, predictor)
    losses = train(method, views(), momentum=0.0)
    assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) < 1e-10
    for ours, theirs in ((method.online, online), (method.target, target), (method.predictor, predictor)):
        for p, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert (p - other).abs().max() < 1e-10


@pytest.mark.skipif(_extension.missing() is not None, reason="the extension is missing")
@pytest.mark.parametrize("make_method", [make, make_moco], ids=["byol", "moco"])
def test_the_fused_kernels_train_as_the_reference(make_method: Callable[[], BYOL | MoCo]) -> None:
    """In float32, where the kernels run; in float64 the tests above never leave the reference."""
    runs = []
    for name in (None, "reference"):
        method = make_method().float()
        with use_backend(name) if name else nullcontext():
            assert backend.choose("info_nce", torch.device("cpu"), torch.float32) == (name or "native")
            losses = train(method, [(v.float(), w.float()) for v, w in views()], momentum=0.0)
        runs.append([torch.tensor(losses), *method.parameters()])
    for ours, theirs in zip(*runs, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_momentum_rises_from_base_to_one() -> None:
    method = make()
    for k in range(STEPS + 3):
        tau = 1 - (1 - TAU) * (math.cos(math.pi * min(k, STEPS) / STEPS) + 1) / 2
        assert abs(float(method.momentum) - tau) < 1e-12
        method.after_step()


def test_the_target_takes_no_gradient_and_normalises_by_its_batch() -> None:
    method = make()
    before = method.target.backbone[1].running_mean.clone()  # type: ignore[index, union-attr]
    method(views()[0]).backward()
    assert all(p.grad is None for p in method.target.parameters())
    assert not torch.equal(before, method.target.backbone[1].running_mean)  # type: ignore[index, union-attr]


def test_heads_are_the_papers() -> None:
    method = BYOL(Tiny(), total_steps=1)
    for head, features in ((method.online.projector, 5), (method.predictor, 256)):
        first, norm, _, last = head  # type: ignore[misc]
        assert (first.in_features, first.out_features, last.out_features) == (features, 4096, 256)
        assert first.bias is not None
        assert last.bias is None
        assert (norm.momentum, norm.eps) == (0.1, 1e-5)


@pytest.mark.parametrize(("options", "named"), [({"base_momentum": 1.2}, "1.2"), ({"total_steps": 0}, "0")])
def test_wrong_options_are_named(options: dict[str, float], named: str) -> None:
    with pytest.raises(FastsslError, match=named):
        BYOL(Tiny(), **{"total_steps": 1, **options})  # type: ignore[arg-type]
