"""Whole numbers that a module keeps: only those that the forward needs to change follow the channels."""

import copy

import pytest
import torch
from masked_networks import compare_with_masked
from torch import nn
from torch.nn import functional as F

import gflow_pl.channels.trace as trace_file
from gflow_pl.channels import trace_channels

IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TOKENS = torch.rand(2, 5, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Viewed(nn.Module):
    """Convolutions of six channels, whose output is viewed in a size that the module keeps."""

    def __init__(self, **numbers):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3 if i == 0 else 6, 6, 3, padding=1) for i in range(7)])
        self.head = nn.Linear(6, 6)
        self.relu = nn.ReLU()
        vars(self).update(numbers)

    def features(self, x):
        for conv in self.convs:
            yield (x := conv(x).relu())


class Decoys(Viewed):
    """Reads some of its numbers for other purposes, and others not at all."""

    def forward(self, x):
        *_, x = self.features(x)
        x = x.view(x.shape[0], self.k, -1).mean(2)
        return self.head(x) * self.number_6 + self.number_3


class Depth(Viewed):
    def forward(self, x):
        x = self.convs[0](x)
        for _ in range(self.depth):
            x = self.convs[1](x).relu()
        return self.head(x.view(len(x), self.k, -1).mean(2))


class OutIndices(Viewed):
    def forward(self, x):
        maps = list(self.features(x))
        x = sum(maps[i] for i in self.out_indices)
        return self.head(x.view(len(x), *self.sizes).mean(2))


class NumClasses(Viewed):
    def forward(self, x):
        *_, x = self.features(x)
        x = x.view(len(x), self.k, -1).mean(2)
        return self.head(x) - F.one_hot(torch.arange(len(x)), self.num_classes)


class Checked(Viewed):
    """Compares a number with the width of what it got, and reads it nowhere else."""

    def forward(self, x):
        for features in self.features(x):
            x = features
        if x.shape[1] != self.k:
            raise ValueError(f"expected {self.number} channels")
        return self.head(self.relu(x).mean((2, 3)))


class CheckedChildren(nn.Module):
    """Children that compare a number with the width of their input."""

    class Child(nn.Module):
        def __init__(self):
            super().__init__()
            self.k, self.depth = 6, 6

        def forward(self, x):
            assert x.shape[1] == self.k
            return F.interpolate(x, scale_factor=2.0)

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3 if i == 0 else 6, 6, 3) for i in range(3)])
        self.children_ = nn.ModuleList([self.Child() for _ in range(3)])
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        for conv, child in zip(self.convs, self.children_, strict=True):
            x = child(conv(x))
        return self.head(x.mean((2, 3)))


class TwoPurposes(Viewed):
    """The size of the view is at the same time the number of a feature map."""

    def forward(self, x):
        maps = list(self.features(x))
        return self.head(maps[-1].view(len(x), self.depth, -1).mean(2) + maps[self.depth].mean((2, 3)))


NETWORKS = [
    (Decoys, {f"number_{i}": i for i in range(2, 41)} | {"k": 6}, {"k"}),
    (Depth, {"depth": 6, "num_classes": 6, "head_index": 6, "k": 6}, {"k"}),
    (OutIndices, {"out_indices": [6], "depth": 6, "sizes": (6, -1)}, {"sizes"}),
    (NumClasses, {"num_classes": 6, "width": 6, "k": 6}, {"k"}),
    (Checked, {"number": 6, "depth": 6, "k": 6}, {"k"}),
    (TwoPurposes, {"depth": 6, "num_classes": 6}, set()),
]


@pytest.mark.parametrize("residual", ["expand", "remove"])
@pytest.mark.parametrize(("network", "numbers", "needed"), NETWORKS)
def test_only_the_numbers_that_the_forward_needs_change(network, numbers, needed, residual):
    torch.manual_seed(0)
    model = network(**copy.deepcopy(numbers))
    difference, _, graph, pruned = compare_with_masked(model, (IMAGES,), residual=residual)
    assert difference < 1e-12
    assert {attribute.name for attribute in graph.patches} == needed
    assert {name for name, value in numbers.items() if vars(pruned)[name] != value} == needed
    assert {name: vars(model)[name] for name in numbers} == numbers  # restored after the trace
    assert {name.split(".")[0] for name in graph.frozen} == ({"head"} if needed else {"head", "convs"})
    assert graph.coverage() == 1 or not needed


@pytest.mark.parametrize("residual", ["expand", "remove"])
def test_a_number_that_children_compare_with_their_input(residual):
    torch.manual_seed(0)
    difference, _, graph, pruned = compare_with_masked(CheckedChildren(), (IMAGES,), residual=residual)
    assert difference < 1e-12
    assert graph.coverage() == 1
    assert [(child.k, child.depth) for child in pruned.children_] == [(3, 6)] * 3


class Attention(nn.Module):
    """Two blocks of attention, repeated as often as there are heads; numbers that count other things."""

    def __init__(self):
        super().__init__()
        self.embed, self.qkv, self.out, self.head = (nn.Linear(*s) for s in ((10, 24), (24, 72), (24, 24), (24, 4)))
        self.depth = self.num_heads = self.number = 6
        self.head_dim = 4

    def forward(self, x):
        x = self.embed(x)
        for _ in range(self.depth):
            shape = (*x.shape[:2], self.num_heads, self.head_dim)
            q, k, v = (part.view(shape).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
            x = x + self.out(F.scaled_dot_product_attention(q, k, v, scale=0.5).transpose(1, 2).flatten(2))
        return self.head(x.mean(1))


def test_heads_go_while_the_depth_stays():
    torch.manual_seed(0)
    difference, _, graph, pruned = compare_with_masked(Attention(), (TOKENS,))
    assert difference < 1e-12
    assert graph.coverage() == 1
    assert (pruned.num_heads, pruned.depth, pruned.number, pruned.head_dim) == (3, 6, 6, 4)


class OneOfManyBreaks(nn.Module):
    """Layers in a row; some of the results are compared with fixed sizes, each at a place of its own."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(10 if i == 0 else 7 + i, 8 + i) for i in range(12)])
        self.head = nn.Linear(19, 4)

    def forward(self, x):
        widths = []
        for layer in self.layers:
            widths.append((x := layer(x).relu()).shape[-1])
        x = self.head(x)
        x = x.tanh() if widths[1] == 9 else x
        x = x.exp() if widths[4] == 12 else x
        x = x.sin() if widths[7] == 15 else x
        return x.cos() if widths[8] == 16 else x


def test_what_cannot_be_explained_is_frozen_and_nothing_else(monkeypatch):
    monkeypatch.setattr(trace_file, "_CHOOSING_ROUNDS", 2)
    torch.manual_seed(0)
    difference, _, graph, _ = compare_with_masked(OneOfManyBreaks(), (TOKENS,))
    assert difference < 1e-12
    assert {"layers.1", "layers.4", "layers.7", "layers.8", "head"} == set(graph.frozen)


def test_a_verification_comes_to_an_end(monkeypatch):
    """With ever more neighbors frozen, few rounds are enough for any number of differences."""
    monkeypatch.setattr(trace_file, "_CHOOSING_ROUNDS", 2)
    monkeypatch.setattr(trace_file, "_FREEZING_ROUNDS", 1)
    torch.manual_seed(0)

    class AllBreak(OneOfManyBreaks):
        def forward(self, x):
            widths = []
            for layer in self.layers:
                widths.append((x := layer(x).relu()).shape[-1])
            x = self.head(x)
            for i, width in enumerate(widths[1:]):
                x = x.tanh() if width == 9 + i else x
            return x

    graph = trace_channels(AllBreak(), TOKENS.float())
    assert [group.name for group in graph.groups] in (["layers.0"], [])
    assert "the verification still failed" not in " ".join(graph.frozen.values())
