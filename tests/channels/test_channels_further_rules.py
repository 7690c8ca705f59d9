"""Operators of graph networks, detectors, recurrent networks and losses: pruned equals masked, or units say why not."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from masked_networks import masked_network, random_plan
from torch import nn

from gflow_pl import rewrite, trace_channels

EDGES = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 2], [1, 2, 3, 4, 5, 6, 7, 8, 0, 4, 6]])


class Net(nn.Module):
    def __init__(self, forward, **layers):
        super().__init__()
        self.run = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *inputs):
        return self.run(self, *inputs)


def graph_net(pass_on):
    def forward(m, x):
        h = m.a(x)
        h = (pass_on(h) + h).relu()
        h = m.b(h)
        return m.o((pass_on(h) + h).relu())

    return lambda: (Net(forward, a=nn.Linear(5, 16), b=nn.Linear(16, 12), o=nn.Linear(12, 3)), torch.randn(9, 5))


def sparse(h):
    index = torch.sparse_coo_tensor(EDGES.flip(0), torch.ones(EDGES.shape[1], dtype=h.dtype), (9, 9))
    return torch.sparse.mm(index, h)


def scattered(h):
    return torch.zeros_like(h).scatter_add(0, EDGES[1][:, None].expand(-1, h.shape[1]), h[EDGES[0]])


def gathered(h):
    return h.gather(0, EDGES[1][:9, None].expand(-1, h.shape[1]))


def images(forward, **layers):
    return lambda: (Net(forward, **layers), torch.randn(2, 3, 8, 8))


def unpooled(m, x):
    y, indices = F.max_pool2d(m.a(x).relu(), 2, return_indices=True)
    return m.o(F.max_unpool2d(m.c(y).relu(), indices, 2))


def packed(m, x):
    y = m.c(x.transpose(1, 2)).relu().transpose(1, 2)
    y = nn.utils.rnn.pack_padded_sequence(y, torch.tensor([9, 5, 3]), batch_first=True)
    return m.f(m.r(y)[1][0][-1])


def conv(a, b):
    return nn.Conv2d(a, b, 3, padding=1)


NETS = {
    "index_add": graph_net(lambda h: torch.zeros_like(h).index_add(0, EDGES[1], h[EDGES[0]])),
    "scatter_add": graph_net(scattered),
    "gather": graph_net(gathered),
    "sparse": graph_net(sparse),
    "deformable": images(
        lambda m, x: m.o(m.d(m.a(x).relu(), m.offset(m.a(x).relu())).relu()),
        a=conv(3, 16), offset=conv(16, 18), d=torchvision.ops.DeformConv2d(16, 20, 3, padding=1), o=conv(20, 2),
    ),
    "unpooled": images(unpooled, a=conv(3, 16), c=conv(16, 16), o=conv(16, 2)),
    "bilinear": lambda: (
        Net(lambda m, x: m.o(m.c(m.a(x).relu(), m.b(x).relu()).relu()),
            a=nn.Linear(6, 16), b=nn.Linear(6, 12), c=nn.Bilinear(16, 12, 20), o=nn.Linear(20, 3)),
        torch.randn(4, 6),
    ),
    "packed": lambda: (
        Net(packed, c=nn.Conv1d(4, 16, 3, padding=1), r=nn.LSTM(16, 8), f=nn.Linear(8, 3)), torch.randn(3, 9, 4),
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("name", NETS)
def test_rewritten_equals_masked(name):
    torch.manual_seed(0)
    net, x = NETS[name]()
    net, x = net.double().eval(), x.double()
    graph = trace_channels(net, x)
    assert set(graph.frozen) <= {"o", "f", "offset"}
    plan = random_plan(graph)
    assert all(group.inexact is None for group in graph.groups)
    pruned = copy.deepcopy(net)
    rewrite(pruned, graph.copy(), plan)
    with torch.no_grad():
        full, expected, found = net(x), masked_network(net, graph, plan)(x), pruned(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert (full - expected).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda m, x: m.o(m.a(x) * m.a(x).amax(1, keepdim=True)), "'amax' over the pruned dim"),
        (lambda m, x: m.o(m.a(x) * m.a(x).min(1, keepdim=True)[0]), "'min' over the pruned dim"),
        (lambda m, x: m.o(m.a(x)) + F.mse_loss(m.a(x), m.b(x)), "'mse_loss' over the pruned dim"),
    ],
    ids=["amax", "min", "mse"],
)
def test_what_mixes_channels_is_inexact(forward, reason):
    net = Net(forward, a=conv(3, 8), b=conv(3, 8), o=conv(8, 2))
    graph = trace_channels(net, torch.randn(2, 3, 6, 6), residual="remove")
    group = next(group for group in graph.groups if "a" in {part.layer for part in group.layers})
    assert reason in group.inexact
    rewrite(net, graph, random_plan(graph))
    net(torch.randn(2, 3, 6, 6)).sum().backward()


def test_the_classes_of_a_loss_stay():
    net = Net(
        lambda m, x: F.cross_entropy(m.b(m.a(x).relu()).mean((2, 3)), torch.tensor([0, 1])), a=conv(3, 8), b=conv(8, 4)
    )
    graph = trace_channels(net, torch.randn(2, 3, 6, 6))
    assert list(graph.frozen) == ["b"]
    assert "loss" in graph.frozen["b"] or "softmax" in graph.frozen["b"]


def test_an_index_of_fixed_width_keeps_the_channels():
    def forward(m, x):
        h = m.a(x)
        return m.o(torch.zeros_like(h).scatter_add(0, EDGES[1][:, None].expand(-1, 16), h[EDGES[0]]))

    net = Net(forward, a=nn.Linear(5, 16), o=nn.Linear(16, 3))
    assert "a" in trace_channels(net, torch.randn(9, 5)).frozen
