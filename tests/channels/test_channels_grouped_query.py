"""Grouped-query attention in every way of writing it: whole heads go, exactly, or the reason why not is true."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from masked_networks import masked_network, random_plan
from torch import nn

from gflow_pl import rewrite, trace_channels

WAYS = ("enable_gqa", "scale", "repeat_interleave", "expand", "expand_fused", "einsum")


class GroupedQueryAttention(nn.Module):
    """Attention whose query heads share fewer heads of keys and values.

    Args:
        way: How the heads are shared.
        heads: Number of heads of the query.
        shared: Number of heads of key and value.
        numbers: Where the forward takes these numbers from: attributes, a config object, or shapes.
        looks: Whether the forward looks at values, so that it is traced on real tensors.
    """

    def __init__(self, way: str, heads: int, shared: int, numbers: str, looks: bool, dim: int = 48) -> None:
        super().__init__()
        self.way, self.numbers, self.looks = way, numbers, looks
        width = dim // heads
        if numbers == "attributes":
            self.num_heads, self.num_shared, self.width = heads, shared, width
        else:
            self.config = SimpleNamespace(heads=heads, shared=shared, width=width)
        self.q, self.o = nn.Linear(dim, heads * width), nn.Linear(heads * width, dim)
        self.k, self.v = nn.Linear(dim, shared * width), nn.Linear(dim, shared * width)

    def forward(self, x):
        examples, positions, _ = x.shape
        if self.looks and bool(x.isnan().any()):
            x = torch.zeros_like(x)
        if self.numbers == "attributes":
            heads, shared, width = self.num_heads, self.num_shared, self.width
        else:
            heads, shared, width = self.config.heads, self.config.shared, self.config.width
        if self.numbers == "shapes":
            heads = shared = -1
        q = self.q(x).view(examples, positions, heads, width).transpose(1, 2)
        k = self.k(x).view(examples, positions, shared, width).transpose(1, 2)
        v = self.v(x).view(examples, positions, shared, width).transpose(1, 2)
        shared, times = k.shape[1], q.shape[1] // k.shape[1]
        if self.way == "enable_gqa":
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        elif self.way == "scale":
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=width**-0.5, enable_gqa=True)
        elif self.way == "einsum":
            q = q.reshape(examples, shared, times, positions, width)
            weights = (torch.einsum("bkrtd,bksd->bkrts", q, k) * width**-0.5).softmax(-1)
            y = torch.einsum("bkrts,bksd->bkrtd", weights, v).reshape(examples, shared * times, positions, width)
        else:
            if self.way == "repeat_interleave":
                k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
            else:
                size = (examples, shared, times, positions, width)
                k, v = (x[:, :, None].expand(size).reshape(examples, -1, positions, width) for x in (k, v))
            if self.way == "expand_fused":
                y = F.scaled_dot_product_attention(q, k, v)
            else:
                y = (q @ k.transpose(-1, -2) * width**-0.5).softmax(-1) @ v
        return self.o(y.transpose(1, 2).reshape(examples, positions, -1))


def network(*settings):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 48), GroupedQueryAttention(*settings), nn.Linear(48, 4)).double().eval()


@pytest.mark.parametrize("looks", [False, True], ids=["meta", "real"])
@pytest.mark.parametrize("numbers", ["attributes", "config", "shapes"])
@pytest.mark.parametrize("heads", [(6, 3), (6, 2), (6, 1), (6, 6)], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_a_pruned_attention_equals_its_masked_self(way, heads, numbers, looks):
    net = network(way, *heads, numbers, looks)
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    graph = trace_channels(net, x)
    compared = 0
    for group in graph.groups:
        if group.inexact is None and group.size > 1:
            plan = random_plan(graph, only=lambda other, group=group: other is group)
            pruned = copy.deepcopy(net)
            rewrite(pruned, graph.copy(), plan)
            expected = masked_network(net, graph, plan)(x).detach()
            torch.testing.assert_close(pruned(x).detach(), expected, rtol=0, atol=1e-12 * float(expected.abs().max()))
            compared += 1
    assert compared >= 1
    for name in ("1.q", "1.k", "1.v"):
        assert name in graph.frozen or any(name in {part.layer for part in group.layers} for group in graph.groups)


@pytest.mark.parametrize("way", [way for way in WAYS if way != "einsum"])
@pytest.mark.parametrize("shared", [3, 2])
def test_whole_heads_go(way, shared):
    """One head of key and value goes with the query heads that share it."""
    net = network(way, 6, shared, "attributes", False)
    graph = trace_channels(net, torch.randn(2, 7, 16, dtype=torch.float64))
    group = next(g for g in graph.groups if "1.k" in {part.layer for part in g.layers})
    assert {part.layer for part in group.layers} == {"1.q", "1.k", "1.v"}
    assert (group.size, group.inexact) == (shared, None)
    plan = random_plan(graph, only=lambda other: other is group)
    rewrite(net, graph, plan)
    kept = int(plan[group.name].sum())
    assert (net[1].num_shared, net[1].num_heads) == (kept, kept * 6 // shared)
    assert net[1].width == 8
