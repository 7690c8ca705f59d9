"""ResNets of basic blocks for small images: ResNet-56 (16/32/64), ResNet-34 and ResNet-18 (64..512).

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016. The first conv is 3x3 with stride 1, and no max
pooling follows. As in the code of Lubana and Dick (ICLR 2021), the first block of every stage but the first has a 1x1
conv with a norm as its shortcut.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ResNet", "resnet18", "resnet34", "resnet56"]


class BasicBlock(nn.Module):
    """Two 3x3 convs with norms, added to the shortcut, then ReLU.

    Args:
        in_channels: Channels of the input.
        channels: Channels of the output.
        stride: Stride of the first conv and of the shortcut.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        # An empty Sequential is the identity and adds no tensors to the state dict.
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != channels:
            conv = nn.Conv2d(in_channels, channels, kernel_size=1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map features (batch, in_channels, height, width) to (batch, channels, height / stride, width / stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class ResNet(nn.Module):
    """A 3x3 conv, stages of basic blocks, global average pooling and a linear layer.

    Stage k is the attribute ``layer{k}``, k >= 1. Every stage but the first halves height and width. At 32x32 the
    pooling covers 8x8 (three stages) or 4x4 (four stages), as in the published networks.

    Args:
        num_blocks: Number of blocks in each stage.
        width: Channels of the first stage. Every further stage has twice as many as the one before.
        num_classes: Number of classes.
    """

    def __init__(self, num_blocks: tuple[int, ...], width: int, num_classes: int = 100) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, kernel_size=3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        in_channels = width
        self.stages = [f"layer{stage + 1}" for stage in range(len(num_blocks))]
        for stage, count in enumerate(num_blocks):
            blocks = []
            for block in range(count):
                channels = width * 2**stage
                blocks.append(BasicBlock(in_channels, channels, stride=2 if stage > 0 and block == 0 else 1))
                in_channels = channels
            self.add_module(self.stages[stage], nn.Sequential(*blocks))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(in_channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (batch, 3, height, width) to logits (batch, num_classes)."""
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in self.stages:
            x = getattr(self, stage)(x)
        return self.linear(self.pool(x).flatten(1))


def resnet56(num_classes: int = 100) -> ResNet:
    """Return a ResNet-56 for 3x32x32 images: three stages of nine blocks, 16/32/64 channels. Other sizes work as well.

    Args:
        num_classes: Number of classes.
    """
    return ResNet((9, 9, 9), 16, num_classes)


def resnet34(num_classes: int = 100) -> ResNet:
    """Return a ResNet-34 with 3, 4, 6, 3 blocks of 64/128/256/512 channels, for 3x32x32 images (or other image sizes).

    Args:
        num_classes: Number of classes.
    """
    return ResNet((3, 4, 6, 3), 64, num_classes)


def resnet18(num_classes: int = 100) -> ResNet:
    """Return a ResNet-18 for 3x32x32 images: 2, 2, 2, 2 blocks, 64/128/256/512 channels. Other sizes work as well.

    Args:
        num_classes: Number of classes.
    """
    return ResNet((2, 2, 2, 2), 64, num_classes)
