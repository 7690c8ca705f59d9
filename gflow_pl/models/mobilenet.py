"""MobileNet-V1 for small images: thirteen blocks of a depthwise 3x3 conv and a pointwise 1x1 conv.

Howard et al., "MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications", 2017, with stride 1
instead of 2 in the first conv, as is common for 32x32 images.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["MobileNetV1", "mobilenet_v1"]

# For each block: channels of the pointwise conv, stride of the depthwise conv.
_BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))


class DepthwiseSeparable(nn.Module):
    """Depthwise 3x3 conv, norm, ReLU; pointwise 1x1 conv, norm, ReLU.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        stride: Stride of the depthwise conv.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(
            in_channels, in_channels, kernel_size=3, stride=stride, padding=1, groups=in_channels, bias=False
        )
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv2 = nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, in_channels, height, width) to (batch, out_channels, height / stride, width / stride)."""
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)))


class MobileNetV1(nn.Module):
    """A 3x3 conv, thirteen depthwise separable blocks, global average pooling (of 2x2 at 32x32) and a linear layer.

    Args:
        num_classes: Number of classes.
    """

    def __init__(self, num_classes: int = 100) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, kernel_size=3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        blocks = []
        in_channels = 32
        for width, stride in _BLOCKS:
            blocks.append(DepthwiseSeparable(in_channels, width, stride))
            in_channels = width
        self.layers = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(in_channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (batch, 3, height, width) to logits (batch, num_classes)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.pool(self.layers(x))
        return self.linear(x.flatten(1))


def mobilenet_v1(num_classes: int = 100) -> MobileNetV1:
    """Return a MobileNet-V1 for 3x32x32 images. Other sizes work as well.

    Args:
        num_classes: Number of classes.
    """
    return MobileNetV1(num_classes)
