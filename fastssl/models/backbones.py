"""Backbones by name: our small ResNets, torchvision's ResNets, and whatever timm knows."""

import difflib

import torchvision
from torch import nn

from fastssl.errors import FastsslError
from fastssl.models.small_resnet import SmallResNet

SMALL = {"small_resnet16": 16, "small_resnet32": 32, "small_resnet64": 64}


def create_backbone(name: str, *, small_images: bool = False) -> nn.Module:
    """Make a network that maps images N×3×H×W to features N×`num_features`, randomly initialised.

    Args:
        name: small_resnet16/32/64 (ours, for 32-pixel images), a ResNet of torchvision (resnet18, resnet50,
            wide_resnet50_2, …), or "timm/NAME" for any model of timm.
        small_images: give one of ours a stem of stride 1, a torchvision ResNet a 3×3 one and no max-pooling, for about
            32 pixels.

    Raises:
        FastsslError: the name is unknown, or `small_images` is asked of a network that has no such form.

    Example:
        >>> create_backbone("resnet18", small_images=True).num_features
        512
    """
    if name in SMALL:
        return SmallResNet(SMALL[name], stem_stride=1 if small_images else 2)
    if name.startswith("timm/"):
        return _timm(name.removeprefix("timm/"), small_images)
    resnets = torchvision.models.list_models(torchvision.models, include=["resnet*", "resnext*", "wide_resnet*"])
    if name not in resnets:
        known = [*SMALL, *resnets]
        close = difflib.get_close_matches(name, known, n=3) or known
        raise FastsslError(f"unknown backbone '{name}': try {', '.join(close)}, or timm/NAME")
    # zero_init_residual stays off: the MoCo authors' code does not use it.
    network = torchvision.models.get_model(name, weights=None)
    if small_images:
        network.conv1 = nn.Conv2d(3, network.conv1.out_channels, 3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
        network.maxpool = nn.Identity()
    feature_dim(network)
    return network


def _timm(name: str, small_images: bool) -> nn.Module:
    if small_images:
        raise FastsslError(f"small_images is for torchvision's ResNets, not timm/{name}")
    import timm  # takes a second to import, and few need it

    if name not in timm.list_models():
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f": did you mean {', '.join('timm/' + c for c in close)}?" if close else ""
        raise FastsslError(f"unknown timm model '{name}'{hint}")
    return timm.create_model(name, pretrained=False, num_classes=0)


def feature_dim(backbone: nn.Module) -> int:
    """How many features `backbone` gives; a torchvision ResNet loses its classifier on the way.

    Raises:
        FastsslError: the network has neither `num_features` nor a linear `fc`.
    """
    classifier = getattr(backbone, "fc", None)
    if isinstance(classifier, nn.Linear) and not hasattr(backbone, "num_features"):
        backbone.num_features = classifier.in_features  # type: ignore[assignment]
        backbone.fc = nn.Identity()
    reset = getattr(backbone, "reset_classifier", None)
    if callable(reset) and getattr(backbone, "num_classes", None):
        reset(0)  # a timm model with its classifier on
    features = getattr(backbone, "num_features", None)
    if not isinstance(features, int):
        raise FastsslError(
            f"{type(backbone).__name__}: cannot tell the number of features; set backbone.num_features to it, "
            "or use fastssl.models.create_backbone"
        )
    return features
