import copy
import gc
import weakref

import numpy as np
import pytest
import torch
from hand_graphs import (
    NETWORKS,
    Plain,
    assert_equal_states,
    build,
    example,
    group,
    make_graph,
    random_plan,
)
from masked_networks import masked_network
from torch import nn

from gflow_pl.surgery import rewrite, structure_of
from gflow_pl.surgery.expansion import scatter_output
from gflow_pl.surgery.tensor_table import Cut, cut_tensor
from gflow_pl.values import KeepPlan, LayerUnits, Slice


def relative_difference(a, b):
    return float(((a - b).abs().max() / b.abs().max()).detach())


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_rewritten_network_equals_the_masked_network(name, seed):
    model = build(name)
    graph, x = model.graph(), example(model)
    plan = random_plan(graph, seed)
    masked = masked_network(model, graph, plan)
    before = sum(p.numel() for p in model.parameters())
    rewrite(model, graph, plan)
    assert sum(p.numel() for p in model.parameters()) < before
    assert relative_difference(model(x), masked(x)) < 1e-12


@pytest.mark.parametrize("name", NETWORKS)
def test_masking_changes_the_output(name):
    model = build(name)
    plan = random_plan(model.graph(), 0)
    assert relative_difference(masked_network(model, model.graph(), plan)(example(model)), model(example(model))) > 1e-3


@pytest.mark.parametrize("name", NETWORKS)
def test_rewritten_networks_train(name):
    model = build(name, dtype=torch.float32).train()
    rewrite(model, graph := model.graph(), random_plan(graph, 1))
    model(example(model)).square().mean().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


@pytest.mark.parametrize("name", NETWORKS)
def test_five_rounds_equal_one_rewrite_by_the_product_of_the_plans(name):
    in_rounds, at_once = build(name), build(name)
    graph, whole = in_rounds.graph(), at_once.graph()
    for k in range(5):
        rewrite(in_rounds, graph, random_plan(graph, k, share=0.2))
    product = {
        g.name: torch.isin(torch.arange(g.original_size), torch.tensor(g.kept, dtype=torch.int64)) for g in graph.groups
    }
    assert any(not bits.all() for bits in product.values())
    structure = rewrite(at_once, whole, KeepPlan(product))
    assert_equal_states(in_rounds.state_dict(), at_once.state_dict())
    x = example(in_rounds)
    assert torch.equal(in_rounds(x), at_once(x))
    assert structure_of(in_rounds) == structure
    assert graph.shapes == whole.shapes
    assert graph.layers == whole.layers
    for a, b in zip(graph.groups, whole.groups, strict=True):
        assert a.kept == b.kept
        for part, other in zip((*a.slices, *a.layers), (*b.slices, *b.layers), strict=True):
            assert (part.index == other.index).all()


@pytest.mark.parametrize("name", NETWORKS)
def test_the_graph_has_the_new_shapes(name):
    model = build(name)
    graph = model.graph()
    rewrite(model, graph, random_plan(graph, 4))
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    left = {n: tuple(t.shape) for n, t in tensors.items() if not n.endswith("_gflow_index")}
    assert graph.shapes == left
    for layer in graph.layers.values():
        assert layer.num_filters == tensors[layer.weight].shape[0]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_plan_that_keeps_all_units_changes_nothing(name):
    model = build(name)
    graph, before = model.graph(), copy.deepcopy(build(name).state_dict())
    rewrite(model, graph, {g.name: torch.ones(g.size, dtype=torch.bool) for g in graph.groups})
    assert_equal_states(model.state_dict(), before)
    assert not any(m._forward_hooks for m in model.modules())


def test_attributes_follow_the_shapes():
    model = build("joined")
    graph = model.graph()
    keep = {"left": torch.tensor([1, 0, 0, 1]).bool(), "right": torch.tensor([1, 0, 1, 0, 1, 1]).bool()}
    rewrite(model, graph, keep)
    assert (model.deep.in_channels, model.deep.out_channels, model.deep.groups) == (6, 12, 6)
    assert (model.left.out_channels, model.right.out_channels, model.head.in_features) == (2, 4, 12)


class PairedGroups(nn.Module):
    """A grouped convolution that loses whole groups, or the same filters of every group."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 1)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        return self.head(self.grouped(self.first(x)))

    def graph(self, whole):
        out = np.array([[0, 1, 2, 3], [4, 5, 6, 7]]) if whole else np.array([[0, 4], [1, 5], [2, 6], [3, 7]])
        slices = [Slice("grouped.weight", 0, out), Slice("grouped.bias", 0, out), Slice("head.weight", 1, out)]
        if whole:
            slices += [Slice("first.weight", 0, out), Slice("first.bias", 0, out)]
        layers = [LayerUnits("grouped", out)]
        return make_graph(self, [group("grouped", len(out), slices, layers=layers, filters=out.shape[1])])


@pytest.mark.parametrize(("whole", "groups", "inputs"), [(True, 1, 4), (False, 2, 8)])
def test_the_number_of_groups_follows_from_the_filters_that_stay(whole, groups, inputs):
    torch.manual_seed(0)
    model = PairedGroups().double()
    graph = model.graph(whole)
    size = graph.groups[0].size
    keep = torch.arange(size) % 2 == 0
    masked = masked_network(model, graph, {"grouped": keep})
    rewrite(model, graph, {"grouped": keep})
    # In both cases four filters with four inputs each are left.
    assert tuple(model.grouped.weight.shape[:2]) == (4, 4)
    assert (model.grouped.groups, model.grouped.in_channels) == (groups, inputs)
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    assert relative_difference(model(x), masked(x)) < 1e-12


def test_parameters_stay_the_same_objects_with_their_hooks():
    model = build("plain", dtype=torch.float32)
    model.bn1.bias.requires_grad_(False)
    before = dict(model.named_parameters())
    calls = []
    model.conv1.weight.register_hook(lambda grad: calls.append("hook"))
    model.conv1.weight.register_post_accumulate_grad_hook(lambda p: calls.append("post"))
    references = {name: weakref.ref(p) for name, p in before.items()}
    rewrite(model, graph := model.graph(), random_plan(graph, 0))
    for name, parameter in model.named_parameters():
        assert parameter is before[name]
        assert references[name]() is parameter
        assert isinstance(parameter, nn.Parameter)
        assert parameter.is_leaf
        assert parameter.requires_grad == (name != "bn1.bias")
    model(example(model)).sum().backward()
    assert sorted(calls) == ["hook", "post"]


def test_a_tied_weight_stays_tied():
    model = build("tied")
    rewrite(model, model.graph(), {"inner": torch.tensor([1, 0, 1, 1, 0, 1]).bool()})
    assert model.second.weight is model.first.weight
    assert tuple(model.second.weight.shape) == (4, 4)
    assert (model.second.in_features, model.second.out_features) == (4, 4)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_the_memory_format_stays(memory_format):
    model = build("joined", dtype=torch.float32).to(memory_format=memory_format)
    strides = {
        n: torch.empty(p.shape, memory_format=memory_format).stride()
        for n, p in model.named_parameters()
        if p.ndim == 4
    }
    assert all(dict(model.named_parameters())[n].stride() == s for n, s in strides.items())
    rewrite(model, graph := model.graph(), random_plan(graph, 0))
    for parameter in model.parameters():
        if parameter.ndim == 4:
            assert parameter.stride() == torch.empty(parameter.shape, memory_format=memory_format).stride()


def test_memory_is_released():
    model = build("plain")
    rewrite(model, graph := model.graph(), random_plan(graph, 0))
    for parameter in model.parameters():
        assert parameter.untyped_storage().nbytes() == parameter.numel() * parameter.element_size()


def test_gradients_of_the_whole_model_are_dropped():
    model = build("plain").train()
    model(example(model)).sum().backward()
    rewrite(model, graph := model.graph(), {"conv1": random_plan(graph, 0)["conv1"]})
    assert all(p.grad is None for p in model.parameters())


def test_an_autograd_graph_from_before_a_rewrite_does_no_harm():
    model = build("plain", dtype=torch.float32).train()
    x = example(model)
    last_loss = model(x).square().mean()
    rewrite(model, graph := model.graph(), random_plan(graph, 0))
    model(x).square().mean().backward()
    assert all(p.grad.shape == p.shape for p in model.parameters())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        last_loss.backward()


def test_a_rewrite_under_inference_mode_leaves_a_trainable_network():
    model = build("residual", dtype=torch.float32).train()
    with torch.inference_mode():
        rewrite(model, graph := model.graph(), random_plan(graph, 0))
    assert not any(t.is_inference() for t in [*model.parameters(), *model.buffers()])
    model(example(model)).sum().backward()


def test_old_tensors_are_freed():
    model = build("plain")
    old = weakref.ref(model.bn1.running_mean)
    rewrite(model, graph := model.graph(), random_plan(graph, 0))
    gc.collect()
    assert old() is None


def test_copies_and_dicts_are_cut_like_the_model():
    model, average = build("residual"), build("residual", seed=9)
    graph = model.graph()
    initial = {name: p.detach().clone() for name, p in model.named_parameters()}
    initial["something.else"] = torch.ones(3)
    plan = random_plan(graph, 2)
    expected = copy.deepcopy(average)
    rewrite(expected, expected.graph(), plan)
    rewrite(model, graph, plan, copies=[average, initial])
    assert_equal_states(average.state_dict(), expected.state_dict())
    assert torch.equal(average(example(average)), expected(example(average)))
    for name, parameter in model.named_parameters():
        assert torch.equal(initial[name], parameter)
    assert initial["something.else"].shape == (3,)


def test_a_tied_weight_in_a_dict_under_its_second_name_is_cut():
    model = build("tied")
    initial = {name: value.clone() for name, value in model.state_dict().items()}
    rewrite(model, model.graph(), {"inner": torch.tensor([1, 0, 1, 1, 0, 1]).bool()}, copies=[initial])
    assert_equal_states(initial, model.state_dict())


@pytest.mark.parametrize(
    ("plan", "text"),
    [
        ({"conv9": [True]}, "does not have: \\['conv9'\\]. Known: conv1, conv2"),
        ({"conv1": [True] * 7}, "'conv1' must be 8 bools"),
        ({"conv1": [False] * 8}, "0 of 8 units in group 'conv1'.*keep at least one"),
        ({"conv1": [1.0] * 8}, "'conv1' must be 8 bools"),
    ],
)
def test_bad_plans_are_refused_and_nothing_changes(plan, text):
    model = build("plain")
    graph, before = model.graph(), build("plain").state_dict()
    groups = graph.groups
    with pytest.raises(ValueError, match=text):
        rewrite(model, graph, {name: torch.tensor(bits) for name, bits in plan.items()})
    assert_equal_states(model.state_dict(), before)
    assert graph.groups is groups


def test_all_or_nothing_when_the_last_part_fails():
    model, wrong = build("plain"), Plain(width=7).double()
    graph, before = model.graph(), build("plain").state_dict()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(example(model)).sum().backward()
    optimizer.step()
    before = copy.deepcopy(model.state_dict())
    groups, grads = graph.groups, [p.grad for p in model.parameters()]
    with pytest.raises(ValueError, match=r"has shape \(8, 3, 3, 3\), the network has \(7, 3, 3, 3\)"):
        rewrite(model, graph, random_plan(graph, 0), optimizers=[optimizer], copies=[wrong])
    assert_equal_states(model.state_dict(), before)
    assert graph.groups is groups
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
    assert all(s["momentum_buffer"].shape == p.shape for p, s in optimizer.state.items())
    assert model.conv1.out_channels == 8


def test_an_inconsistent_graph_is_refused_and_nothing_changes():
    model = build("plain")
    graph, before = model.graph(), build("plain").state_dict()
    first, second = graph.groups[:2]
    graph.groups[1] = second.with_parts(
        slices=(*second.slices, Slice("conv1.weight", 0, np.arange(second.size)[:, None]))
    )
    plan = {first.name: torch.arange(first.size) > 2}
    with pytest.raises(ValueError, match=f"'{second.name}' that stay hold positions that another group removes"):
        rewrite(model, graph, plan)
    assert_equal_states(model.state_dict(), before)


@pytest.mark.parametrize("dims", [(0,), (1,), (0, 1), (1, 2), (0, 1, 2)])
@pytest.mark.parametrize("shape", [(1100, 1000, 1), (11, 10, 3)])
def test_large_and_small_tensors_are_cut_in_the_same_way(shape, dims):
    tensor = torch.arange(float(np.prod(shape))).view(shape)
    kept = {dim: torch.arange(0, shape[dim], 2) for dim in dims}
    expected = tensor
    for dim, index in kept.items():
        expected = torch.stack([expected.select(dim, i) for i in index.tolist()], dim)
    assert torch.equal(cut_tensor(tensor, [Cut(dim, index) for dim, index in reversed(kept.items())]), expected)


def test_hooks_are_registered_once_in_several_rounds():
    model = build("residual")
    graph = model.graph()
    for k in range(3):
        rewrite(model, graph, random_plan(graph, k, share=0.3))
    assert [list(m._forward_hooks.values()) for m in (model.bn0, model.bn2)] == [[scatter_output]] * 2
    assert not any("_gflow" in name for name in model.state_dict())
