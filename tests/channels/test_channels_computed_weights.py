"""Weights that are normalized: an input channel that goes changes the norm, even if the channel is zero anyway."""

import copy

import pytest
import torch
from masked_networks import random_plan, randomize_parameters
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from gflow_pl import KeepPlan, rewrite, trace_channels


class DecomposedAdapter(nn.Linear):
    """A linear layer with a low-rank addition, whose direction and length are separate parameters (DoRA)."""

    def __init__(self, num_inputs, num_filters) -> None:
        super().__init__(num_inputs, num_filters)
        self.down, self.up = nn.Parameter(torch.randn(2, num_inputs)), nn.Parameter(torch.randn(num_filters, 2))
        self.length = nn.Parameter(torch.rand(num_filters) + 0.5)

    def forward(self, x):
        weight = self.weight + self.up @ self.down
        return F.linear(x, self.length[:, None] * weight / weight.norm(dim=1, keepdim=True), self.bias)


class Demodulated(nn.Module):
    """A layer whose weight is scaled by a style of every example, and then normalized (StyleGAN2)."""

    def __init__(self, num_inputs, num_filters) -> None:
        super().__init__()
        self.weight, self.style = nn.Parameter(torch.randn(num_filters, num_inputs)), nn.Linear(num_inputs, num_inputs)

    def forward(self, x):
        weight = self.weight[None] * (1 + self.style(x))[:, None, :]
        weight = weight * torch.rsqrt((weight * weight).sum(2, keepdim=True) + 1e-8)
        return (weight @ x[:, :, None]).squeeze(2)


class Cosine(nn.Linear):
    """A linear layer of directions."""

    def forward(self, x):
        return F.linear(x, F.normalize(self.weight, dim=1), self.bias)


LAYERS = {
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(8, 6)),
    "weight norm of the whole": lambda: parametrizations.weight_norm(nn.Linear(8, 6), dim=None),
    "old weight norm": lambda: nn.utils.weight_norm(nn.Linear(8, 6)),
    "old weight norm of the whole": lambda: nn.utils.weight_norm(nn.Linear(8, 6), dim=None),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(8, 6)),
    "adapter": lambda: DecomposedAdapter(8, 6),
    "demodulated": lambda: Demodulated(8, 6),
    "cosine": lambda: Cosine(8, 6),
}


def network(layer):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), layer(), nn.ReLU(), nn.Linear(6, 2)).double().eval()
    randomize_parameters(model)
    return model.requires_grad_(False)


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_input_channels_of_normalized_weights_are_inexact(layer):
    model, x = network(layer), torch.randn(3, 5).double()
    graph = trace_channels(model, x)
    assert graph.group("0").inexact == "a norm of a computed weight over the pruned dim"
    assert "0" in trace_channels(model, x, exact_only=True).frozen

    # They can go nevertheless.
    rewrite(model, graph, random_plan(graph))
    assert model(x).isfinite().all()
    assert model[0].out_features == 4


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_dead_channels_go_without_a_change_if_only_exact_units_go(layer):
    model, x = network(layer), torch.randn(3, 5).double()
    with torch.no_grad():
        model[0].weight[:4] = model[0].bias[:4] = 0
    graph = trace_channels(model, x, exact_only=True)
    keep = {group.name: torch.ones(group.size, dtype=torch.bool) for group in graph.groups}
    for name in keep.keys() & {"0"}:
        keep[name][:4] = False
    before = model(x)
    rewrite(model, graph, KeepPlan(keep))
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-12)


def test_filters_of_a_weight_norm_stay_exact():
    model, x = network(LAYERS["weight norm"]), torch.randn(3, 5).double()
    graph = trace_channels(model, x)
    assert graph.group("2").inexact is None

    # Reference: the next layer reads zeros instead of the removed filters.
    stays = torch.tensor([True, False, True, True, False, True])
    masked = copy.deepcopy(model)
    masked[4].weight[:, ~stays] = 0
    rewrite(model, graph, KeepPlan({"0": torch.ones(8, dtype=torch.bool), "2": stays}))
    torch.testing.assert_close(model(x), masked(x), rtol=0, atol=1e-12)
