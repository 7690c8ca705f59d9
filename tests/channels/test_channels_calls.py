"""Several calls of one network are traced together, and copies of its parts are cut like the parts."""

import copy

import pytest
import torch
from masked_networks import masked_network, random_plan, randomize_parameters
from torch import nn

from gflow_pl.channels import CallError, NetworkCopies, trace_calls, trace_channels
from gflow_pl.selection import cost_after, select_units
from gflow_pl.surgery import rewrite
from gflow_pl.values import ChannelGraph, KeepPlan


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.first, self.second = nn.Linear(8, 3), nn.Sequential(nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Conv2d(6, 2, 1))
        self.copied = copy.deepcopy(self.stem)

    def forward(self, x):
        return self.first(self.stem(x).mean((2, 3)))

    def step(self, x):
        return self.second(self.stem(x)), (self.stem(x) - self.copied(x)).square().sum(1)


def traced(model, x, **options):
    calls = {True: [(model.step, (x,))], False: [(model, (x,))]}
    return trace_calls(model, calls, copies=NetworkCopies({"copied": "stem"}), **options)


@pytest.fixture
def model() -> TwoHeads:
    torch.manual_seed(0)
    return randomize_parameters(TwoHeads().double()).eval()


@pytest.mark.parametrize("seed", range(3))
def test_every_call_of_the_pruned_network_is_that_of_the_masked_one(model, seed) -> None:
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    graph = traced(model, x)
    assert {group.name: group.follows for group in graph.groups} == {
        "stem.0": None,
        "copied.0": "stem.0",
        "second.0": None,
    }
    plan = random_plan(graph, seed=seed)
    plan = KeepPlan({name: plan[graph.group(name).follows or name] for name in plan})
    masked, pruned = masked_network(model, graph, plan), copy.deepcopy(model)
    rewrite(pruned, graph.copy(), {name: keep for name, keep in plan.items() if name != "copied.0"})
    assert pruned.copied[0].out_channels == pruned.stem[0].out_channels < 8
    with torch.no_grad():
        outputs = [(pruned(x), masked(x)), *zip(pruned.step(x), masked.step(x), strict=True)]
    assert all((a - b).abs().max() <= 1e-12 * b.abs().max() for a, b in outputs)


def test_the_costs_of_a_layer_count_the_forward_once(model) -> None:
    x = torch.randn(4, 3, 6, 6)
    graph, alone = traced(model.float(), x), trace_channels(model.float(), x)
    assert graph.layers["stem.0"].positions == alone.layers["stem.0"].positions == 36
    assert graph.layers["second.0"].positions == 36


def test_a_plan_counts_a_copy_once_and_cuts_it_along(model) -> None:
    graph = traced(model.float(), torch.randn(4, 3, 6, 6))
    assert graph.num_filters == 8 + 6
    scores = {name: torch.arange(layer.num_filters, dtype=torch.float) for name, layer in graph.layers.items()}
    scores["copied.0"] = scores["copied.0"].flip(0)  # which do not count
    plan = select_units(graph, scores, num_filters=6)
    assert plan["copied.0"].equal(plan["stem.0"])
    assert int((~plan["stem.0"]).sum() + (~plan["second.0"]).sum()) == 6
    before = cost_after(graph)[0]
    asked = select_units(graph, scores, 0.4, target="parameters")
    rewrite(model, graph, asked)
    left = sum(p.numel() for p in model.parameters())
    assert left == cost_after(graph)[0]
    assert 1 - left / before == pytest.approx(asked.reached, abs=1e-9)


def test_a_graph_with_copies_is_saved_as_plain_data(model) -> None:
    graph = traced(model.float(), torch.randn(4, 3, 6, 6))
    again = ChannelGraph.from_dict(graph.as_dict())
    assert [group.follows for group in again.groups] == [group.follows for group in graph.groups]
    older = graph.as_dict()
    for group in older["groups"]:
        del group["follows"]
    assert {group.follows for group in ChannelGraph.from_dict(older).groups} == {None}


def test_a_plan_that_contradicts_a_copy_is_refused(model) -> None:
    graph = traced(model.float(), torch.randn(4, 3, 6, 6))
    keep = torch.arange(8) > 2
    with pytest.raises(ValueError, match=r"keeps other units of group 'copied\.0' than of 'stem\.0'"):
        rewrite(model, graph, {"stem.0": keep, "copied.0": keep.flip(0)})


def test_a_module_that_stays_whole_keeps_what_it_is_compared_with(model) -> None:
    x = torch.randn(4, 3, 6, 6)
    calls = {True: [(model.float().step, (x,))], False: [(model, (x,))]}
    graph = trace_calls(model, calls, whole={"copied": "a teacher"}, residual="remove")
    assert graph.frozen["copied.0"] == graph.frozen["stem.0"] == "a teacher"
    assert [group.name for group in graph.groups] == ["second.0"]


def test_a_call_that_fails_is_an_error(model) -> None:
    def fails(x):
        raise RuntimeError("no such thing")

    x = torch.randn(4, 3, 6, 6)
    with pytest.raises(CallError, match="no such thing"):
        trace_calls(model.float(), {True: [(fails, (x,))], False: [(model, (x,))]})
