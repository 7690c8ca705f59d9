"""Forwards that skip modules by chance: what is skipped stays whole, whatever the state of the generators."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from masked_networks import masked_network, random_plan
from torch import nn

from gflow_pl import rewrite, trace_channels

CHANCES = {
    "python": lambda: random.random() < 0.1,
    "numpy": lambda: np.random.rand() < 0.1,
    "numpy, uniform": lambda: np.random.uniform(0, 1) > 0.9,
    "torch": lambda: torch.rand(()).item() < 0.1,
    "torch, bernoulli": lambda: bool(torch.bernoulli(torch.tensor(0.1))),
    "torch, normal": lambda: torch.randn(()).item() > 2,
}


class Drops(nn.Module):
    def __init__(self, chance):
        super().__init__()
        self.chance = chance
        self.a, self.o = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 2)
        self.blocks = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.b, self.c = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        x = self.a(x).relu()
        for block in self.blocks:
            if not (self.training and CHANCES[self.chance]()):
                x = block(x).relu()
        x = self.c(self.b(x).relu()).relu()
        return self.o(F.dropout(x, 0.1, self.training).mean((2, 3)))


@pytest.mark.parametrize("chance", CHANCES)
def test_what_is_skipped_by_chance_stays(chance):
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    net = Drops(chance).double()
    graphs = []
    for seed in range(3):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        state = random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state().tolist()
        graphs.append(trace_channels(net, x))
        assert state == (random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state().tolist())
    graph = graphs[0]
    assert all(other.frozen == graph.frozen for other in graphs)
    assert {f"blocks.{i}" for i in range(3)} | {"a"} <= set(graph.frozen)
    assert "random number" in graph.frozen["blocks.0"]
    assert {part.layer for group in graph.groups for part in group.layers} == {"b", "c"}

    # All paths work, and compute what the masked network does.
    plan = random_plan(graph)
    masked = masked_network(net, graph, plan)
    rewrite(net, graph, plan)
    for seed in range(6):
        outputs = []
        for model in (net, masked):
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            outputs.append(model.train()(x).shape)
            random.seed(seed)
            outputs.append(model.eval()(x))
        torch.testing.assert_close(outputs[1], outputs[3], rtol=0, atol=1e-12)


def test_dropout_alone_freezes_nothing():
    net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    assert list(trace_channels(net, torch.randn(2, 4)).frozen) == ["4"]
