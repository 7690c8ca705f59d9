"""Random networks: pruned over three rounds, they equal a masked twin that is found without the graph."""

import copy

import pytest
import torch
from masked_networks import random_plan
from random_networks import KINDS, RandomNetwork, identified_twin

from gflow_pl import apply_structure, rewrite, structure_of, trace_channels

SETTINGS = {
    "expand": {"residual": "expand"},
    "remove": {"residual": "remove"},
    "frozen": {"residual": "expand", "frozen": "expand"},
    "all": {"residual": "remove", "frozen": "expand"},
}
IN_CI = 60
ALL = 330
TOLERANCE = 1e-9


def pruned(network, images, rounds, only, **settings):
    """Return a copy of a network after some rounds of random pruning."""
    small = copy.deepcopy(network)
    graph = trace_channels(small, images, **settings)
    for number in range(rounds):
        rewrite(small, graph, random_plan(graph, share=0.3, seed=number, only=only))
    return small


def check(seed, settings):
    network = RandomNetwork(seed).double().eval()
    decoys = {name: value for name, value in network.named_modules()}
    decoys = {name: {k: v for k, v in vars(m).items() if k.startswith("decoy_")} for name, m in decoys.items()}
    images = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}

    # Exact units: the outputs are those of the masked twin.
    small = pruned(network, images, 3, lambda group: group.inexact is None, **settings)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    twin = identified_twin(network, small)
    with torch.no_grad():
        expected, found = twin(images), small(images)
    scale = float(expected.abs().max().clamp_min(1e-6))
    assert float((found - expected).abs().max()) / scale <= TOLERANCE

    # Numbers that count nothing stay.
    for name, module in small.named_modules():
        for key, value in decoys[name].items():
            assert vars(module)[key] == value, (name, key)
    assert small.pick == network.pick

    # All units: the network trains, and is the same after a reload.
    small = pruned(network, images, 3, lambda group: True, **settings)
    network.train()(images).sum().backward()
    small.train()(images).sum().backward()
    trained = {name for name, parameter in network.named_parameters() if parameter.grad is not None}
    lost = [
        name for name, p in small.named_parameters() if name in trained and (p.grad is None or p.grad.shape != p.shape)
    ]
    assert not lost
    fresh = RandomNetwork(seed).double()
    apply_structure(fresh, structure_of(small).as_dict())
    fresh.load_state_dict(small.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh.eval()(images), small.eval()(images))


@pytest.mark.parametrize("seed", range(IN_CI))
def test_a_pruned_random_network_equals_its_masked_self(seed):
    for settings in SETTINGS.values():
        check(seed, settings)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(IN_CI, ALL))
def test_a_further_random_network(seed):
    for settings in SETTINGS.values():
        check(seed, settings)


def test_the_networks_contain_every_kind():
    assert len(KINDS) >= 50
    found = {step.kind for seed in range(ALL) for step in RandomNetwork(seed).steps}
    assert found == set(KINDS)
