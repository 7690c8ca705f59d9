import copy
import pickle

import pytest
import torch
from hand_graphs import assert_equal_states, build, column, example, group, make_graph, norm_slices
from masked_networks import masked_network
from torch import nn

from gflow_pl.surgery import apply_structure, drop_empty_parameters, rewrite, structure_of
from gflow_pl.surgery.emptied import has_replaced_forward, update_emptiness
from gflow_pl.values import Expansion, Slice, Structure

NOTHING = torch.zeros(6, dtype=torch.bool)


def two_groups(model):
    return [
        {"params": list(model.conv1.parameters())},
        {"params": [p for name, p in model.named_parameters() if not name.startswith("conv1")]},
    ]


def emptied(dtype=torch.float64, optimizers=lambda model: ()):
    model = build("residual", dtype=dtype)
    graph = model.graph()
    structure = rewrite(model, graph, {"conv2": NOTHING}, optimizers=optimizers(model))
    return model, graph, structure


def no_branch(model):
    """Output of the network without its block."""
    x = example(model)
    stem = torch.relu(model.bn0(model.stem(x)))
    return model.head(torch.relu(stem).mean((2, 3)))


def test_an_emptied_branch_computes_nothing_and_changes_nothing_else():
    unpruned = build("residual")
    whole = {g.name: torch.ones(g.size).bool() for g in unpruned.graph().groups}
    masked = masked_network(unpruned, unpruned.graph(), {**whole, "conv2": NOTHING})
    model, graph, structure = emptied()
    assert (model(example(model)) - masked(example(model))).abs().max() < 1e-14
    assert torch.equal(model(example(model)), no_branch(model))
    # Only conv2 reads conv1.
    names = ["conv1.weight", "bn1.weight", "bn1.bias", "conv2.weight", "bn2.weight", "bn2.bias"]
    assert [n for n, p in model.named_parameters() if p.numel() == 0] == names
    assert all(p.requires_grad == (n not in names) for n, p in model.named_parameters())
    assert [g.size for g in graph.groups] == [6, 0, 0]
    assert (graph.layers["conv1"].num_filters, graph.layers["conv2"].num_filters) == (0, 0)
    assert structure.expansions["bn2"]["index"] == []


def test_no_operator_of_the_branch_runs():
    from torch.utils.flop_counter import FlopCounterMode

    model, _, _ = emptied()
    with FlopCounterMode(display=False) as counter:
        model(example(model))
    convs = sum(n for operator, n in counter.get_flop_counts()["Global"].items() if "conv" in str(operator))
    assert convs == 2 * 4 * 6 * 3 * 9 * 36


def test_training_continues_and_empty_parameters_leave_the_optimizer():
    made = []

    def optimizers(model):
        model.train()
        made.append(torch.optim.Adam(two_groups(model)))
        model(example(model)).square().mean().backward()
        made[0].step()
        return made

    model, _, _ = emptied(torch.float32, optimizers)
    optimizer = made[0]
    assert [len(g["params"]) for g in optimizer.param_groups] == [0, 5]
    assert all(p.numel() for p in optimizer.state)
    assert len(optimizer.state) == 5
    before = model.head.weight.clone()
    model.train()(example(model)).square().mean().backward()
    optimizer.step()
    assert not torch.equal(before, model.head.weight)
    assert model.conv2.weight.grad is None
    # A new optimizer of the emptied network loads the saved state.
    fresh = torch.optim.Adam(two_groups(model))
    drop_empty_parameters([fresh])
    fresh.load_state_dict(optimizer.state_dict())


def test_another_round_follows():
    model, graph, _ = emptied()
    keep = torch.tensor([1, 0, 1, 1, 0, 1]).bool()
    masked = masked_network(model, graph, {"stem": keep, "conv1": torch.ones(0).bool(), "conv2": torch.ones(0).bool()})
    structure = rewrite(model, graph, {"stem": keep, "conv1": torch.ones(0).bool()})
    assert (model(example(model)) - masked(example(model))).abs().max() < 1e-14
    assert list(structure.expansions) == ["bn0", "bn2"]


def test_a_new_network_takes_the_emptied_shape_and_the_full_one_again():
    model, _, structure = emptied()
    fresh = build("residual", seed=5)
    apply_structure(fresh, Structure.from_dict(pickle.loads(pickle.dumps(structure.as_dict()))))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(example(model)), model(example(model)))
    assert [p.requires_grad for p in fresh.parameters()] == [p.requires_grad for p in model.parameters()]
    assert structure_of(fresh) == structure
    unpruned = build("residual")
    for network in (model, fresh):
        apply_structure(network, structure_of(unpruned))
        network.load_state_dict(unpruned.state_dict())
        assert torch.equal(network(example(network)), unpruned(example(network)))
        assert all(p.requires_grad for p in network.parameters())
        assert not any("forward" in vars(m) for m in network.modules())


def test_copies_pickles_averages_compilation_and_export():
    model, _, structure = emptied(torch.float32)
    x = example(model)
    expected = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), expected)
        assert structure_of(other) == structure
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    average.update_parameters(model)
    assert torch.allclose(average(x), expected)
    assert torch.allclose(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected, atol=1e-6)
    assert torch.allclose(torch.export.export(model, (x,)).module()(x), expected, atol=1e-6)


def test_a_second_application_changes_nothing():
    model, _, structure = emptied()
    before = copy.deepcopy(model.state_dict())
    apply_structure(model, structure)
    assert_equal_states(model.state_dict(), before)
    assert structure_of(model) == structure
    assert [p.requires_grad for p in model.parameters()].count(False) == 6


LAYERS = {
    "conv": (nn.Conv2d(3, 4, 3, stride=2, padding=1), (2, 3, 7, 8)),
    "dilated": (nn.Conv2d(3, 4, (3, 2), dilation=(2, 3), padding=(0, 2)), (2, 3, 9, 8)),
    "same": (nn.Conv2d(3, 4, 4, padding="same"), (2, 3, 7, 8)),
    "valid": (nn.Conv2d(3, 4, 4, padding="valid", stride=3), (2, 3, 17, 18)),
    "1d": (nn.Conv1d(3, 4, 5, stride=3, padding=2), (2, 3, 20)),
    "3d": (nn.Conv3d(3, 4, 3), (2, 3, 5, 6, 7)),
    "unbatched": (nn.Conv2d(3, 4, 3), (3, 7, 8)),
    "transposed": (nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, output_padding=1), (2, 3, 5, 6)),
    "transposed_dilated": (nn.ConvTranspose1d(3, 4, 4, stride=3, dilation=2), (2, 3, 5)),
    "linear": (nn.Linear(3, 4), (2, 5, 3)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_replaced_forward_returns_the_shape_of_the_layer_with_one_channel(name):
    module, shape = LAYERS[name]
    x = torch.randn(shape)
    expected = list(module(x).shape)
    dim = {"linear": -1, "unbatched": 0}.get(name, 1)
    expected[dim] = 1
    emptied_layer = copy.deepcopy(module)
    leaf = "out_features" if name == "linear" else "out_channels"
    setattr(emptied_layer, leaf, 0)
    update_emptiness(emptied_layer)
    assert has_replaced_forward(emptied_layer)
    assert list(emptied_layer(x).shape) == expected
    assert emptied_layer(x).count_nonzero() == 0


@pytest.mark.parametrize("name", ["conv", "linear", "transposed"])
def test_the_replaced_forward_accepts_the_keywords_of_the_layer(name):
    module, shape = LAYERS[name]
    x = torch.randn(shape)
    more = {"output_size": (9, 12)} if name == "transposed" else {}
    expected = list(module(input=x, **more).shape)
    expected[-1 if name == "linear" else 1] = 1
    emptied_layer = copy.deepcopy(module)
    setattr(emptied_layer, "out_features" if name == "linear" else "out_channels", 0)
    update_emptiness(emptied_layer)
    assert list(emptied_layer(input=x, **more).shape) == expected


def test_the_replaced_forward_returns_the_dtype_of_the_layer_under_autocast():
    conv = nn.Conv2d(3, 4, 1)
    conv.out_channels = 0
    update_emptiness(conv)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert conv(torch.randn(1, 3, 2, 2)).dtype == torch.bfloat16


class Pooled(nn.Module):
    """A branch with max pooling and resizing, whose first layer is read by two layers."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.a = nn.Conv2d(4, 5, 3, padding=1)
        self.bn = nn.BatchNorm2d(5)
        self.b = nn.Conv2d(5, 4, 1)
        self.side = nn.Conv2d(5, 4, 1)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x):
        x = self.stem(x)
        y = self.middle(x)
        return self.head(x + self.b(y) + self.side(y))

    def middle(self, x):
        return nn.functional.interpolate(nn.functional.max_pool2d(self.bn(self.a(x)), 2), scale_factor=2)

    def graph(self):
        five, four = column(range(5)), column(range(4))
        readers = [Slice("b.weight", 1, five), Slice("side.weight", 1, five)]
        groups = [
            group("a", 5, [Slice("a.weight", 0, five), Slice("a.bias", 0, five), *norm_slices("bn", five), *readers])
        ]
        for name in ("b", "side"):
            slices = [Slice(f"{name}.weight", 0, four), Slice(f"{name}.bias", 0, four)]
            groups.append(group(name, 4, slices, kind="expand", expansion=Expansion(name, 1, 4)))
        return make_graph(self, groups, outputs=("head",))


def test_a_layer_with_two_readers_stays_until_both_are_emptied():
    torch.manual_seed(0)
    model = Pooled().double().eval()
    graph, x = model.graph(), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    none = torch.zeros(4, dtype=torch.bool)
    expected = model.head(model.stem(x) + model.side(model.middle(model.stem(x))))
    rewrite(model, graph, {"b": none})
    assert model.a.weight.shape[0] == 5
    assert torch.equal(model(x), expected)
    rewrite(model, graph, {"side": none})
    assert model.a.weight.shape[0] == 0
    assert torch.equal(model(x), model.head(model.stem(x)))


def test_a_layer_that_was_built_without_outputs_stays_as_it_is():
    model = build("residual", dtype=torch.float32)
    model.nothing = nn.Linear(6, 0)
    graph = model.graph()
    structure = rewrite(model, graph, {"stem": torch.tensor([1, 0, 1, 1, 1, 1]).bool()})
    apply_structure(model, structure)
    assert model.nothing(torch.ones(2, 6)).shape == (2, 0)
    assert model.nothing.weight.requires_grad
