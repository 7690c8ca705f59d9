"""`select_units` on graphs that are small enough to work out by hand, and on random ones against a plain loop."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gflow_pl.selection import cost_after, select_units
from gflow_pl.values import ChannelGraph, ChannelGroup, Expansion, KeepPlan, Layer, LayerUnits, Scores, Slice


def group(name, size, *, kind="remove", width=1, voters=None, followers=(), original=None, kept=None, slices=()):
    """A group of `size` units; each voter gives a unit `width` neighbouring channels."""
    index = np.arange(size * width).reshape(size, width)
    layers = [LayerUnits(layer, index) for layer in (voters or [name])]
    layers += [LayerUnits(layer, index, votes=False) for layer in followers]
    return ChannelGroup(
        name=name,
        kind=kind,
        original_size=original or size,
        kept=tuple(kept if kept is not None else range(size)),
        filters=width * len(layers),
        layers=tuple(layers),
        slices=tuple(slices),
        expansion=Expansion(name, 1, size) if kind == "expand" else None,
    )


def removed_units(plan):
    """The units that a plan removes, by group; groups that stay whole are left out."""
    return {name: torch.where(~keep)[0].tolist() for name, keep in plan.items() if not keep.all()}


def test_the_lowest_units_of_the_whole_network_are_removed():
    graph = ChannelGraph([group("a", 4), group("b", 2)])
    plan = select_units(graph, {"a": torch.tensor([5.0, 1.0, 3.0, 9.0]), "b": torch.tensor([2.0, 8.0])}, 0.5)
    assert removed_units(plan) == {"a": [1, 2], "b": [0]}
    assert plan.asked == plan.reached == 0.5


def test_equal_scores_are_removed_in_the_order_of_the_network():
    graph = ChannelGraph([group("a", 3), group("b", 3)])
    plan = select_units(graph, {"a": torch.ones(3), "b": torch.ones(3)}, 0.5)
    # The floor keeps the last unit of each group.
    assert removed_units(plan) == {"a": [0, 1], "b": [0]}


def test_a_rounding_error_in_the_fraction_does_not_cost_a_filter():
    graph = ChannelGraph([group("a", 100)])
    # 0.29 * 100 is 28.999999999999996 in floating point.
    assert select_units(graph, {"a": torch.arange(100.0)}, 0.29).num_removed == 29


def test_the_floor_keeps_the_best_units_and_the_next_ones_are_removed_instead():
    graph = ChannelGraph([group("a", 10), group("b", 10)])
    low = torch.tensor([0.7, 0.9, 0.1, 0.8, 0.2, 0.3, 0.6, 0.4, 0.5, 0.0])
    plan = select_units(graph, {"a": low, "b": 1 + torch.arange(10.0)}, 0.5, min_kept=0.3)
    assert removed_units(plan) == {"a": [2, 4, 5, 6, 7, 8, 9], "b": [0, 1, 2]}


def test_the_floor_refers_to_the_original_size():
    graph = ChannelGraph([group("a", 4, original=20, kept=[1, 2, 5, 9]), group("b", 16)])
    plan = select_units(graph, {"a": torch.zeros(4), "b": torch.ones(16)}, 0.2, min_kept=0.15)
    assert removed_units(plan) == {"a": [0], "b": [0, 1, 2]}


@pytest.mark.parametrize(("min_kept", "left"), [(0.0, 0), (0.05, 1), (1e-6, 1), (0.1, 1), (0.11, 2)])
def test_an_expanded_group_may_be_emptied_only_without_a_floor(min_kept, left):
    graph = ChannelGraph([group("a", 10, kind="expand"), group("b", 30)])
    plan = select_units(graph, {"a": torch.zeros(10), "b": torch.ones(30)}, 0.5, min_kept=min_kept)
    assert plan["a"].sum() == left
    assert plan.num_removed == 20


def test_a_group_that_is_removed_keeps_at_least_one_unit():
    graph = ChannelGraph([group("a", 10), group("b", 30)])
    plan = select_units(graph, {"a": torch.zeros(10), "b": torch.ones(30)}, 0.5, min_kept=0)
    assert plan["a"].tolist() == [False] * 9 + [True]


def test_a_target_out_of_reach_is_a_warning_with_the_difference():
    graph = ChannelGraph([group("a", 10), group("b", 10)])
    scores = {"a": torch.arange(10.0), "b": torch.arange(10.0)}
    with pytest.warns(
        UserWarning, match=r"remove 15 of 20 filters, but only 9 can be removed \(6 fewer, 45\.0% instead of 75\.0%\)"
    ):
        plan = select_units(graph, scores, 0.75, ignore="a")
    assert plan["a"].all()
    assert plan["b"].sum() == 1
    assert (plan.asked, plan.reached) == (0.75, 0.45)


@pytest.mark.parametrize("ignore", ["layer1", ["layer1.0.conv2"], ["depthwise"], ["layer1.0.conv1"]])
def test_ignore_accepts_layers_groups_followers_and_prefixes(ignore):
    graph = ChannelGraph(
        [
            group("layer1.0.conv1", 4, voters=["layer1.0.conv1", "layer1.0.conv2"], followers=["depthwise"]),
            group("layer10.conv", 12),
        ]
    )
    scores = {"layer1.0.conv1": torch.zeros(4), "layer1.0.conv2": torch.zeros(4), "layer10.conv": torch.ones(12)}
    assert removed_units(select_units(graph, scores, 0.1, ignore=ignore)) == {"layer10.conv": [0, 1]}


def test_a_frozen_layer_may_be_named_in_ignore():
    graph = ChannelGraph([group("a", 4)], layers={"head": Layer("head", "head.weight", 10, 1)})
    assert select_units(graph, {"a": torch.arange(4.0)}, 0.25, ignore=["head"]).num_removed == 1


def test_a_name_in_ignore_that_matches_nothing_is_refused_with_the_nearest_names():
    graph = ChannelGraph([group("layer1.0.conv1", 4), group("layer2.0.conv1", 4)])
    with pytest.raises(ValueError, match=r"`ignore` names 'layer2\.0\.conv', .*Did you mean 'layer2\.0\.conv1'"):
        select_units(graph, {}, 0.5, ignore=["layer2.0.conv"])
    with pytest.raises(ValueError, match=r"Known: layer1, layer1\.0, layer1\.0\.conv1"):
        select_units(graph, {}, 0.5, ignore=["???"])


def test_the_score_of_a_unit_is_the_mean_over_layers_of_the_mean_over_channels():
    graph = ChannelGraph([group("a", 2, width=2, voters=["a", "b"], followers=["c"]), group("d", 1, kind="expand")])
    scores = {
        "a": torch.tensor([0.0, 4.0, 1.0, 1.0]),  # unit means 2, 1
        "b": torch.tensor([0.0, 0.0, 3.0, 3.0]),  # 0, 3 -> units 1, 2
        "c": torch.tensor([-99.0] * 4),  # has no vote
    }
    for score, removed in ((0.5, {"d": [0]}), (1.5, {"a": [0]})):
        plan = select_units(graph, {**scores, "d": torch.tensor([score])}, num_filters=6, min_kept=0)
        # A unit of "a" counts six filters: it does not fit once "d" is removed.
        assert removed_units(plan) == removed


@pytest.mark.parametrize(("unit_score", "lowest"), [("mean", [1]), ("sum", [1]), ("max", [2])])
def test_unit_score_is_the_mean_the_sum_or_the_maximum(unit_score, lowest):
    graph = ChannelGraph([group("a", 3, voters=["a", "b"])])
    scores = {"a": torch.tensor([9.0, 0.0, 4.0]), "b": torch.tensor([9.0, 5.0, 4.0])}
    assert removed_units(select_units(graph, scores, 0.34, unit_score=unit_score)) == {"a": lowest}


def test_sum_favours_units_with_more_channels():
    graph = ChannelGraph([group("wide", 2, width=3), group("thin", 2)])
    scores = {"wide": torch.ones(6), "thin": torch.full((2,), 2.0)}
    assert removed_units(select_units(graph, scores, num_filters=3)) == {"wide": [0]}
    assert removed_units(select_units(graph, scores, num_filters=3, unit_score="sum")) == {"thin": [0]}


def test_scope_layer_compares_no_scores_across_groups():
    graph = ChannelGraph([group("a", 8), group("b", 4), group("c", 4)])
    scores = {"a": torch.arange(8.0), "b": 1000 * torch.arange(4.0), "c": torch.tensor([3.0, 2.0, 1.0, 0.0]) / 1000}
    plan = select_units(graph, scores, 0.5, scope="layer")
    assert removed_units(plan) == {"a": [0, 1, 2, 3], "b": [0, 1], "c": [2, 3]}
    assert removed_units(select_units(graph, scores, 0.5)) == {"a": [0, 1, 2, 3], "b": [0], "c": [1, 2, 3]}


def test_scope_layer_reaches_the_exact_count():
    graph = ChannelGraph([group("a", 7), group("b", 5), group("c", 3)])
    scores = {name: torch.rand(size) for name, size in (("a", 7), ("b", 5), ("c", 3))}
    plan = select_units(graph, scores, 0.5, scope="layer")
    assert plan.num_removed == 7
    for name, size in (("a", 7), ("b", 5), ("c", 3)):
        assert abs(int((~plan[name]).sum()) - size / 2) <= 1


def test_a_group_without_scores_is_kept_whole_with_a_warning():
    graph = ChannelGraph([group("a", 4), group("b", 4), group("c", 4, voters=["c", "d"])])
    with pytest.warns(UserWarning, match="Kept whole, because none of their layers is scored: b"):
        plan = select_units(graph, {"a": torch.zeros(4), "d": torch.ones(4), "elsewhere": torch.zeros(3)}, 0.5)
    assert plan["b"].all()
    # Eight of the sixteen filters: three of "a", and two units of "c" with two filters each.
    assert removed_units(plan) == {"a": [0, 1, 2], "c": [0, 1]}


def test_an_ignored_group_without_scores_raises_no_warning():
    graph = ChannelGraph([group("a", 4), group("b", 4)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        select_units(graph, {"a": torch.zeros(4)}, 0.25, ignore=["b"])


def test_scores_of_another_width_are_refused():
    graph = ChannelGraph([group("a", 4)], layers={"a": Layer("a", "a.weight", 4, 1)})
    with pytest.raises(ValueError, match="'a' are for 8 filters, but it has 4 now"):
        select_units(graph, {"a": torch.zeros(8)}, 0.5)
    with pytest.raises(ValueError, match="'a' are for 3 filters, but it has at least 4 now"):
        select_units(ChannelGraph([group("a", 4)]), {"a": torch.zeros(3)}, 0.5)


def test_scores_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="NaN or infinity"):
        select_units(ChannelGraph([group("a", 2)]), {"a": torch.tensor([1.0, float("nan")])}, 0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 75}, r"`fraction` must be in \[0, 1\], got 75. It is a fraction: for 75 % write 0.75."),
        ({"fraction": -0.1}, r"`fraction` must be in \[0, 1\], got -0.1."),
        ({"fraction": 0.5, "min_kept": 5}, r"`min_kept` must be in \[0, 1\], got 5. .* write 0.05."),
        ({"fraction": 0.5, "num_filters": 3}, "either `fraction` or `num_filters`"),
        ({}, "either `fraction` or `num_filters`"),
        ({"num_filters": -1}, "at least 0, got -1"),
        ({"num_filters": 3, "target": "macs"}, "give a `fraction`"),
        ({"fraction": 0.5, "target": "flops"}, "`target` must be one of filters, parameters, macs, got 'flops'"),
        ({"fraction": 0.5, "scope": "local"}, "`scope` must be one of global, layer, got 'local'"),
        ({"fraction": 0.5, "unit_score": "min"}, "`unit_score` must be one of mean, sum, max, got 'min'"),
    ],
)
def test_impossible_arguments_are_refused_in_one_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        select_units(ChannelGraph([group("a", 4)]), {"a": torch.zeros(4)}, **options)


def test_half_precision_and_mixed_types_rank_like_full_precision():
    graph = ChannelGraph([group("a", 3), group("b", 3)])
    scores = {"a": torch.tensor([1.0, 2.0, 3.0]).bfloat16(), "b": torch.tensor([1.5, 2.5, 0.5]).double()}
    assert removed_units(select_units(graph, scores, 0.5)) == {"a": [0], "b": [0, 2]}


def test_a_graph_without_groups_gives_an_empty_plan():
    plan = select_units(ChannelGraph([]), {"head": torch.ones(3)}, 0.5)
    assert dict(plan) == {}
    assert plan.reached == 0


@st.composite
def problems(draw):
    """A graph with units of several widths, scores with many ties, ignored groups, a fraction and a floor."""
    groups, scores = [], {}
    for number in range(draw(st.integers(1, 5))):
        size, width = draw(st.integers(1, 12)), draw(st.sampled_from([1, 1, 2, 3]))
        kind = draw(st.sampled_from(["remove", "expand"]))
        original = size + draw(st.integers(0, 8))
        name = f"g{number}"
        groups.append(group(name, size, kind=kind, width=width, original=original))
        values = draw(st.lists(st.integers(-4, 4), min_size=size * width, max_size=size * width))
        scores[name] = torch.tensor(values, dtype=torch.float32)
    ignore = draw(st.sets(st.sampled_from([g.name for g in groups]), max_size=2))
    return (
        ChannelGraph(groups),
        scores,
        sorted(ignore),
        draw(st.floats(0, 1)),
        draw(st.sampled_from([0, 0.05, 0.2, 0.5])),
    )


def slow_reference(graph, scores, fraction, min_kept, ignore):
    """`select_units` as plain loops over units."""
    units = []
    for g in graph.groups:
        for u in range(g.size):
            units.append((float(scores[g.name][g.layers[0].index[u].tolist()].mean()), g, u))
    protected = set()
    for g in graph.groups:
        floor = math.ceil(min_kept * g.original_size - 1e-9)
        floor = max(floor, 1) if g.kind == "remove" else floor
        ascending = sorted((unit for unit in units if unit[1] is g), key=lambda unit: unit[0])
        best = ascending[-floor:] if floor else []
        protected |= {(g.name, u) for _, _, u in (ascending if g.name in ignore else best)}
    budget = math.floor(fraction * graph.num_filters + 1e-9)
    removed = set()
    for _, g, u in sorted(units, key=lambda unit: unit[0]):
        if (g.name, u) in protected:
            continue
        if budget < g.filters:
            break
        budget -= g.filters
        removed.add((g.name, u))
    return removed, protected


@settings(max_examples=300, deadline=None)
@given(problems())
@pytest.mark.filterwarnings("ignore:Asked to remove")
def test_plans_equal_the_plain_loop(problem):
    graph, scores, ignore, fraction, min_kept = problem
    plan = select_units(graph, scores, fraction, min_kept=min_kept, ignore=ignore)
    removed = {(name, unit) for name, units in removed_units(plan).items() for unit in units}
    expected, protected = slow_reference(graph, scores, fraction, min_kept, ignore)
    assert removed == expected
    assert not removed & protected
    # The count is at or below the target, and the next unit would exceed it.
    total = graph.num_filters
    weights = {g.name: g.filters for g in graph.groups}
    num_removed = sum(weights[name] for name, _ in removed)
    wanted = math.floor(fraction * total + 1e-9)
    assert num_removed <= wanted
    assert plan.reached == num_removed / total
    free = {(g.name, u) for g in graph.groups for u in range(g.size)} - protected - removed
    if free:
        assert wanted - num_removed < max(weights.values())
        means = {
            (g.name, u): scores[g.name][g.layers[0].index[u].tolist()].mean().item()
            for g in graph.groups
            for u in range(g.size)
        }
        assert max((means[unit] for unit in removed), default=-math.inf) <= min(means[unit] for unit in free)


@settings(max_examples=100, deadline=None)
@given(problems(), st.floats(0, 1), st.sampled_from(["global", "layer"]))
@pytest.mark.filterwarnings("ignore:Asked to remove")
def test_a_larger_fraction_removes_a_superset(problem, other, scope):
    graph, scores, ignore, fraction, min_kept = problem
    less, more = sorted((fraction, other))
    small = select_units(graph, scores, less, min_kept=min_kept, ignore=ignore, scope=scope)
    large = select_units(graph, scores, more, min_kept=min_kept, ignore=ignore, scope=scope)
    assert all((small[name] | ~large[name]).all() for name in small)
    again = select_units(graph, scores, less, min_kept=min_kept, ignore=ignore, scope=scope)
    assert all(torch.equal(small[name], again[name]) for name in small)


def two_convs():
    """Conv a (3 -> 8, 3x3, 16 positions), norm, conv b (8 -> 6, 1x1, 4 positions), flattened, linear (6*4 -> 5)."""
    eye = np.arange(8)[:, None]
    flat = np.arange(24).reshape(6, 4)
    a = group("a", 8, slices=[Slice(n, 0, eye) for n in ("a.weight", "n.weight", "n.bias", "n.running_mean")])
    a = a.with_parts(slices=(*a.slices, Slice("b.weight", 1, eye), Slice("b.weight", 1, eye)))
    b = group("b", 6, slices=[Slice("b.weight", 0, np.arange(6)[:, None]), Slice("c.weight", 1, flat)])
    return ChannelGraph(
        [a, b],
        shapes={
            "a.weight": (8, 3, 3, 3),
            "n.weight": (8,),
            "n.bias": (8,),
            "n.running_mean": (8,),
            "b.weight": (6, 8, 1, 1),
            "c.weight": (5, 24),
            "c.bias": (5,),
        },
        uses={"a.weight": 16, "b.weight": 4, "c.weight": 1},
        buffers=frozenset({"n.running_mean"}),
    )


def test_cost_after_a_plan_is_the_cost_of_the_smaller_tensors():
    graph = two_convs()
    assert cost_after(graph) == (216 + 16 + 48 + 125, 16 * 216 + 4 * 48 + 120)
    keep_a, keep_b = torch.arange(8) < 5, torch.arange(6) >= 2
    expected = (5 * 27 + 10 + 4 * 5 + 5 * 16 + 5, 16 * 5 * 27 + 4 * 20 + 80)
    assert cost_after(graph, KeepPlan({"a": keep_a, "b": keep_b})) == expected
    assert cost_after(graph, {"a": keep_a})[0] == 5 * 27 + 10 + 30 + 125
    with pytest.raises(ValueError, match=r"'a' has shape \(3,\), the graph has 8 units"):
        cost_after(graph, {"a": torch.ones(3, dtype=torch.bool)})
    with pytest.raises(ValueError, match="no such group"):
        cost_after(graph, {"z": torch.ones(3, dtype=torch.bool)})


@pytest.mark.parametrize("target", ["parameters", "macs"])
@pytest.mark.parametrize("fraction", [0.0, 0.2, 0.5, 0.7])
def test_cost_targets_remove_the_largest_number_of_units_that_fits(target, fraction):
    graph, which = two_convs(), {"parameters": 0, "macs": 1}[target]
    scores = Scores({"a": torch.rand(8, generator=torch.Generator().manual_seed(3)), "b": torch.linspace(0.1, 0.9, 6)})
    plan = select_units(graph, scores, fraction, target=target)
    before, after = cost_after(graph)[which], cost_after(graph, plan)[which]
    assert before - after <= fraction * before
    assert plan.reached == pytest.approx(1 - after / before)
    assert plan.asked == fraction
    # One more filter exceeds the target.
    one_more = select_units(graph, scores, num_filters=plan.num_removed + 1)
    assert one_more.num_removed == plan.num_removed + 1
    assert before - cost_after(graph, one_more)[which] > fraction * before
    assert all((plan[name] | ~one_more[name]).all() for name in plan)


def test_a_cost_out_of_reach_is_a_warning():
    with pytest.warns(UserWarning, match="of 3,768 macs, but only"):
        select_units(two_convs(), {"a": torch.rand(8), "b": torch.rand(6)}, 1.0, target="macs")
