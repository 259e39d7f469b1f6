"""Checkpointed activations against the same network without: the same numbers in less memory."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from fastssl.errors import FastsslError
from fastssl.models import checkpoint_activations, create_backbone, split_batch_norms, sync_batch_norms

BACKBONES = [
    "small_resnet16",
    pytest.param("resnet50", marks=pytest.mark.slow),
    "timm/test_resnet",
    "timm/test_efficientnet",
    "timm/test_vit",
]


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    """A network without and one with checkpointed activations."""
    torch.manual_seed(3)
    plain = create_backbone(name)
    checkpointed = copy.deepcopy(plain)
    checkpoint_activations(checkpointed)
    return plain, checkpointed


def images(name: str = "", size: int = 32) -> Tensor:
    return torch.randn(4, 3, *[160 if "vit" in name else size] * 2, generator=torch.Generator().manual_seed(1))


def step(network: nn.Module, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Forward and backward, from the same random numbers."""
    torch.manual_seed(5)
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        out: Tensor = network(x)
        loss = out.float().square().sum()
    loss.backward()
    return out.detach()


def assert_same(plain: nn.Module, other: nn.Module, x: Tensor, dtype: torch.dtype | None = None) -> None:
    """After two steps: outputs, gradients, buffers, and their names."""
    for _ in range(2):
        assert torch.equal(step(other, x, dtype), step(plain, x, dtype))
    for (name, p), (other_name, q) in zip(plain.named_parameters(), other.named_parameters(), strict=True):
        assert name == other_name
        assert p.grad is not None and q.grad is not None and torch.equal(p.grad, q.grad), name
    assert plain.state_dict().keys() == other.state_dict().keys()
    for name, buffer in plain.named_buffers():
        assert torch.equal(buffer, other.get_buffer(name)), name


@pytest.mark.parametrize("name", BACKBONES)
def test_nothing_changes(name: str) -> None:
    plain, checkpointed = pair(name)
    assert_same(plain, checkpointed, images(name))


@pytest.mark.parametrize("name", ["small_resnet16", "timm/test_resnet"])
def test_nothing_changes_under_autocast(name: str) -> None:
    plain, checkpointed = pair(name)
    assert_same(plain, checkpointed, images(), torch.bfloat16)


@pytest.mark.parametrize("name", ["small_resnet16", "timm/test_resnet"])
@pytest.mark.parametrize("change", [lambda n: split_batch_norms(n, 2), sync_batch_norms])
@pytest.mark.parametrize("before", [True, False])
def test_other_batch_norms(name: str, change: Callable[[nn.Module], nn.Module], before: bool) -> None:
    """They may be put in before or after."""
    torch.manual_seed(3)
    plain = create_backbone(name)
    checkpointed = copy.deepcopy(plain)
    for step in (change, checkpoint_activations) if before else (checkpoint_activations, change):
        step(checkpointed)
    assert_same(change(plain), checkpointed, images())


def test_a_cumulative_average_moves_once() -> None:
    plain = create_backbone("small_resnet16")
    for norm in plain.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = None
    checkpointed = copy.deepcopy(plain)
    checkpoint_activations(checkpointed)
    assert_same(plain, checkpointed, images())


def test_random_numbers_are_the_same() -> None:
    plain = create_backbone("small_resnet16")
    plain.get_submodule("blocks.1").register_module("relu", nn.Dropout(0.5))
    checkpointed = copy.deepcopy(plain)
    checkpoint_activations(checkpointed)
    assert_same(plain, checkpointed, images())


@pytest.mark.parametrize("name", ["small_resnet16", "timm/test_resnet"])
def test_copies_are_checkpointed_by_themselves(name: str) -> None:
    plain, checkpointed = pair(name)
    copied = copy.deepcopy(checkpointed)
    with torch.no_grad():
        for p in checkpointed.parameters():
            p.zero_()  # which its copy must not notice
    assert_same(plain, copied, images())
    assert saved_bytes(copied, images()) < saved_bytes(plain, images())
    with torch.no_grad():
        assert torch.equal(copied.eval()(images()), plain.eval()(images()))


def test_a_second_time_changes_nothing() -> None:
    for name in ("small_resnet16", "timm/test_resnet"):
        plain, checkpointed = pair(name)
        checkpoint_activations(checkpointed)
        assert_same(plain, checkpointed, images())


def saved_bytes(network: nn.Module, x: Tensor) -> int:
    """Of what autograd keeps for the backward pass, each storage once, and of the blocks' inputs."""
    kept: dict[int, Tensor] = {}
    parameters = {p.untyped_storage().data_ptr() for p in network.parameters()}

    def keep(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in parameters:
            kept[t.untyped_storage().data_ptr()] = t
        return t

    def keep_input(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        keep(inputs[0])

    blocks = [m for m in network.modules() if type(m).__name__.endswith(("BasicBlock", "Bottleneck"))]
    handles = [block.register_forward_pre_hook(keep_input) for block in blocks]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = network(x)
    for handle in handles:
        handle.remove()
    assert out.requires_grad
    return sum(t.untyped_storage().nbytes() for t in kept.values())


@pytest.mark.parametrize(("name", "part"), [("small_resnet16", 0.6), ("resnet50", 0.4), ("timm/test_resnet", 0.8)])
def test_less_is_kept(name: str, part: float) -> None:
    plain, checkpointed = pair(name)
    few, all_of_it = (saved_bytes(network, images(size=64)) for network in (checkpointed, plain))
    assert few < part * all_of_it


@pytest.mark.slow  # compiles
@pytest.mark.parametrize("name", ["small_resnet16", "timm/test_resnet"])
def test_compiled_networks_move_statistics_once(name: str) -> None:
    plain, checkpointed = pair(name)
    checkpointed.compile(backend="aot_eager")
    for _ in range(2):
        assert torch.allclose(step(checkpointed, images()), step(plain, images()), atol=1e-5)
    for buffer_name, buffer in plain.named_buffers():
        assert torch.allclose(buffer, checkpointed.get_buffer(buffer_name), atol=1e-5), buffer_name


def test_other_networks_are_an_error() -> None:
    class OwnBlock(torchvision.models.resnet.BasicBlock):
        pass

    for network, named in (
        (nn.Sequential(nn.Conv2d(3, 4, 3)), "Sequential: it has no residual blocks"),
        (nn.Sequential(OwnBlock(4, 4)), "OwnBlock"),
        (create_backbone("timm/inception_v3"), "InceptionV3: gradient checkpointing not supported"),
    ):
        with pytest.raises(FastsslError, match=f"cannot checkpoint the activations of {named}"):
            checkpoint_activations(network)
