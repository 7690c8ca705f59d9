"""Scores of weights that modules use themselves: those of equal linear layers."""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from own_weights import OwnLinear
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from gflow_pl import trace_channels
from gflow_pl.common.errors import SettingsError
from gflow_pl.importance import ActivationImportance, Tracker, measure_names, score_filters


@pytest.fixture
def batch():
    torch.manual_seed(1)
    return torch.randn(30, 6), torch.arange(30) % 3


def linear_network():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Linear(6, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 3)
    )
    nn.init.uniform_(network[1].weight, 0.5, 1.5)
    nn.init.uniform_(network[1].bias, -1, 1)
    return network


def with_own_layers(network, inputs_first):
    """Return the same network with layers that use their weights themselves."""
    network = copy.deepcopy(network)
    for place in (0, 3, 5):
        linear = network[place]
        own = OwnLinear(linear.in_features, linear.out_features, inputs_first)
        own.weight.data.copy_(linear.weight.t() if inputs_first else linear.weight)
        own.bias.data.copy_(linear.bias)
        network[place] = own
    return network


@pytest.mark.parametrize("inputs_first", [False, True])
@pytest.mark.parametrize("measure", measure_names())
def test_every_measure_scores_own_layers_like_linear_layers(measure, inputs_first, batch):
    network = linear_network()
    own = with_own_layers(network, inputs_first)
    expected = score_filters(network, measure, [batch], graph=trace_channels(network, batch[0][:2]))
    scores = score_filters(own, measure, [batch], graph=trace_channels(own, batch[0][:2]))
    assert list(scores) == list(expected) == ["0", "3", "5"]
    for name, vector in expected.items():
        torch.testing.assert_close(scores[name], vector)


@pytest.mark.parametrize("measure", ["tfo", "nvidia"])
def test_tracked_scores_of_own_layers_are_those_of_linear_layers(measure, batch):
    network = linear_network()
    results = []
    for model in (network, with_own_layers(network, True)):
        graph = trace_channels(model, batch[0][:2])
        tracker = Tracker(measure, graph=graph)
        model.eval()
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        tracker.update(model, {name: p.grad for name, p in model.named_parameters()})
        results.append(tracker.scores())
    for name, vector in results[0].items():
        torch.testing.assert_close(results[1][name], vector)


def test_the_weight_of_an_own_layer_may_be_computed(batch):
    plain = linear_network()
    computed = with_own_layers(plain, False)
    weight_norm(computed[3])
    graph = trace_channels(computed, batch[0][:2])
    assert graph.layers["3"].is_functional
    for measure in ("magnitude", "loss", "grasp"):
        expected = score_filters(with_own_layers(plain, False), measure, [batch], graph=graph)
        scores = score_filters(computed, measure, [batch], graph=graph)
        torch.testing.assert_close(scores["0"], expected["0"])
        torch.testing.assert_close(scores["3"], expected["3"])


class Inside(nn.Module):
    """A module that returns something else than the output of its layer."""

    def __init__(self):
        super().__init__()
        self.w, self.v = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(8, 3))

    def forward(self, x):
        return (x @ self.w).relu() @ self.v


class MeanActivation(ActivationImportance):
    name = "mean_activation"

    def score_activations(self, activations):
        return activations.flatten(2).mean((0, 2)) if activations.ndim > 2 else activations.mean(0)


@pytest.mark.parametrize("inputs_first", [False, True])
def test_activations_of_own_layers_are_those_of_linear_layers(inputs_first, batch):
    network = linear_network()
    own = with_own_layers(network, inputs_first)
    expected = score_filters(network, MeanActivation(), [batch], graph=trace_channels(network, batch[0][:2]))
    scores = score_filters(own, MeanActivation(), [batch], graph=trace_channels(own, batch[0][:2]))
    assert list(scores) == list(expected)
    for name, vector in expected.items():
        torch.testing.assert_close(scores[name], vector)


def test_a_layer_whose_output_no_module_returns_has_no_activations_which_is_said(batch, caplog):
    model = nn.Sequential(Inside(), nn.Linear(3, 3))
    graph = trace_channels(model, batch[0][:2])
    assert list(score_filters(model, "fisher", [batch], graph=graph)) == ["1", "0.w", "0.v"]
    with caplog.at_level(logging.WARNING):
        assert list(score_filters(model, MeanActivation(), [batch], graph=graph)) == ["1", "0.v"]
    assert "have no activations; not scored: 0.w" in caplog.text
    with pytest.raises(SettingsError, match="no module returns the output of a layer"):
        score_filters(Outside(), MeanActivation(), [batch], graph=trace_channels(Outside(), batch[0][:2]))


class Outside(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 8))

    def forward(self, x):
        return (x @ self.w).exp().sum(1)


def test_without_a_graph_only_modules_of_torch_are_scored(batch):
    assert list(score_filters(with_own_layers(linear_network(), True)[:1].append(nn.Linear(10, 3)), "magnitude")) == [
        "1"
    ]
