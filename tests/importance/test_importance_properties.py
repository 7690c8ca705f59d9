"""Properties of scores on any network: permutation of filters, scaling, and norms."""

import logging

import pytest
import torch
from importance_nets import class_batches, largest_difference, mixed
from torch import nn

from gflow_pl.importance import measure_names, resolve_measure, score_filters
from gflow_pl.importance.layers import find_layers

SCORED = [name for name in measure_names() if resolve_measure(name).statistic != "noise"]


@pytest.mark.parametrize("measure", SCORED)
def test_permuted_filters_have_permuted_scores(measure):
    net, moved = mixed(), mixed()
    state = net.state_dict()
    with torch.no_grad():
        own = torch.tensor([4, 2, 0, 1, 3])
        moved.hidden.weight.copy_(state["hidden.weight"][own])
        moved.hidden.bias.copy_(state["hidden.bias"][own])
        moved.head.weight.copy_(state["head.weight"][:, own])
        pairs = torch.tensor([1, 0, 3, 2])  # the next conv has two groups: filters stay in theirs
        moved.conv1.weight.copy_(state["conv1.weight"][pairs])
        moved.conv1.bias.copy_(state["conv1.bias"][pairs])
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(moved.bn1, name).copy_(state[f"bn1.{name}"][pairs])
        moved.grouped.weight.copy_(state["grouped.weight"][:, [1, 0]])
    plain, ours = (score_filters(n, measure, class_batches()) for n in (net, moved))
    assert largest_difference(ours["conv1"], plain["conv1"][pairs]) < 1e-9
    assert largest_difference(ours["hidden"], plain["hidden"][own]) < 1e-9
    assert all(largest_difference(ours[layer], plain[layer]) < 1e-9 for layer in ("grouped", "up", "head"))


@pytest.mark.parametrize("measure", ["magnitude", "l1"])
def test_norms_are_homogeneous(measure):
    net, scaled = mixed(), mixed()
    with torch.no_grad():
        scaled.grouped.weight.mul_(3)
    plain, ours = (score_filters(n, measure) for n in (net, scaled))
    assert torch.allclose(ours["grouped"], 3 * plain["grouped"])
    assert torch.equal(ours["conv1"], plain["conv1"])


@pytest.mark.parametrize(("measure", "power"), [("loss", 0), ("tfo", 0), ("fisher", 0), ("biased_loss", 1)])
def test_a_conv_before_a_norm_can_be_rescaled(measure, power):
    """The norm removes the scale, and the gradient shrinks as the weight grows: theta g does not change."""
    net, scaled = mixed(), mixed()
    with torch.no_grad():
        for n in (net, scaled):
            n.bn2.eps = 1e-30
        scaled.grouped.weight.mul_(3)
        scaled.bn2.running_mean.mul_(3)
        scaled.bn2.running_var.mul_(9)
    plain, ours = (score_filters(n, measure, class_batches()) for n in (net, scaled))
    assert torch.allclose(ours["grouped"], plain["grouped"] * 3**power, rtol=1e-9)


LINEAR, QUADRATIC = ("loss", "tfo", "biased_loss"), ("fisher", "nvidia", "grasp", "grad_preserve")


@pytest.mark.parametrize(("measure", "power"), [*((m, 1) for m in LINEAR), *((m, 2) for m in QUADRATIC)])
def test_scores_scale_with_the_loss_as_their_formulas_do(measure, power):
    def loss(factor):
        return lambda model, batch: factor * nn.functional.cross_entropy(model(batch[0]), batch[1])

    plain, ours = (score_filters(mixed(), measure, class_batches(), loss_fn=loss(f)) for f in (1.0, 7.0))
    assert all(torch.allclose(ours[layer], plain[layer] * 7**power, rtol=1e-8, atol=0) for layer in plain)


def test_random_scores_follow_the_seed_and_nothing_else():
    torch.manual_seed(1)
    one = score_filters(mixed(0), "random", seed=4)
    torch.manual_seed(2)
    two = score_filters(mixed(1), "random", seed=4)
    other = score_filters(mixed(0), "random", seed=5)
    assert all(torch.equal(one[layer], two[layer]) for layer in one)
    assert not any(torch.equal(one[layer], other[layer]) for layer in one)
    assert all(((v >= 0) & (v < 1)).all() for v in one.values())


@pytest.mark.parametrize("measure", ["bn", "nvidia"])
def test_a_layer_without_norm_is_scored_as_if_an_identity_followed_and_that_is_logged(measure, caplog):
    """A norm of weight 1, bias 0 and unit variance in that place gives the same score."""

    class Identity(nn.BatchNorm1d):
        def __init__(self, width):
            super().__init__(width, eps=1e-30)
            self.double()

    bare, normed = mixed(), mixed()
    normed.norm = Identity(5)
    hidden = normed.hidden
    normed.hidden = nn.Sequential(hidden, normed.norm)
    del normed.norm
    with caplog.at_level(logging.INFO, logger="gflow_pl"):
        ours = score_filters(bare, measure, class_batches())
    theirs = score_filters(normed, measure, class_batches())
    assert "3 layers have no norm (up, hidden, head)" in caplog.text
    assert largest_difference(ours["hidden"], theirs["hidden.0"]) < 1e-9


def test_norms_are_paired_by_parent_order_and_width_or_by_a_graph():
    layers = {layer.name: layer.norm_name for layer in find_layers(mixed())}
    assert layers == {"conv1": "bn1", "grouped": "bn2", "up": None, "hidden": None, "head": None}

    class Fact:
        norm = "bn2"

    class Graph:
        layers = {"grouped": Fact, "conv1": type("None_", (), {"norm": None})}  # noqa: RUF012

    found = {layer.name: layer.norm_name for layer in find_layers(mixed(), Graph())}
    assert found["grouped"] == "bn2"
    assert found["conv1"] is None


def test_a_bias_is_checked_and_logged_where_it_is_ignored(caplog):
    with pytest.raises(ValueError, match=r"`bias` must be one of none, magnitude, distance_from_init, got 'l2'"):
        score_filters(mixed(), "loss", class_batches(), bias="l2")
    with pytest.raises(ValueError, match="needs `initial_state`"):
        score_filters(mixed(), "loss", class_batches(), bias="distance_from_init")
    with pytest.raises(ValueError, match=r"must hold 'conv1.weight' of shape \(4, 2, 3, 3\), got none"):
        score_filters(mixed(), "loss", class_batches(), initial_state={})
    score_filters(mixed(), "magnitude", bias="magnitude")
    assert "bias 'magnitude' is not applied" in caplog.text


def test_a_model_without_layers_is_refused():
    with pytest.raises(ValueError, match="ReLU has no conv, transposed conv or linear layer"):
        score_filters(nn.ReLU(), "magnitude")
    with pytest.raises(ValueError, match="lazy"):
        score_filters(nn.Sequential(nn.LazyLinear(3)), "magnitude")
