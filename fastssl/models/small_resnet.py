"""A ResNet of four basic blocks for 32-pixel images: small enough to learn something in minutes on a CPU."""

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, conv1x1


class SmallResNet(nn.Module):
    """A 3×3 stem and four of torchvision's BasicBlocks, each halving the image (but the first) and doubling the width.

    Args:
        width: channels of the stem and the first block; features have 8 times as many.
        stem_stride: 2 halves the image in the stem: a quarter of the work for the same width.

    Example:
        >>> SmallResNet(width=16)(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 128])
    """

    def __init__(self, width: int = 32, stem_stride: int = 2) -> None:
        super().__init__()
        self.num_features = 8 * width
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, stem_stride, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        blocks, channels = [], width
        for stage in range(4):
            out, stride = width * 2**stage, 1 if stage == 0 else 2
            shortcut = None
            if stride != 1:
                shortcut = nn.Sequential(conv1x1(channels, out, stride), nn.BatchNorm2d(out))
            blocks.append(BasicBlock(channels, out, stride, shortcut))
            channels = out
        self.blocks = nn.Sequential(*blocks)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Features, N×(8·width), of images N×3×H×W."""
        return torch.flatten(nn.functional.adaptive_avg_pool2d(self.blocks(self.stem(x)), 1), 1)
