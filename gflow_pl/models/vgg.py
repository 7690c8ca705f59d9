"""VGG-13 for small images: ten 3x3 convs, each followed by ReLU and BatchNorm, and a linear layer.

Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015. The norm
follows the ReLU, as in the code of Lubana and Dick (ICLR 2021); the usual order, norm before ReLU, gives other results.
"""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["VGG", "vgg13"]

_VGG13_STAGES = ((64, 64), (128, 128), (256, 256), (512, 512), (512, 512))


class VGG(nn.Module):
    """Stages of 3x3 convs, each followed by a 2x2 max pooling, then global average pooling and a linear layer.

    The published network has no average pooling. At 32x32 it has no effect, because the last feature map has one pixel;
    it makes larger images possible.

    Attributes:
        min_image_size: Smallest side of an image in pixels.

    Args:
        stages: Channels of the convs, stage by stage.
        num_classes: Number of classes.
    """

    def __init__(self, stages: tuple[tuple[int, ...], ...], num_classes: int = 100) -> None:
        super().__init__()
        self.min_image_size = 2 ** len(stages)
        layers: list[nn.Module] = []
        in_channels = 3
        for widths in stages:
            for width in widths:
                conv = nn.Conv2d(in_channels, width, kernel_size=3, padding=1, bias=False)
                layers += [conv, nn.ReLU(), nn.BatchNorm2d(width)]
                in_channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(in_channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (batch, 3, height, width) to logits (batch, num_classes)."""
        x = self.pool(self.features(x))
        return self.classifier(x.flatten(1))


def vgg13(num_classes: int = 100) -> VGG:
    """Return a VGG-13 for 3x32x32 images. Larger images work as well.

    Args:
        num_classes: Number of classes.
    """
    return VGG(_VGG13_STAGES, num_classes)
