"""Layers that lose filters while the stream that they write into keeps its width."""

import copy
import pickle

import pytest
import torch
from masked_networks import compare_with_masked, masked_network, random_plan, randomize_parameters
from torch import nn

from gflow_pl import models
from gflow_pl.channels import trace_channels
from gflow_pl.surgery import apply_structure, rewrite, structure_of
from gflow_pl.values import Expansion


class PreActivation(nn.Module):
    """norm -> relu -> conv, twice, and the sum goes on; branches end in a conv."""

    def __init__(self, width=8):
        super().__init__()
        self.n1, self.c1 = nn.BatchNorm2d(width), nn.Conv2d(width, 6, 3, padding=1)
        self.n2, self.c2 = nn.BatchNorm2d(6), nn.Conv2d(6, width, 3, padding=1)

    def forward(self, x):
        return x + self.c2(self.n2(self.c1(self.n1(x).relu())).relu())


class Scaled(nn.Module):
    """Layer scale and stochastic depth between the norm and the sum."""

    def __init__(self, width=8):
        super().__init__()
        self.c1, self.n1 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.gamma = nn.Parameter(torch.full((width, 1, 1), 0.5))

    def forward(self, x):
        branch = self.n1(self.c1(x)) * self.gamma
        if self.training:
            branch = branch * branch.new_empty((x.shape[0], 1, 1, 1)).bernoulli_(0.8).div_(0.8)
        return (x + branch).relu()


class WithMask(nn.Module):
    """An encoder layer of linear layers, and a sum written in place."""

    def __init__(self, width=8):
        super().__init__()
        self.up, self.down = nn.Conv2d(width, 12, 1), nn.Conv2d(12, width, 1, bias=False)

    def forward(self, x):
        y = self.down(self.up(x).relu())
        y += x
        return y


def network(block):
    stem = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*stem, block(), block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


@pytest.mark.parametrize(
    ("block", "places"),
    [
        (PreActivation, {"0": "1", "3.c2": "3.c2", "4.c2": "4.c2"}),
        (Scaled, {"0": "1", "3.c1": "3.n1", "4.c1": "4.n1"}),
        (WithMask, {"0": "1", "3.down": "3.down", "4.down": "4.down"}),
    ],
)
def test_every_layer_that_writes_into_the_stream_is_expanded_alone(block, places):
    off, change, graph, small = compare_with_masked(network(block), (torch.randn(2, 3, 6, 6),))
    assert off < 1e-12 < 1e-3 < change
    expanded = {group.name: group.expansion for group in graph.groups if group.kind == "expand"}
    assert {name: expansion.module for name, expansion in expanded.items()} == places
    assert {(expansion.dim % 4, expansion.width) for expansion in expanded.values()} == {(1, 8)}
    assert graph.coverage() == 1.0
    assert small[3](torch.zeros(1, 8, 2, 2).double()).shape[1] == 8


@pytest.mark.parametrize("block", [PreActivation, Scaled, WithMask])
def test_with_remove_the_whole_stream_shrinks(block):
    off, change, graph, small = compare_with_masked(network(block), (torch.randn(2, 3, 6, 6),), residual="remove")
    assert off < 1e-12 < 1e-3 < change
    assert {group.kind for group in graph.groups} == {"remove"}
    assert small[0].out_channels == 4


def test_no_plan_of_one_expanded_group_implies_another():
    graph = trace_channels(models.resnet56(10), torch.zeros(1, 3, 32, 32))
    seen = set()
    for group in graph.groups:
        if group.kind == "expand":
            for part in group.slices:
                assert (part.tensor, part.dim) not in seen
                seen.add((part.tensor, part.dim))


def test_a_layer_norm_is_no_place_to_expand_behind():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

        def forward(self, x):
            return x + self.norm(self.lin(x))

    model = nn.Sequential(nn.Linear(4, 8), Block(), nn.Linear(8, 2))
    off, change, graph, _ = compare_with_masked(model, (torch.randn(5, 4),))
    assert off < 1e-12 < 1e-3 < change
    assert graph.group("1.lin").expansion.module == "1.lin"
    assert graph.layers["1.lin"].norm == "1.norm"


def test_a_layer_that_others_read_before_its_norm_is_expanded_itself():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)

        def forward(self, x):
            y = self.conv(x)
            return x + self.norm(y) * y.sigmoid()

    off, change, graph, _ = compare_with_masked(network(Block), (torch.randn(2, 3, 6, 6),))
    assert off < 1e-12 < 1e-3 < change
    assert graph.group("3.conv").expansion.module == "3.conv"


@pytest.mark.parametrize("block", [PreActivation, Scaled])
def test_a_network_pruned_before_traces_to_what_its_graph_became(block):
    model, x = randomize_parameters(network(block).double()).eval(), torch.randn(2, 3, 6, 6).double()
    graph = trace_channels(model, x)
    rewrite(model, graph, random_plan(graph))
    again = trace_channels(model, x)
    assert [group.name for group in again.groups] == [group.name for group in graph.groups]
    for new, old in zip(again.groups, graph.groups, strict=True):
        assert (new.kind, new.size, new.filters, new.expansion) == (old.kind, old.size, old.filters, old.expansion)
        tables = [{(s.tensor, s.dim): s.index.tolist() for s in group.slices} for group in (new, old)]
        assert tables[0] == tables[1]
    assert again.shapes == graph.shapes
    assert again.layers == graph.layers


def test_two_rounds_equal_their_masked_twins():
    model, x = randomize_parameters(models.resnet18(10).double()).eval(), torch.randn(2, 3, 32, 32).double()
    graph = trace_channels(model, x)
    rewrite(model, graph, random_plan(graph, 0.3))
    off, change, _, _ = compare_with_masked(copy.deepcopy(model), (x,), seed=1)
    assert off < 1e-12 < 1e-3 < change


class Stubborn(nn.Module):
    """Sorting over the channels freezes them; `frozen="expand"` prunes their layer all the same."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b, self.c = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 1), nn.Linear(6, 2)

    def forward(self, x):
        return self.c(self.b(self.norm(self.a(x)).sort(1)[0]).mean((2, 3)))


def test_frozen_layers_are_expanded_on_demand():
    x = torch.randn(2, 3, 6, 6)
    kept = trace_channels(Stubborn(), x)
    assert [group.name for group in kept.groups] == ["b"]
    assert "over the channels" in kept.frozen["a"]
    off, change, graph, _ = compare_with_masked(Stubborn(), (x,), frozen="expand")
    assert off < 1e-12 < 1e-3 < change
    assert [(group.name, group.kind) for group in graph.groups] == [("a", "expand"), ("b", "remove")]
    assert graph.group("a").expansion.module == "norm"
    assert list(graph.frozen) == ["c"]


def test_inexact_units_are_expanded_on_demand_where_only_exact_ones_may_go():
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 2))
    x = torch.randn(5, 4)
    assert "layer norm" in trace_channels(model, x).group("0").inexact
    off, change, graph, _ = compare_with_masked(model, (x,), frozen="expand", exact_only=True)
    assert off < 1e-12 < 1e-3 < change
    assert [(group.name, group.kind, group.inexact) for group in graph.groups] == [("0", "expand", None)]


class DepthwiseOnStream(nn.Module):
    """A depthwise convolution (or one of small groups) reads the stream, and something mixes its channels."""

    def __init__(self, groups=8, filters=8):
        super().__init__()
        self.dw, self.norm = nn.Conv2d(8, filters, 3, padding=1, groups=groups), nn.GroupNorm(1, filters)
        self.up, self.down = nn.Conv2d(filters, 12, 1), nn.Conv2d(12, 8, 1)

    def forward(self, x):
        return x + self.down(self.up(self.norm(self.dw(x))).relu())


@pytest.mark.parametrize(("groups", "filters"), [(8, 8), (8, 16), (4, 8), (2, 8)])
def test_grouped_convolutions_pick_what_they_read_out_of_the_stream(groups, filters):
    def block():
        return DepthwiseOnStream(groups, filters)

    x = torch.randn(2, 3, 6, 6)
    off, change, graph, small = compare_with_masked(network(block), (x,))
    assert off < 1e-12 < 1e-3 < change
    assert graph.coverage() == 1.0
    group = graph.group("3.dw")
    if groups < 8 // groups:  # few large groups lose the same position of each, and read on what they read
        assert group.kind == "remove"
        return
    assert (group.kind, [part.votes for part in group.layers]) == ("expand", [True])
    assert group.expansion == Expansion("3.dw", dim=-3, width=filters, gathers=True)
    assert (small[3].dw.groups, small[3].dw.in_channels, small[3].dw.out_channels) == (groups // 2, 4, filters // 2)
    together = trace_channels(network(block), x, residual="remove")
    assert [(part.layer, part.votes) for part in together.group("0").layers if "dw" in part.layer] == [
        ("3.dw", filters == 8 > groups),
        ("4.dw", filters == 8 > groups),
    ]


def test_a_layer_is_expanded_alike_for_inputs_of_any_number_of_dims():
    class Mixer(nn.Module):
        """Its linear layer sees sequences and pooled vectors; its convolution also works on one example alone."""

        def __init__(self):
            super().__init__()
            self.stem, self.conv = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)
            self.mix, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            x = self.stem(x)
            x = (x + self.conv(x)).flatten(-2).transpose(-2, -1)
            x = x + self.mix(x)
            pooled = x.mean(-2)
            return self.head(pooled + self.mix(pooled))

    x = torch.randn(2, 3, 4, 4)
    off, change, graph, small = compare_with_masked(Mixer(), (x,))
    assert off < 1e-12 < 1e-3 < change
    assert graph.coverage() == 1.0
    assert [graph.group(name).expansion.dim for name in ("conv", "mix")] == [-3, -1]
    assert (small(x[0].double()) - small(x.double())[0]).abs().max() < 1e-12


def test_a_network_that_gathers_goes_on_like_any_other(tmp_path):
    model, x = randomize_parameters(network(DepthwiseOnStream).double()).eval(), torch.randn(2, 3, 6, 6).double()
    graph = trace_channels(model, x)
    rewrite(model, graph, random_plan(graph, 0.3))
    again = trace_channels(model, x)
    for new, old in zip(again.groups, graph.groups, strict=True):
        assert (new.name, new.kind, new.size, new.expansion) == (old.name, old.kind, old.size, old.expansion)
        tables = [{(s.tensor, s.dim): s.index.tolist() for s in group.slices} for group in (new, old)]
        assert tables[0] == tables[1]
    off, change, _, small = compare_with_masked(copy.deepcopy(model), (x,), seed=1)
    assert off < 1e-12 < 1e-3 < change
    torch.save({"structure": structure_of(small).as_dict(), "state": small.state_dict()}, tmp_path / "net.pt")
    saved = torch.load(tmp_path / "net.pt", weights_only=True)
    fresh = network(DepthwiseOnStream).double().eval()
    apply_structure(fresh, saved["structure"])
    fresh.load_state_dict(saved["state"])
    assert torch.equal(fresh(x), small(x))
    copied = pickle.loads(pickle.dumps(copy.deepcopy(small)))
    assert torch.equal(copied(x), small(x))
    whole = structure_of(network(DepthwiseOnStream))
    apply_structure(fresh, whole)
    assert structure_of(fresh) == whole
    assert not fresh[3].dw._forward_pre_hooks


def test_a_gathering_convolution_may_be_emptied():
    model, x = randomize_parameters(network(DepthwiseOnStream).double()).eval(), torch.randn(2, 3, 6, 6).double()
    graph = trace_channels(model, x)
    plan = {"3.dw": torch.zeros(8, dtype=torch.bool)}
    everything = {group.name: torch.ones(group.size, dtype=torch.bool) for group in graph.groups}
    masked = masked_network(model, graph, {**everything, **plan})(x)
    rewrite(model, graph, plan)
    assert model[3].dw.weight.numel() == 0
    assert (model(x) - masked).abs().max() < 1e-12 * masked.abs().max()


def test_a_block_that_stands_in_two_places_keeps_its_expansion():
    model, x = randomize_parameters(network(PreActivation).double()).eval(), torch.randn(2, 3, 6, 6).double()
    model[4] = model[3]
    graph = trace_channels(model, x)
    structure = rewrite(model, graph, random_plan(graph))
    fresh = network(PreActivation).double().eval()
    fresh[4] = fresh[3]
    apply_structure(fresh, structure)
    fresh.load_state_dict(model.state_dict())
    assert "3.c2" in structure.expansions
    assert torch.equal(fresh(x), model(x))


def test_depthwise_convolutions_that_are_called_by_keyword_stay():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.depthwise = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1, groups=8)
            self.point, self.head = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x):
            x = self.stem(x)
            return self.head(x + self.point(self.depthwise(input=x).relu()))

    off, change, graph, _ = compare_with_masked(Block(), (torch.randn(2, 3, 6, 6),))
    assert off < 1e-12 < 1e-3 < change
    assert "passed by keyword" in graph.frozen["depthwise"]
