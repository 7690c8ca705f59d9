"""A structure comes from a file: whatever it contains, it is refused in one sentence or describes the same network."""

import copy

import pytest
import torch
from masked_networks import random_plan
from torch import nn

from gflow_pl import rewrite, trace_channels
from gflow_pl.common.errors import SettingsError
from gflow_pl.surgery import apply_structure, load_pruned, save_pruned, structure_of


def network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=2)]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    net.heads, net.sizes, net.rate = 4, [4, 4], 0.5
    net.register_buffer("table", torch.arange(6), persistent=False)
    return net.eval()


def entries(kind, name, **values):
    return lambda data: data[kind].setdefault(name, {}).update(values)


def shape(name, value):
    return lambda data: data["shapes"].update({name: value})


PLACES = {"dim": 1, "width": 16, "index": list(range(8))}
HOSTILE = {
    "giant width": shape("0.weight", [10**6, 3, 300, 300]),
    "2**62 filters": shape("0.weight", [2**62, 3, 3, 3]),
    "2**70 filters": shape("0.weight", [2**70, 3, 3, 3]),
    "8 GB": shape("0.weight", [2**31 // 27, 3, 3, 3]),
    "a negative size": shape("0.weight", [-1, 3, 3, 3]),
    "a size that is a bool": shape("0.weight", [True, 3, 3, 3]),
    "a size that is a float": shape("0.weight", [8.0, 3, 3, 3]),
    "a shape that is a string": shape("0.weight", "abcd"),
    "a shape that is None": shape("0.weight", None),
    "another number of dims": shape("0.weight", [8, 3]),
    "a tensor to nowhere": shape("9.weight", [8, 3]),
    "shapes that contradict the attributes": shape("0.weight", [5, 3, 3, 3]),
    **{f"{kind} is {value}": lambda data, k=kind, v=value: data.update({k: v})
       for kind in ("shapes", "attributes", "expansions", "gathers") for value in (None, [1, 2], "abc", 3)},
    "attributes that are a list": lambda data: data["attributes"].update({"0": [1, 2]}),
    "an attribute that is named by a number": lambda data: data["attributes"].update({"0": {3: 4}}),
    "attributes of a tensor": entries("attributes", "0.weight", x=1),
    "attributes to nowhere": entries("attributes", "..", x=1),
    **{f"attribute {name} of '{module}'": entries("attributes", module, **{name: value}) for module, name, value in [
        ("0", "__class__", "x"), ("0", "__dict__", {}), ("0", "forward", 1), ("0", "_parameters", {}),
        ("", "_modules", {}), ("0", "_forward_hooks", {}), ("0", "weight", [[1.0]]), ("0", "unknown", 1),
        ("1", "training", True), ("1", "running_mean", [0.5] * 8), ("1", "eps", 1e9), ("1", "momentum", 77.0),
        ("0", "stride", [2, 2]), ("0", "padding", [10**5, 10**5]), ("0", "padding_mode", "reflect"),
        ("0", "in_channels", "three"), ("0", "out_channels", 99), ("", "state_dict", 3), ("", "zero_grad", 3),
        ("", "call_super_init", True), ("", "heads", 5), ("", "heads", -1), ("", "heads", True), ("", "heads", "4"),
        ("", "sizes", [4, 5]), ("", "sizes", [4]), ("", "sizes", 4), ("", "rate", 0.1), ("", "rate", 0),
        ("", "table", "abc"), ("", "table", [[0]]), ("", "table", [0.5]), ("", "training", 0),
    ]},
    "an expansion of a container": entries("expansions", "", dim=1, width=20, index=list(range(10))),
    "an expansion of an activation": entries("expansions", "2", dim=1, width=9, index=list(range(8))),
    "an expansion of too few channels": entries("expansions", "0", dim=1, width=8, index=[1, 5]),
    "an expansion of another dim": entries("expansions", "0", **{**PLACES, "dim": 77}),
    "an expansion of no dim": entries("expansions", "0", **{**PLACES, "dim": True}),
    "an expansion without positions": entries("expansions", "0", dim=1, width=8),
    "an expansion of bools": entries("expansions", "0", dim=1, width=9, index=[True, False]),
    "an expansion outside": entries("expansions", "0", dim=1, width=8, index=[0, 1, 2, 3, 4, 5, 6, 99]),
    "an expansion to one place twice": entries("expansions", "0", dim=1, width=9, index=[0, 0, 1, 2, 3, 4, 5, 6]),
    "an expansion that is a list": lambda data: data["expansions"].update({"0": [1]}),
    "an expansion to nowhere": entries("expansions", "9", **PLACES),
    "a gather of a negative dim": entries("gathers", "3", **{**PLACES, "dim": -99}),
    "version 2": lambda data: data.update(version=2),
    "version True": lambda data: data.update(version=True),
    "no version": lambda data: data.pop("version"),
    "no shapes": lambda data: data.pop("shapes"),
}  # fmt: skip


def contents(module):
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    values = {name: {k: copy.copy(v) for k, v in vars(m).items() if k[0] != "_"} for name, m in module.named_modules()}
    return state, values, module.table.tolist()


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_structure_is_one_sentence_and_changes_nothing(kind):
    net = network()
    data = structure_of(net).as_dict()
    HOSTILE[kind](data)
    before = contents(net)
    with pytest.raises(SettingsError) as error:
        apply_structure(net, data)
    assert "\n" not in str(error.value)
    after = contents(net)
    assert after[0].keys() == before[0].keys()
    assert all(torch.equal(after[0][name], tensor) for name, tensor in before[0].items())
    assert after[1:] == before[1:]


@pytest.mark.parametrize("data", [[1], None, "abc", {}, 3], ids=str)
def test_what_is_no_structure_is_one_sentence(data):
    with pytest.raises(SettingsError, match="Structure"):
        apply_structure(network(), data)


def test_sizes_may_shrink_and_return():
    net = network()
    data = structure_of(net).as_dict()
    entries("attributes", "", heads=3, sizes=[2, 4], table=[0, 2])(data)
    apply_structure(net, data)
    assert (net.heads, net.sizes, net.table.tolist()) == (3, [2, 4], [0, 2])
    apply_structure(net, structure_of(network()))
    assert (net.heads, net.sizes, net.table.tolist()) == (4, [4, 4], list(range(6)))


def test_a_file_whose_structure_is_not_that_of_its_tensors_is_refused_before_memory_is_taken(tmp_path):
    net = network()
    save_pruned(net, tmp_path / "x.pt")
    data = torch.load(tmp_path / "x.pt", weights_only=True)
    structure = data["gflow_pl"]["structure"]
    structure["shapes"].update({"0.weight": [2**40, 3, 3, 3], "0.bias": [2**40]})
    structure["attributes"]["0"]["out_channels"] = 2**40  # consistent, but not with the tensors
    torch.save(data, tmp_path / "x.pt")
    with pytest.raises(SettingsError, match=r"its tensor '0\.\w+' has shape .*, its structure says \(1099511627776,"):
        load_pruned(net, tmp_path / "x.pt")


def test_the_structure_of_a_grouped_convolution_with_a_computed_weight_is_accepted():
    def build():
        torch.manual_seed(0)
        layer = nn.utils.parametrizations.weight_norm(nn.Conv1d(32, 32, 8, padding=4, groups=2), dim=2)
        return nn.Sequential(nn.Conv1d(3, 32, 1), layer, nn.GELU(), nn.Conv1d(32, 2, 1)).double().eval()

    net, x = build(), torch.randn(2, 3, 16, dtype=torch.float64)
    graph = trace_channels(net, x, frozen="expand")
    assert any(part.layer == "1" for group in graph.groups for part in group.layers)
    rewrite(net, graph, random_plan(graph))
    fresh = build()
    apply_structure(fresh, structure_of(net).as_dict())
    fresh.load_state_dict(net.state_dict())
    assert torch.equal(fresh(x), net(x))
    assert fresh[1].in_channels == fresh[1].groups * fresh[1].weight.shape[1]
