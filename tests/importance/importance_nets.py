"""Small networks and batches for the tests of importance, in float64."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Mixed(nn.Module):
    """Every kind of layer: conv with bias, grouped conv, transposed conv, norms behind some, linear ones."""

    def __init__(self, num_classes: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        self.grouped = nn.Conv2d(4, 6, 3, groups=2, bias=False)
        self.bn2 = nn.BatchNorm2d(6)
        self.up = nn.ConvTranspose2d(6, 4, 2, groups=2)
        self.hidden = nn.Linear(4, 5)
        self.head = nn.Linear(5, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.bn1(self.conv1(x)))
        x = torch.tanh(self.bn2(self.grouped(x)))
        x = torch.tanh(self.up(x)).mean((2, 3))
        return self.head(torch.tanh(self.hidden(x)))


def mixed(seed: int = 0) -> Mixed:
    """A `Mixed` network in float64 with random running statistics and norms."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = Mixed().double()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 1.5)
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.3)
    return net


def class_batches(
    num_batches: int = 3, size: int = 6, num_classes: int = 3, seed: int = 1
) -> list[tuple[Tensor, Tensor]]:
    """Batches of (size, 2, 5, 5) images; each contains every class equally often, in random order."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(num_batches):
        images = torch.randn(size, 2, 5, 5, generator=generator, dtype=torch.float64)
        labels = torch.arange(size)[torch.randperm(size, generator=generator)] % num_classes
        batches.append((images, labels))
    return batches


def largest_difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, in units of the largest value of the layer."""
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-300))
