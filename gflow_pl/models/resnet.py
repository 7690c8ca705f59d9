"""ResNets of basic blocks for small images: ResNet-56 (16/32/64), ResNet-34 and ResNet-18 (64..512).

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016. The first conv is 3x3 with stride 1 and no max
pooling follows; the shortcuts are 1x1 convs with a norm, as in the code of Lubana and Dick (ICLR 2021), in the first
block of each stage after the first.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ResNet", "resnet18", "resnet34", "resnet56"]


class BasicBlock(nn.Module):
    """Two 3x3 convs with norms, added to the shortcut, ReLU."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        # An empty Sequential is the identity and has no tensors.
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != channels:
            conv = nn.Conv2d(in_channels, channels, kernel_size=1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (batch, channels, height / stride, width / stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class ResNet(nn.Module):
    """A first 3x3 conv, stages of basic blocks, the average of the map and one linear layer.

    Stage k is the attribute ``layer{k}``; every stage after the first halves the map. At 32x32 the average covers the
    whole last map (8x8 with three stages, 4x4 with four), as in the published networks.

    Args:
        num_blocks: Blocks of each stage.
        width: Channels of the first stage; every further one has twice as many.
        num_classes: Width of the output.
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
        """Logits (batch, num_classes) of images (batch, 3, height, width)."""
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in self.stages:
            x = getattr(self, stage)(x)
        return self.linear(self.pool(x).flatten(1))


def resnet56(num_classes: int = 100) -> ResNet:
    """ResNet-56 for 3x32x32 images (any size does): three stages of nine blocks, 16/32/64 channels.

    Args:
        num_classes: Width of the output.
    """
    return ResNet((9, 9, 9), 16, num_classes)


def resnet34(num_classes: int = 100) -> ResNet:
    """ResNet-34 for 3x32x32 images (any size does): 3, 4, 6, 3 blocks, 64/128/256/512 channels.

    Args:
        num_classes: Width of the output.
    """
    return ResNet((3, 4, 6, 3), 64, num_classes)


def resnet18(num_classes: int = 100) -> ResNet:
    """ResNet-18 for 3x32x32 images (any size does): 2, 2, 2, 2 blocks, 64/128/256/512 channels.

    Args:
        num_classes: Width of the output.
    """
    return ResNet((2, 2, 2, 2), 64, num_classes)
