"""Layers without a module of their own: weights that modules use through products and convolutions."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from masked_networks import compare_with_masked, random_plan
from own_weights import Convolutions, LanguageModel, OwnLinear, Products
from torch import nn
from torch.nn.utils import parametrizations

from gflow_pl import apply_structure, rewrite, structure_of, trace_channels
from gflow_pl.values import ChannelGraph, Structure


def what_happens(graph):
    kinds = {part.layer: group.kind for group in graph.groups for part in group.layers}
    return {name: kinds.get(name, "frozen") for name in graph.layers}


@pytest.mark.parametrize("residual", ["expand", "remove"])
def test_a_language_model_of_own_layers_loses_heads_and_inner_widths(residual):
    torch.manual_seed(0)
    tokens = torch.randint(0, 20, (2, 7))
    off, change, graph, small = compare_with_masked(LanguageModel(), (tokens,), residual=residual)
    assert off < 1e-12 < 1e-3 < change
    assert graph.coverage() == 1.0
    heads, stream = (
        graph.group("h.0.attn.c_attn"),
        graph.group("h.1.attn.c_proj" if residual == "expand" else "h.0.attn.c_proj"),
    )
    assert (heads.size, heads.filters, heads.inexact) == (3, 12, None)
    assert stream.kind == residual
    assert small.h[0].attn.c_attn.nf == small.h[0].attn.c_attn.weight.shape[1] < 36
    assert small.h[0].attn.split_size == small.h[0].attn.c_attn.nf // 3
    if residual == "expand":
        assert small.wte.weight.shape[1] == 12
        assert small.h[1].c_proj(torch.randn(2, 3, small.h[1].c_proj.weight.shape[0]).double()).shape[-1] == 12


def test_every_product_that_applies_a_weight_makes_it_a_layer():
    off, change, graph, small = compare_with_masked(Products(), (torch.randn(3, 8),))
    assert off < 1e-12 < 1e-3 < change
    assert {name: (layer.weight, layer.dim) for name, layer in graph.layers.items()} == {
        "w": ("w", 1),
        "v": ("v", 0),
        "u": ("u", 0),
        "head": ("head.weight", 0),
    }
    assert what_happens(graph) == {"w": "remove", "v": "remove", "u": "remove", "head": "frozen"}
    assert [tuple(p.shape) for p in (small.w, small.b, small.v, small.u)] == [(8, 8), (8,), (6, 8), (5, 6)]


def test_convolutions_of_own_kernels_are_layers_and_a_depthwise_one_follows():
    off, change, graph, small = compare_with_masked(Convolutions(), (torch.randn(2, 3, 8, 8),))
    assert off < 1e-12 < 1e-3 < change
    assert [(part.layer, part.votes) for part in graph.group("plain").layers] == [("plain", True), ("depthwise", False)]
    assert (graph.layers["plain"].norm, graph.layers["transposed"].dim) == ("norm", 1)
    assert small.transposed.shape == (4, 3, 2, 2)


def test_multiply_accumulates_are_those_of_equal_modules():
    class Modules(nn.Module):
        def __init__(self):
            super().__init__()
            self.plain, self.depthwise = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
            self.transposed, self.head = nn.ConvTranspose2d(8, 6, 2, stride=2), nn.Linear(6, 2)

        def forward(self, x):
            return self.head(self.transposed(self.depthwise(self.plain(x))).mean((2, 3)))

    x = torch.randn(2, 3, 8, 8)
    own, modules = trace_channels(Convolutions(), x), trace_channels(Modules(), x)
    assert {n: own.layers[n].positions for n in own.layers} == {n: modules.layers[n].positions for n in own.layers}
    assert {n: own.uses[own.layers[n].weight] for n in own.layers} == {
        n: modules.uses[f"{n}.weight"] for n in own.layers
    }


def test_parts_of_a_weight_that_are_used_apart_make_one_layer():
    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.both, self.head = nn.Linear(4, 6), nn.Parameter(torch.randn(20, 6)), nn.Linear(10, 2)

        def forward(self, x):
            gate, value = self.both.chunk(2)
            x = self.stem(x)
            return self.head(F.linear(x, gate).sigmoid() * F.linear(x, value))

    off, change, graph, _ = compare_with_masked(Parts(), (torch.randn(3, 4),))
    assert off < 1e-12 < 1e-3 < change
    assert (graph.group("both").size, graph.group("both").filters) == (10, 2)
    assert graph.layers["both"].positions == graph.layers["stem"].positions == 1


def test_a_weight_that_is_used_in_both_directions_is_two_layers():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.w, self.head = nn.Linear(4, 9), nn.Parameter(torch.randn(7, 9)), nn.Linear(9, 2)

        def forward(self, x):
            code = F.relu(F.linear(F.relu(self.stem(x)), self.w))
            return self.head(F.relu(F.linear(code, self.w.t())))

    off, change, graph, _ = compare_with_masked(Tied(), (torch.randn(3, 4),))
    assert off < 1e-12 < 1e-3 < change
    assert {name: layer.dim for name, layer in graph.layers.items()} == {"stem": 0, "w": 0, "w.dim1": 1, "head": 0}
    assert {part.layer for part in graph.group("stem").layers} == {"stem", "w.dim1"}


def test_a_linear_layer_that_only_lends_its_weight_is_a_layer():
    class Lender(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.head(F.relu(F.linear(x, self.inner.weight, self.inner.bias)))

    off, change, graph, small = compare_with_masked(Lender(), (torch.randn(3, 4),))
    assert off < 1e-12 < 1e-3 < change
    assert what_happens(graph) == {"inner": "remove", "head": "frozen"}
    assert (small.inner.out_features, small.inner.bias.shape) == (4, (4,))


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, torch.nn.utils.weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_the_weight_of_an_own_layer_may_be_computed(norm):
    def network(layer):
        torch.manual_seed(0)
        return nn.Sequential(layer(5, 8), nn.ReLU(), norm(layer(8, 10)), nn.ReLU(), nn.Linear(10, 2)).eval()

    own, linear, x = network(OwnLinear), network(nn.Linear), torch.randn(3, 5)
    linear.load_state_dict(own.state_dict())
    graphs = [trace_channels(model, x) for model in (own, linear)]
    assert [group.name for group in graphs[0].groups] == [group.name for group in graphs[1].groups] == ["0", "2"]
    outputs = []
    for model, graph in zip((own, linear), graphs, strict=True):
        rewrite(model, graph, random_plan(graph))
        outputs.append(model(x))
    torch.testing.assert_close(*outputs)


def test_products_of_parameters_or_of_activations_are_no_layers():
    class LowRank(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(3, 6)), nn.Parameter(torch.randn(8, 3))
            self.stem, self.head = nn.Linear(4, 6), nn.Linear(8, 2)

        def forward(self, x):
            x = self.stem(x)
            scores = (x @ x.T).softmax(-1)
            return self.head(F.relu(scores @ F.linear(x, self.b @ self.a)))

    off, change, graph, _ = compare_with_masked(LowRank(), (torch.randn(3, 4),))
    assert off < 1e-12 < 1e-3 < change
    assert list(graph.layers) == ["b", "stem", "head"]  # filters of the product are rows of its first factor


def test_what_no_module_returns_stays_if_the_residual_stream_keeps_its_width():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.v = nn.Parameter(torch.randn(6, 12)), nn.Parameter(torch.randn(12, 6))

        def forward(self, x):
            return x + F.relu(x @ self.w) @ self.v

    model = nn.Sequential(nn.Linear(4, 6), Block(), Block(), nn.Linear(6, 2))
    off, change, graph, _ = compare_with_masked(copy.deepcopy(model), (torch.randn(3, 4),))
    assert off < 1e-12 < 1e-3 < change
    assert what_happens(graph) == {
        "0": "expand",
        "1.w": "remove",
        "1.v": "frozen",
        "2.w": "remove",
        "2.v": "frozen",
        "3": "frozen",
    }
    assert graph.frozen["1.v"] == "the residual stream keeps its width"
    off, change, graph, _ = compare_with_masked(model, (torch.randn(3, 4),), residual="remove")
    assert off < 1e-12 < 1e-3 < change
    assert {part.layer for part in graph.group("0").layers} == {"0", "1.v", "2.v"}


def test_a_module_that_changes_removed_filters_is_not_scattered():
    class Squashed(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 6))

        def forward(self, x):
            return F.linear(x, self.weight).sigmoid()

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Squashed()

        def forward(self, x):
            return x + self.inner(x)

    model = nn.Sequential(nn.Linear(4, 6), Block(), nn.Linear(6, 2))
    off, change, graph, _ = compare_with_masked(model, (torch.randn(3, 4),))
    assert off < 1e-12 < 1e-3 < change
    assert what_happens(graph)["1.inner"] == "frozen"


def test_a_pruned_network_of_own_layers_is_rebuilt_from_its_structure():
    torch.manual_seed(0)
    tokens = torch.randint(0, 20, (2, 7))
    model = LanguageModel().double().eval()
    fresh = copy.deepcopy(model)
    graph = trace_channels(model, tokens)
    rewrite(model, graph, random_plan(graph, 0.4))
    graph = ChannelGraph.from_dict(graph.as_dict())
    assert graph.layers["h.0.c_fc"].num_filters == model.h[0].c_fc.weight.shape[1]
    file = io.BytesIO()
    torch.save({"structure": structure_of(model).as_dict(), "state": model.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    apply_structure(fresh, Structure.from_dict(saved["structure"]))
    fresh.load_state_dict(saved["state"])
    assert torch.equal(fresh(tokens), model(tokens))
    again = trace_channels(model, tokens)  # expansions of own layers are found again
    assert what_happens(again) == what_happens(graph)
    assert {g.name: g.size for g in again.groups} == {g.name: g.size for g in graph.groups}


def test_a_graph_of_an_older_version_has_only_modules_as_layers():
    graph = trace_channels(nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 2)), torch.zeros(1, 3))
    data = graph.as_dict()
    new = ("dim", "bias", "module", "output_dim", "is_functional")
    data["layers"] = [{key: value for key, value in layer.items() if key not in new} for layer in data["layers"]]
    loaded = ChannelGraph.from_dict(data)
    assert not any(layer.is_functional for layer in loaded.layers.values())
    assert loaded.layers.keys() == graph.layers.keys()


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = OwnLinear(12, 12, True)

    def forward(self, x):
        return x + self.inner(x)


def test_an_own_layer_may_lose_all_of_its_filters():
    model = nn.Sequential(OwnLinear(5, 12, True), Residual(), nn.Linear(12, 2)).double().eval()
    graph, x = trace_channels(model, torch.zeros(2, 5).double()), torch.randn(2, 5).double()
    plan = {"1.inner": torch.zeros(12, dtype=torch.bool)}
    with torch.no_grad():
        expected = model[2](model[0](x))
        rewrite(model, graph, plan)
        assert torch.equal(model(x), expected)
