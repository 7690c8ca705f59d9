"""Attention, recurrent layers, and modules that keep sizes in attributes."""

import pytest
import torch
import torch.nn.functional as F
from masked_networks import compare_with_masked
from torch import nn


class Attention(nn.Module):
    """Attention as most vision transformers implement it: every size comes from an attribute."""

    def __init__(self, width=12, heads=3, fused=True):
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim, self.fused = heads, width // heads, width, fused
        self.scale = self.head_dim**-0.5
        self.norm, self.qkv, self.proj = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        rows, tokens, _ = x.shape
        qkv = self.qkv(self.norm(x)).reshape(rows, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = (q @ k.transpose(-2, -1) * self.scale).softmax(-1) @ v
        return x + self.proj(y.transpose(1, 2).reshape(rows, tokens, self.attn_dim))


class Computed(Attention):
    """Attention whose sizes are computed from the width of the input."""

    def forward(self, x):
        rows, tokens, width = x.shape
        qkv = self.qkv(self.norm(x)).reshape(rows, tokens, 3, self.num_heads, width // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj(y.transpose(1, 2).reshape(rows, tokens, width))


def transformer(*blocks):
    return nn.Sequential(nn.Linear(5, 12), *blocks, nn.LayerNorm(12), nn.Linear(12, 3))


@pytest.mark.parametrize("fused", [True, False])
def test_whole_heads_are_removed_if_sizes_are_attributes(fused):
    model = transformer(Attention(fused=fused), Attention(fused=fused))
    off, change, graph, small = compare_with_masked(model, (torch.randn(2, 7, 5),))
    assert off < 1e-12 < 1e-3 < change
    heads = graph.group("1.qkv")
    assert (heads.size, heads.filters, heads.inexact) == (3, 12, None)
    assert graph.patched_attributes(graph.groups)["1"] == {"num_heads": 3, "attn_dim": 12}
    assert (small[1].num_heads, small[1].attn_dim, small[1].head_dim) == (1, 4, 4)
    assert graph.coverage() == 1.0


def test_heads_follow_the_residual_stream_if_sizes_are_computed_from_it():
    model = transformer(Computed(), Computed())
    _, change, graph, small = compare_with_masked(
        model, (torch.randn(2, 7, 5),), residual="remove", only=lambda group: True
    )
    assert change > 1e-3
    assert graph.coverage() == 1.0
    assert all("layer norm" in group.inexact for group in graph.groups if "0" in {p.layer for p in group.layers})
    assert small[0].out_features % 3 == 0
    assert small[1].qkv.out_features == 3 * small[0].out_features


def test_heads_are_expanded_if_their_size_follows_a_stream_that_keeps_its_width():
    off, change, graph, _ = compare_with_masked(transformer(Computed()), (torch.randn(2, 7, 5),))
    assert off < 1e-12 < 1e-3 < change
    assert (graph.group("1.qkv").kind, graph.group("1.qkv").expansion.width) == ("expand", 36)
    assert graph.coverage() == 1.0


@pytest.mark.parametrize("residual", ["expand", "remove"])
def test_layers_around_torch_attention_are_pruned(residual):
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Linear(5, 12)
            self.layer = nn.TransformerEncoderLayer(12, 3, 20, batch_first=True, dropout=0.0)
            self.head = nn.Linear(12, 3)

        def forward(self, x):
            return self.head(self.layer(self.stem(x)))

    off, change, graph, small = compare_with_masked(Encoder(), (torch.randn(2, 7, 5),), residual=residual)
    assert off < 1e-12 < 1e-3 < change
    assert graph.group("layer.linear1").size == 20
    small.train()(torch.randn(2, 7, 5).double()).sum().backward()


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_inputs_and_hidden_units_of_recurrent_layers_shrink(kind):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.r, self.b, self.h = (
                nn.Linear(5, 8),
                kind(8, 6, batch_first=True),
                nn.Linear(6, 9),
                nn.Linear(9, 2),
            )

        def forward(self, x):
            return self.h(self.b(self.r(self.a(x).relu())[0][:, -1]).relu())

    off, change, graph, small = compare_with_masked(Recurrent(), (torch.randn(2, 4, 5),))
    assert off < 1e-12 < 1e-3 < change
    assert [group.name for group in graph.groups if not group.name.startswith("r.")] == ["a", "b"]
    assert (small.r.input_size, small.r.hidden_size) == (4, 3)


def test_efficient_channel_attention_is_prunable_and_inexact():
    class ECA(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.e, self.h = nn.Conv2d(3, 8, 3), nn.Conv1d(1, 1, 3, padding=1), nn.Linear(8, 2)

        def forward(self, x):
            y = self.a(x)
            gate = self.e(y.mean((2, 3))[:, None]).sigmoid()[:, 0]
            return self.h((y * gate[:, :, None, None]).mean((2, 3)))

    _, change, graph, _ = compare_with_masked(ECA(), (torch.randn(2, 3, 6, 6),), only=lambda group: True)
    assert change > 1e-3
    assert "slides along the channels" in graph.group("a").inexact
