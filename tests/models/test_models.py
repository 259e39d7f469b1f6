"""Backbones by name, heads, and batch norm over parts of a batch."""

import pytest
import timm
import torch
import torchvision
from torch import nn

from fastssl.errors import FastsslError
from fastssl.models import SplitBatchNorm2d, create_backbone, feature_dim, moco_head, split_batch_norms


@pytest.mark.parametrize(("name", "features"), [("small_resnet16", 128), ("resnet18", 512), ("timm/resnet10t", 512)])
def test_backbones_give_features(name: str, features: int) -> None:
    backbone = create_backbone(name)
    assert feature_dim(backbone) == features
    assert backbone(torch.randn(2, 3, 32, 32)).shape == (2, features)


def test_small_images_keep_their_size_in_the_stem() -> None:
    backbone = create_backbone("resnet18", small_images=True)
    stem = nn.Sequential(backbone.conv1, backbone.bn1, backbone.relu, backbone.maxpool)  # type: ignore[arg-type]
    assert stem(torch.randn(1, 3, 32, 32)).shape == (1, 64, 32, 32)
    for small, side in ((True, 32), (False, 16)):
        ours = create_backbone("small_resnet16", small_images=small)
        assert ours.stem(torch.randn(1, 3, 32, 32)).shape == (1, 16, side, side)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("name", "named"), [("resnet19", "resnet18"), ("timm/resnet10tt", "timm/resnet10t"), ("vgg", "timm/NAME")]
)
def test_an_unknown_backbone_suggests_others(name: str, named: str) -> None:
    with pytest.raises(FastsslError, match=named):
        create_backbone(name)


def test_other_peoples_networks_lose_their_classifier() -> None:
    for network in (torchvision.models.resnet18(), timm.create_model("resnet10t")):
        assert feature_dim(network) == 512
        assert network(torch.randn(2, 3, 32, 32)).shape == (2, 512)


def test_a_network_without_a_known_width_is_an_error() -> None:
    with pytest.raises(FastsslError, match="num_features"):
        feature_dim(nn.Sequential(nn.Flatten()))


def test_moco_heads_are_the_papers() -> None:
    assert isinstance(moco_head(8, 4, "fc"), nn.Linear)
    assert str(list(moco_head(8, 4, "mlp").children())) == str(
        [nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 4)]
    )


def test_split_batch_norm_normalises_each_part_by_itself() -> None:
    x = torch.randn(6, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    split = SplitBatchNorm2d(4, 3).double()
    parts = [nn.BatchNorm2d(4).double() for _ in range(3)]
    expected = torch.cat([norm(part) for norm, part in zip(parts, x.chunk(3), strict=True)])
    out = split(x)
    assert torch.allclose(out, expected)
    for name in ("running_mean", "running_var"):
        mean = torch.stack([getattr(part, name) for part in parts]).mean(0)
        assert torch.allclose(getattr(split, name), mean)
    [ours], [theirs] = (torch.autograd.grad(y.square().sum(), x) for y in (out, expected))
    assert torch.allclose(ours, theirs)


def test_split_batch_norm_evaluates_like_any_other() -> None:
    x = torch.randn(5, 4, 3, 3)
    assert torch.equal(SplitBatchNorm2d(4, 3).eval()(x), nn.BatchNorm2d(4).eval()(x))


def test_splitting_keeps_weights_and_asks_for_batch_norms() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    nn.init.normal_(network[1].weight)  # type: ignore[arg-type]
    weight = network[1].weight.clone()  # type: ignore[operator]
    assert torch.equal(split_batch_norms(network, 2)[1].weight, weight)  # type: ignore[index]
    with pytest.raises(FastsslError, match="no BatchNorm2d"):
        split_batch_norms(nn.Sequential(nn.Linear(2, 2)), 2)
