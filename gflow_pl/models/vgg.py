"""VGG-13 for small images: ten 3x3 convs, each conv -> ReLU -> BatchNorm, and one linear layer.

Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015. The norm stands
behind the ReLU, as in the code of Lubana and Dick (ICLR 2021); with the usual order the numbers would be others.
"""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["VGG", "vgg13"]

_VGG13_STAGES = ((64, 64), (128, 128), (256, 256), (512, 512), (512, 512))


class VGG(nn.Module):
    """Stages of 3x3 convs, each stage closed by a 2x2 max pooling, then the average of the map and one linear layer.

    At 32x32 the last map is one pixel, so that the average is the published network exactly; larger images have a
    larger map.

    Args:
        stages: Widths of the convs, stage by stage.
        num_classes: Width of the output.
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
        """Logits (batch, num_classes) of images (batch, 3, height, width)."""
        x = self.pool(self.features(x))
        return self.classifier(x.flatten(1))


def vgg13(num_classes: int = 100) -> VGG:
    """VGG-13 for 3x32x32 images (at least 32 pixels a side).

    Args:
        num_classes: Width of the output.
    """
    return VGG(_VGG13_STAGES, num_classes)
