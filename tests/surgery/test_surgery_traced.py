"""Surgery on real architectures, with graphs from the tracer."""

import copy
import io

import pytest
import torch
import torchvision
from hand_graphs import assert_equal_states, random_plan, randomise
from masked_networks import masked_network
from torch import nn

from gflow_pl import models
from gflow_pl.channels import trace_channels
from gflow_pl.surgery import apply_structure, rewrite, structure_of
from gflow_pl.values import KeepPlan, Structure

NETWORKS = {
    "vgg13": models.vgg13,
    "resnet56": models.resnet56,
    "mobilenet_v1": models.mobilenet_v1,
    "mobilenet_v3": lambda: torchvision.models.mobilenet_v3_small(weights=None),
    "shufflenet": lambda: torchvision.models.shufflenet_v2_x0_5(weights=None),
    "regnet": lambda: torchvision.models.regnet_y_400mf(weights=None),
}
EXAMPLE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def build(name):
    torch.manual_seed(0)
    model = randomise(NETWORKS[name]().double()).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                # Keeps activations near one at any depth, so that no part of the output is negligible.
                module.weight.div_(module.weight[0].numel() ** 0.5)
    return model


def difference(a, b):
    return float(((a - b).abs().max() / b.abs().max()).detach())


CASES = [(name, "expand") for name in NETWORKS] + [("resnet56", "remove"), ("mobilenet_v3", "remove")]


@pytest.mark.parametrize(("name", "residual"), CASES)
def test_rounds_equal_the_masked_network_and_one_rewrite_and_reload(name, residual):
    model, once = build(name), build(name)
    unpruned = model(EXAMPLE)
    graph = trace_channels(model, EXAMPLE, residual=residual)
    whole = graph.copy()
    for k in range(3):
        plan = random_plan(graph, k, share=0.25)
        masked = masked_network(model, graph, plan)
        rewrite(model, graph, plan)
        assert difference(model(EXAMPLE), masked(EXAMPLE)) < 1e-12
    assert difference(model(EXAMPLE), unpruned) > 1e-3
    product = {g.name: torch.isin(torch.arange(g.original_size), torch.tensor(g.kept)) for g in graph.groups}
    structure = rewrite(once, whole, KeepPlan(product))
    assert_equal_states(model.state_dict(), once.state_dict())
    assert structure_of(model) == structure
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    shapes = {n: tuple(t.shape) for n, t in tensors.items() if "_gflow" not in n}
    assert graph.shapes == whole.shapes == shapes
    file = io.BytesIO()
    torch.save([structure.as_dict(), model.state_dict()], file)
    file.seek(0)
    plain, state = torch.load(file, weights_only=True)
    fresh = build(name)
    apply_structure(fresh, Structure.from_dict(plain))
    fresh.load_state_dict(state)
    assert torch.equal(fresh(EXAMPLE), model(EXAMPLE))


@pytest.mark.parametrize("name", ["resnet56", "mobilenet_v3", "regnet"])
def test_emptied_branches_equal_the_masked_network_and_train(name):
    model = build(name)
    graph = trace_channels(model, EXAMPLE)
    branches = [g for g in graph.groups if g.kind == "expand"][2::2]
    plan = {g.name: torch.ones(g.size, dtype=torch.bool) for g in graph.groups}
    plan |= {g.name: torch.zeros(g.size, dtype=torch.bool) for g in branches}
    masked = masked_network(model, graph, plan)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)
    structure = rewrite(model, graph, plan, optimizers=[optimizer])
    assert difference(model(EXAMPLE), masked(EXAMPLE)) < 1e-12
    empty = [n for n, p in model.named_parameters() if p.numel() == 0]
    # At least the last conv of the branch and its norm, and mostly the layers before them.
    assert len(empty) >= 3 * len(branches)
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters())) - len(empty)
    fresh = build(name)
    apply_structure(fresh, structure.as_dict())
    fresh.load_state_dict(copy.deepcopy(model.state_dict()))
    assert torch.equal(fresh(EXAMPLE), model(EXAMPLE))
    model.train()(EXAMPLE).square().mean().backward()
    optimizer.step()
    # The next plan is for the units that are left.
    plan = random_plan(graph, 1)
    masked = masked_network(model.eval(), graph, plan)
    rewrite(model, graph, plan, optimizers=[optimizer])
    assert difference(model(EXAMPLE), masked(EXAMPLE)) < 1e-12


def test_squeeze_and_excitation_is_emptied_with_its_branch():
    model = build("mobilenet_v3")
    graph = trace_channels(model, EXAMPLE)
    last = [g for g in graph.groups if g.kind == "expand"][-1]
    block = last.name.rpartition(".block.")[0]
    rewrite(model, graph, {last.name: torch.zeros(last.size, dtype=torch.bool)})
    assert all(p.numel() == 0 for p in model.get_submodule(block).parameters())
    assert sum(p.numel() == 0 for n, p in model.named_parameters() if not n.startswith(block)) == 0


class Joined(nn.Module):
    """A branch that reads two concatenated layers through one norm; another branch reads one of them too."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1), nn.Conv2d(6, 5, 1)
        self.norm, self.both, self.alone = nn.BatchNorm2d(9), nn.Conv2d(9, 6, 1), nn.Conv2d(5, 6, 1)

    def forward(self, x):
        x = self.stem(x)
        b = self.b(x)
        return (x + self.both(self.norm(torch.cat([self.a(x), b], 1))) + self.alone(b)).mean((1, 2, 3))


def test_a_norm_with_channels_that_another_layer_reads_is_not_emptied():
    torch.manual_seed(0)
    model = randomise(Joined().double()).eval()
    graph = trace_channels(model, EXAMPLE)
    plan = {group.name: torch.ones(group.size, dtype=torch.bool) for group in graph.groups}
    for names, empty in ((["both"], {"both.weight", "both.bias"}), (["alone"], set(dict(model.named_parameters())))):
        plan |= {name: torch.zeros(6, dtype=torch.bool) for name in names}
        masked = masked_network(model, graph, plan)
        rewrite(model, graph, plan)
        assert difference(model(EXAMPLE), masked(EXAMPLE)) < 1e-12
        assert {n for n, p in model.named_parameters() if p.numel() == 0} == empty - {"stem.weight", "stem.bias"}
        plan = {group.name: torch.ones(group.size, dtype=torch.bool) for group in graph.groups}
        model(EXAMPLE).sum().backward()
