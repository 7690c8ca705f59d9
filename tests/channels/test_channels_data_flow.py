"""Sizes that decide which tensors a forward reads, how often a layer runs, or which branch is taken."""

import pytest
import torch
from masked_networks import compare_with_masked
from torch import nn
from torch.nn import functional as F

import gflow_pl.channels.trace as trace_file
from gflow_pl.channels import trace_channels

IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Steered(nn.Module):
    """Three convolutions of six channels and a linear head; `path` decides what happens between them."""

    def __init__(self, path):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)
        self.head, self.path = nn.Linear(6, 4), path
        self.looks_at_values = False
        self.tables = [torch.full((2000, 1, 1, 1), float(i)) for i in range(1, 8)]
        self.register_buffer("table", torch.arange(12.0)[None] ** 2)

    def forward(self, x):
        if self.looks_at_values and x.abs().max() > 1e9:
            x = x / 2
        return self.path(self, self.a(x).relu())

    def classify(self, x):
        return self.head(x.mean((2, 3)))


def read_one_of_several(net, x):
    y, z = net.b(x).relu(), net.c(x).tanh()
    return net.classify([x, y, z, y, x, z, x][x.shape[1]])


def run_as_often_as_channels(net, x):
    y = net.b(x)
    for _ in range(x.shape[1]):
        y = y.sigmoid()
    return net.classify(y)


def branch_to_another_layer(net, x):
    return net.classify((net.b if x.shape[1] == 6 else net.c)(x))


def swap_operands(net, x):
    y, z = net.b(x), net.c(x)
    return net.classify(y - z if x.shape[1] == 6 else z - y)


def stop_early(net, x):
    y = net.classify(net.b(x))
    return y.tanh() if x.shape[1] == 6 else y


def return_another_result(net, x):
    results = net.classify(net.b(x)), net.classify(net.c(x))
    return results[0 if x.shape[1] == 6 else 1]


def write_into_a_copy(net, x):
    y = net.b(x)
    z = y.clone() if x.shape[1] == 6 else y
    z.mul_(2)
    return net.classify(y + z.tanh())


def index_a_table(net, x):
    return net.classify(net.b(x)) + net.table[0, x.shape[1]]


def read_one_of_several_constants(net, x):
    """A table that is no buffer, with too many elements to be compared by value."""
    return net.classify(net.b(x) * net.tables[x.shape[1]][:1])


def choose_a_mode_of_an_operator(net, x):
    return net.classify(F.gelu(net.b(x), approximate="none" if x.shape[1] == 6 else "tanh"))


PATHS = [
    read_one_of_several_constants,
    choose_a_mode_of_an_operator,
    read_one_of_several,
    run_as_often_as_channels,
    branch_to_another_layer,
    swap_operands,
    stop_early,
    return_another_result,
    write_into_a_copy,
    index_a_table,
]


@pytest.mark.parametrize("looks_at_values", [False, True])
@pytest.mark.parametrize("residual", ["expand", "remove"])
@pytest.mark.parametrize("path", PATHS)
def test_only_the_layer_whose_width_steers_the_forward_stays(path, residual, looks_at_values):
    torch.manual_seed(0)
    network = Steered(path)
    network.looks_at_values = looks_at_values  # then the trace runs on real tensors
    difference, _, graph, _ = compare_with_masked(network, (IMAGES,), residual=residual)
    assert difference < 1e-12
    assert {"a", "head"} == set(graph.frozen)
    assert "smaller shapes" in graph.frozen["a"] or "position" in graph.frozen["a"]


def test_layout_dependent_operators_do_not_count():
    """With one channel left, `contiguous` copies nothing any more."""

    class Rearranged(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 2, 3), nn.Linear(2, 4)

        def forward(self, x):
            return self.b(self.a(x).permute(0, 2, 3, 1).contiguous().relu()).mean((1, 2))

    assert set(trace_channels(Rearranged(), IMAGES.float()).frozen) == {"b"}


def test_every_width_that_steers_is_found():
    """Several widths steer at the same place; the other layers can be pruned."""

    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList([nn.Conv2d(3, 5 + i, 1) for i in range(6)])
            self.heads = nn.ModuleList([nn.Linear(5 + i, 4) for i in range(6)])

        def forward(self, x):
            maps = [conv(x) for conv in self.convs]
            y = sum(head(m.mean((2, 3))) for head, m in zip(self.heads, maps, strict=True))
            return y.tanh() if (maps[1].shape[1], maps[4].shape[1]) == (6, 9) else y

    graph = trace_channels(Several(), IMAGES.float())
    assert {name for name in graph.frozen if name.startswith("convs")} == {"convs.1", "convs.4"}


class SteeredBlock(nn.Module):
    """A residual block whose inner width decides on a branch."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.act = nn.Conv2d(6, 8, 1), nn.Conv2d(8, 6, 1), nn.Tanh()

    def forward(self, x):
        inner = self.a(x).relu()
        y = self.b(inner)
        return x + (self.act(y) if inner.shape[1] == 8 else y)


@pytest.mark.parametrize("residual", ["expand", "remove"])
def test_blocks_run_the_same_code(residual, monkeypatch):
    """What steers one block steers all: a few rounds are enough for any number of blocks."""
    monkeypatch.setattr(trace_file, "_CHOOSING_ROUNDS", 3)
    monkeypatch.setattr(trace_file, "_FREEZING_ROUNDS", 0)
    blocks = [SteeredBlock() for _ in range(30)]
    model = nn.Sequential(nn.Conv2d(3, 6, 1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))
    graph = trace_channels(model, IMAGES.float(), residual=residual)
    assert set(graph.frozen) == {*(f"{i}.a" for i in range(1, 31)), "33"}
