"""The momentum update of whole networks, beside what people write and what the memory allows.

Every side makes the same update of the parameters once, from the same numbers, and is compared with the formula.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.optim import swa_utils

from benchmarks import peers
from benchmarks.sides import DEVICES, Case, Side, grid, unavailable
from fastssl.ops import ema_update_

pytestmark = pytest.mark.together("ops")

M = 0.999
NETWORKS = {
    "ResNet-18": torchvision.models.resnet18,
    "ResNet-50": torchvision.models.resnet50,
    "ViT-B/16": torchvision.models.vit_b_16,
}


@functools.lru_cache(maxsize=2)
def made(name: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    module: nn.Module = NETWORKS[name]()
    for parameter in module.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.01)  # some begin as zeros
    return module


def network(case: Case, seed: int) -> nn.Module:
    return copy.deepcopy(made(case["tensors"], seed)).to(case.device)


def pair(case: Case) -> tuple[nn.Module, nn.Module]:
    """Target and source."""
    source = network(case, 1)
    return network(case, 0), source.to(getattr(torch, case["sources"]))


def values(module: nn.Module) -> list[Tensor]:
    return [parameter.detach() for parameter in module.parameters()]


def of_lists(update: Callable[[list[Tensor], list[Tensor]], Any]) -> Callable[[Case], Callable[[], list[Tensor]]]:
    def make(case: Case) -> Callable[[], list[Tensor]]:
        targets, sources = map(values, pair(case))

        def step() -> list[Tensor]:
            update(targets, sources)
            return targets

        return step

    return make


def of_modules(update: Callable[[nn.Module, nn.Module], Any]) -> Callable[[Case], Callable[[], list[Tensor]]]:
    def make(case: Case) -> Callable[[], list[Tensor]]:
        target, source = pair(case)
        targets: list[Tensor] = list(target.parameters())  # themselves: an update may give them other storage

        def step() -> list[Tensor]:
            update(target, source)
            return targets

        return step

    return make


def authors(target: nn.Module, source: nn.Module) -> None:
    """As in the authors' builder.py."""
    for p, q in zip(target.parameters(), source.parameters(), strict=True):
        p.data = p.data * M + q.data * (1.0 - M)


def foreach(targets: list[Tensor], sources: list[Tensor]) -> None:
    torch._foreach_lerp_(targets, sources, 1 - M)


def cast_and_lerp(targets: list[Tensor], sources: list[Tensor]) -> None:
    """`_foreach_lerp_` refuses mixed dtypes."""
    torch._foreach_lerp_(targets, [source.float() for source in sources], 1 - M)


def averaged_model(case: Case) -> Callable[[], list[Tensor]]:
    target, source = pair(case)
    average = swa_utils.AveragedModel(target, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(M))
    average.n_averaged.fill_(1)  # the first update copies
    targets = values(average)
    return _returning(lambda: average.update_parameters(source), targets)


def timm(case: Case) -> Callable[[], list[Tensor]]:
    target, source = pair(case)
    average = peers.peer("timm.utils", "timm").ModelEmaV3(target, decay=M, exclude_buffers=True)
    return _returning(lambda: average.update(source), values(average.module))


def lightly(case: Case) -> Callable[[], list[Tensor]]:
    update = peers.peer("lightly.models.utils", "lightly").update_momentum
    return of_modules(lambda target, source: update(source, target, m=M))(case)


def apex(case: Case) -> Callable[[], list[Tensor]]:
    if case.device != "cuda":
        unavailable("NVIDIA's apex has its multi-tensor functions for CUDA only")
    amp_c = peers.apex()
    targets, sources = map(values, pair(case))
    overflow = torch.zeros(1, dtype=torch.int, device="cuda")
    apply = peers.peer("apex.multi_tensor_apply", "apex").multi_tensor_applier
    lists = [targets, sources, targets]
    return _returning(lambda: apply(amp_c.multi_tensor_axpby, overflow, lists, M, 1 - M, -1), targets)


def _returning(update: Callable[[], Any], targets: list[Tensor]) -> Callable[[], list[Tensor]]:
    def step() -> list[Tensor]:
        update()
        return targets

    return step


def triad(case: Case) -> Callable[[], Any]:
    """STREAM's a ← b + s·c over as many elements."""
    count = sum(p.numel() for p in values(network(case, 0)))
    a, b, c = torch.randn(3, count, device=case.device).unbind()
    return lambda: torch.add(b, c, alpha=0.5, out=a)


def triad_in_place(case: Case) -> Callable[[], Any]:
    """a ← a + s·b, which reads and writes what an update does."""
    count = sum(p.numel() for p in values(network(case, 0)))
    a, b = torch.randn(2, count, device=case.device).unbind()
    return lambda: a.add_(b, alpha=1e-9)


@functools.lru_cache(maxsize=1)
def expected(case: Case) -> list[Tensor]:
    old, new = map(values, pair(case))
    return [M * t.double() + (1 - M) * s.double() for t, s in zip(old, new, strict=True)]


def check(case: Case, targets: list[Tensor]) -> None:
    rounding = 1e-6 if same_dtype(case) else 1e-5
    for target, right in zip(targets, expected(case), strict=True):
        torch.testing.assert_close(target.detach().double(), right, rtol=0, atol=rounding)


def make_case(device: str, name: str, sources: str = "float32") -> Case:
    with torch.device("meta"):
        count = sum(p.numel() for p in NETWORKS[name]().parameters())
    moved = count * (8 + (4 if sources == "float32" else 2))  # read both, write one
    axes = (("tensors", name), ("sources", sources))
    return Case("ema_update_", axes, device, flops=3 * count, bytes=moved, quick=name == "ResNet-18")


CASES = [
    make_case(device, name) for device in DEVICES for name in NETWORKS if device == "cuda" or "ViT" not in name
] + [make_case(device, "ResNet-50", "bfloat16") for device in DEVICES]


def same_dtype(case: Case) -> bool:
    return bool(case["sources"] == "float32")


SIDES = (
    Side("authors' loop", of_modules(authors), differs="rounds (1-m)·q to bfloat16 if q is"),
    Side("torch._foreach_lerp_", of_lists(foreach), when=same_dtype, pure=False),
    Side("cast, torch._foreach_lerp_", of_lists(cast_and_lerp), when=lambda c: not same_dtype(c)),
    Side("torch swa_utils", averaged_model, when=same_dtype),
    Side("timm ModelEmaV3", timm, when=same_dtype),
    Side("lightly", lightly, when=same_dtype),
    Side("NVIDIA apex", apex, differs="looks for values that are not finite as well"),
    Side("triad", triad, role="bound", agrees=False, when=same_dtype),
    Side("triad in place", triad_in_place, role="bound", agrees=False, when=same_dtype),
    Side("fastssl", of_lists(lambda targets, sources: ema_update_(targets, sources, M)), role="ours", pure=False),
)


@pytest.mark.parametrize(("case", "side"), grid(CASES, SIDES, check, graphs=("torch._foreach_lerp_", "fastssl")))
def test_update(turns: Callable[..., None], case: Case, side: Side) -> None:
    turns(case, side)
