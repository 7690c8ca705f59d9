"""Of several readings of a view or shuffle, the one wins that lets channels go and that a verification confirms."""

import pytest
import torch
from masked_networks import compare_with_masked
from torch import nn
from torch.nn import functional as F


class Generator(nn.Module):
    """A linear layer whose output becomes the image that a transposed convolution reads."""

    def __init__(self, image) -> None:
        super().__init__()
        self.image, self.channels = image, 16
        self.start, self.norm = nn.Linear(8, 16 * 4 * 4), nn.BatchNorm2d(16)
        self.unflatten = nn.Unflatten(1, (16, 4, 4))
        self.up, self.head = nn.ConvTranspose2d(16, 12, 4, 2, 1), nn.Conv2d(12, 3, 3)

    def forward(self, z):
        return self.head(F.relu(self.up(F.relu(self.norm(self.image(self, self.start(z)))))))


IMAGES = {
    "rest": lambda self, y: y.view(y.shape[0], -1, 4, 4),
    "quotient": lambda self, y: y.view(y.shape[0], y.shape[1] // 16, 4, 4),
    "attribute": lambda self, y: y.view(-1, self.channels, 4, 4),
    "other module": lambda self, y: y.reshape(-1, self.norm.num_features, 4, 4),
    "next layer": lambda self, y: y.view(-1, self.up.in_channels, 4, 4),
    "list": lambda self, y: self.unflatten(y),
}


@pytest.mark.parametrize("image", IMAGES.values(), ids=IMAGES)
def test_a_generator_loses_channels_of_its_first_image(image):
    off, change, graph, _ = compare_with_masked(Generator(image), (torch.randn(3, 8),))
    assert off < 1e-12 < 1e-3 < change
    group = graph.group("start")
    assert (group.size, group.filters, group.inexact) == (16, 16, None)
    assert set(graph.frozen) == {"head"}


@pytest.mark.parametrize("channels_last", [False, True])
def test_numbers_in_the_code_are_named_as_the_reason(channels_last):
    def image(_, y):
        return y.reshape(-1, 4, 4, 16).permute(0, 3, 1, 2) if channels_last else y.view(-1, 16, 4, 4)

    off, change, graph, _ = compare_with_masked(Generator(image), (torch.randn(3, 8),))
    assert off < 1e-12 < 1e-3 < change
    assert graph.frozen["start"] == "a view with sizes that do not follow the channels"


class Shuffled(nn.Module):
    """Grouped convolutions with a channel shuffle between them."""

    def __init__(self, groups, is_module) -> None:
        super().__init__()
        self.groups = groups
        self.shuffle = nn.ChannelShuffle(groups) if is_module else None
        self.stem, self.grouped = nn.Conv2d(3, 24, 3), nn.Conv2d(24, 24, 1, groups=groups)
        self.depthwise, self.head = nn.Conv2d(24, 24, 3, groups=24), nn.Conv2d(24, 4, 1)

    def forward(self, x):
        x = F.relu(self.grouped(F.relu(self.stem(x))))
        if self.shuffle is None:
            shape = x.shape
            x = x.view(shape[0], self.groups, shape[1] // self.groups, *shape[2:]).transpose(1, 2).reshape(shape)
        else:
            x = self.shuffle(x)
        return self.head(F.relu(self.depthwise(x)))


@pytest.mark.parametrize("is_module", [False, True], ids=["view", "module"])
@pytest.mark.parametrize(("groups", "units"), [(4, 6), (6, 6), (8, 8), (12, 12)])
def test_channel_shuffles_lose_positions_of_groups_or_whole_groups(groups, units, is_module):
    off, change, graph, _ = compare_with_masked(Shuffled(groups, is_module), (torch.randn(2, 3, 8, 8),))
    assert off < 1e-12 < 1e-3 < change
    assert graph.group("stem").size == units
    assert all(group.inexact is None for group in graph.groups)
