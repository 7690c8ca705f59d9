"""A small residual network for 3-channel images."""

import torch
from torch import nn


class ResidualBlock(nn.Module):
    """Two convolutions with norms; the inner width is 6, the width of the residual stream is 8."""

    def __init__(self):
        super().__init__()
        self.c1, self.n1 = nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.c2, self.n2 = nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x):
        return (x + self.n2(self.c2(self.n1(self.c1(x)).relu()))).relu()


def residual_net() -> nn.Sequential:
    """Return a stem (layers 0 to 2), a residual block (layer 3) and a head with 3 outputs, always with the same
    weights.
    """
    torch.manual_seed(0)
    stem = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*stem, ResidualBlock(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
