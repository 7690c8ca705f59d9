"""Small networks with graphs written by hand, to test surgery without the tracer; and masked networks."""

import numpy as np
import torch
from torch import nn

from gflow_pl.values import ChannelGraph, ChannelGroup, Expansion, KeepPlan, Layer, LayerUnits, Slice


def column(*ranges):
    """A (units, width) table: unit u holds the u-th number of each range."""
    return np.stack([np.asarray(r) for r in ranges], axis=1)


def layer_facts(model, outputs=()):
    layers, first_name = {}, {id(p): n for n, p in reversed(list(model.named_parameters(remove_duplicate=False)))}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            layers[name] = Layer(
                name, first_name[id(module.weight)], module.weight.shape[0], 1, is_output=name in outputs
            )
    return layers


def shapes_of(model):
    return {name: tuple(t.shape) for name, t in [*model.named_parameters(), *model.named_buffers()]}


def make_graph(model, groups, outputs=("head",)):
    return ChannelGraph(groups, layers=layer_facts(model, outputs), shapes=shapes_of(model))


def group(name, size, slices, *, layers=None, kind="remove", filters=1, expansion=None):
    layers = layers or [LayerUnits(name, column(range(size)))]
    return ChannelGroup(name, kind, size, tuple(range(size)), filters, tuple(layers), tuple(slices), expansion)


def norm_slices(name, index):
    return [Slice(f"{name}.{leaf}", 0, index) for leaf in ("weight", "bias", "running_mean", "running_var")]


class Plain(nn.Module):
    """conv-norm-conv-norm-linear, where flattening gives each channel four columns of the linear layer."""

    def __init__(self, width=8):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 6, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(6)
        self.head = nn.Linear(24, 5)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        return self.head(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))

    def graph(self):
        w = self.conv1.weight.shape[0]
        first, second = column(range(w)), column(range(6))
        groups = [
            group(
                "conv1",
                w,
                [
                    Slice("conv1.weight", 0, first),
                    Slice("conv1.bias", 0, first),
                    *norm_slices("bn1", first),
                    Slice("conv2.weight", 1, first),
                ],
            ),
            group(
                "conv2",
                6,
                [
                    Slice("conv2.weight", 0, second),
                    *norm_slices("bn2", second),
                    Slice("head.weight", 1, np.arange(24).reshape(6, 4)),
                ],
            ),
        ]
        return make_graph(self, groups)


class Residual(nn.Module):
    """A stem and one residual block; the stem and the block's last conv write into a stream of 6 channels."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.bn0 = nn.BatchNorm2d(6)
        self.conv1 = nn.Conv2d(6, 5, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(5)
        self.conv2 = nn.Conv2d(5, 6, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = torch.relu(self.bn0(self.stem(x)))
        y = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(x + self.bn2(self.conv2(y)))
        return self.head(x.mean((2, 3)))

    def graph(self):
        six, five = column(range(6)), column(range(5))
        expanded = {"kind": "expand"}
        groups = [
            group(
                "stem",
                6,
                [Slice("stem.weight", 0, six), *norm_slices("bn0", six)],
                expansion=Expansion("bn0", 1, 6),
                **expanded,
            ),
            group(
                "conv1",
                5,
                [Slice("conv1.weight", 0, five), *norm_slices("bn1", five), Slice("conv2.weight", 1, five)],
            ),
            group(
                "conv2",
                6,
                [Slice("conv2.weight", 0, six), *norm_slices("bn2", six)],
                expansion=Expansion("bn2", 1, 6),
                **expanded,
            ),
        ]
        return make_graph(self, groups)


class Joined(nn.Module):
    """Two parallel convs, concatenated, then a depthwise conv and a linear layer: two groups cut the same dims."""

    def __init__(self):
        super().__init__()
        self.left = nn.Conv2d(3, 4, 3, padding=1)
        self.right = nn.Conv2d(3, 6, 1)
        self.deep = nn.Conv2d(10, 20, 3, padding=1, groups=10)
        self.head = nn.Linear(20, 3)

    def forward(self, x):
        x = torch.cat([self.left(x), self.right(x)], 1)
        return self.head(self.deep(x).mean((2, 3)))

    def graph(self):
        groups = []
        for name, start, size in (("left", 0, 4), ("right", 4, 6)):
            own, both = column(range(size)), column(range(start, start + size))
            filters = np.stack([2 * both[:, 0], 2 * both[:, 0] + 1], 1)
            slices = [
                Slice(f"{name}.weight", 0, own),
                Slice(f"{name}.bias", 0, own),
                Slice("deep.weight", 0, filters),
                Slice("deep.bias", 0, filters),
                Slice("head.weight", 1, filters),
            ]
            layers = [LayerUnits(name, own), LayerUnits("deep", filters, votes=False)]
            groups.append(group(name, size, slices, layers=layers, filters=3))
        return make_graph(self, groups)


class Tied(nn.Module):
    """Two linear layers with one shared weight, which is cut along both dims."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 6)
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        x = torch.tanh(self.inner(x))
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))

    def graph(self):
        six = column(range(6))
        names = ("inner.weight", "inner.bias", "first.weight", "first.bias", "second.bias")
        slices = [*(Slice(name, 0, six) for name in names), Slice("first.weight", 1, six), Slice("head.weight", 1, six)]
        layers = [LayerUnits(name, six) for name in ("inner", "first", "second")]
        return make_graph(self, [group("inner", 6, slices, layers=layers, filters=3)])


NETWORKS = {"plain": Plain, "residual": Residual, "joined": Joined, "tied": Tied}


def example(model, batch=4):
    generator = torch.Generator().manual_seed(3)
    shape = (batch, 3) if isinstance(model, Tied) else (batch, 3, 6, 6)
    first = next(model.parameters())
    return torch.randn(shape, generator=generator, dtype=first.dtype)


def randomise(model, seed=0):
    """Fill every parameter and running statistic with random numbers, so that no comparison is vacuous."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point():
                random = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
                tensor.copy_(random.abs() + 0.5 if "var" in name else random * 0.5)
    return model


def build(name, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return randomise(NETWORKS[name]().to(dtype), seed).eval()


def random_plan(graph, seed=0, share=0.5):
    rng = np.random.default_rng(seed)
    keep = {}
    for g in graph.groups:
        bits = rng.random(g.size) >= share
        if g.size:
            bits[rng.integers(g.size)] = True
        keep[g.name] = torch.from_numpy(bits)
    return KeepPlan(keep)


def assert_equal_states(a, b):
    assert list(a) == list(b)
    for name in a:
        assert torch.equal(a[name], b[name]), name
