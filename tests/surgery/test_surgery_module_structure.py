import copy
import io
import pickle

import pytest
import torch
from hand_graphs import NETWORKS, assert_equal_states, build, example, group, make_graph, random_plan
from torch import nn

from gflow_pl.surgery import apply_structure, rewrite, structure_of
from gflow_pl.surgery.expansion import scatter_output
from gflow_pl.values import LayerUnits, SizeAttribute, SizeRule, Slice, Structure


def pruned(name, seed=0, dtype=torch.float64):
    model = build(name, dtype=dtype)
    graph = model.graph()
    structure = rewrite(model, graph, random_plan(graph, seed))
    return model, structure


@pytest.mark.parametrize("name", NETWORKS)
def test_a_new_network_loads_shape_and_weights_from_a_file(name):
    model, structure = pruned(name)
    file = io.BytesIO()
    torch.save({"structure": structure.as_dict(), "state_dict": model.state_dict()}, file)
    file.seek(0)
    contents = torch.load(file, weights_only=True)
    assert Structure.from_dict(contents["structure"]) == structure
    fresh = build(name, seed=77)
    apply_structure(fresh, contents["structure"])
    fresh.load_state_dict(contents["state_dict"])
    x = example(model)
    assert torch.equal(fresh(x), model(x))
    assert structure_of(fresh) == structure


@pytest.mark.parametrize("name", NETWORKS)
def test_structure_of_equals_the_result_of_the_rewrite(name):
    model, structure = pruned(name)
    assert structure_of(model) == structure
    wrapped = structure_of(nn.ModuleDict({"net": model}))
    assert wrapped.shapes == {f"net.{n}": s for n, s in structure.shapes.items()}
    assert wrapped.expansions == {f"net.{n}": e for n, e in structure.expansions.items()}


@pytest.mark.parametrize("name", NETWORKS)
def test_growing_back_and_shrinking_again(name):
    model, small = pruned(name)
    unpruned = build(name)
    full = structure_of(unpruned)
    state = copy.deepcopy(model.state_dict())
    identities = {n: id(p) for n, p in model.named_parameters()}
    apply_structure(model, full)
    assert structure_of(model) == full
    assert not any(m._forward_hooks for m in model.modules())
    model.load_state_dict(unpruned.state_dict())
    x = example(model)
    assert torch.equal(model(x), unpruned(x))
    apply_structure(model, small)
    model.load_state_dict(state)
    assert torch.equal(model(x), pruned(name)[0](x))
    assert {n: id(p) for n, p in model.named_parameters()} == identities


@pytest.mark.parametrize("name", NETWORKS)
def test_applying_twice_changes_nothing(name):
    model, structure = pruned(name)
    before = copy.deepcopy(model.state_dict())
    buffers = {n: (id(b), b.clone()) for n, b in model.named_buffers()}
    model(example(model)).sum().backward()
    apply_structure(model, structure)
    assert_equal_states(model.state_dict(), before)
    assert {n: id(b) for n, b in model.named_buffers()} == {n: i for n, (i, _) in buffers.items()}
    assert structure_of(model) == structure
    assert all(p.grad is not None for p in model.parameters())
    hooks = [h for m in model.modules() for h in m._forward_hooks.values()]
    assert hooks == [scatter_output] * len(structure.expansions)


def test_tensors_that_keep_their_shape_keep_their_values_and_others_are_zero():
    model, structure = build("plain"), pruned("plain")[1]
    before = copy.deepcopy(model.state_dict())
    apply_structure(model, structure)
    assert model.conv1.weight.count_nonzero() == 0
    assert torch.equal(model.head.bias, before["head.bias"])


def test_expansions_are_those_that_the_structure_lists():
    model, structure = pruned("residual")
    full = structure_of(build("residual"))
    only_stem = {name: e for name, e in structure.expansions.items() if name == "bn0"}
    shapes = {n: structure.shapes[n] if n.startswith(("stem", "bn0")) else s for n, s in full.shapes.items()}
    apply_structure(model, Structure(shapes, expansions=only_stem))
    assert list(structure_of(model).expansions) == ["bn0"]
    assert "_gflow_index" not in dict(model.bn2.named_buffers())
    assert model.bn2.num_features == 6
    model(example(model))


@pytest.mark.parametrize("name", ["residual", "tied"])
def test_a_structure_of_the_whole_module_fits_a_submodule(name):
    model = build(name)
    whole = nn.ModuleDict({"other": nn.Linear(2, 2), "net": model})
    graph = model.graph()
    rewrite(model, graph, random_plan(graph, 0))
    fresh = build(name, seed=4)
    apply_structure(fresh, structure_of(whole))
    assert structure_of(fresh) == structure_of(model)


def test_a_structure_with_two_matching_submodules_is_refused():
    pair = nn.ModuleDict({"student": build("plain"), "teacher": build("plain")})
    with pytest.raises(ValueError, match="2 networks with these tensors \\(student, teacher\\)"):
        apply_structure(build("plain"), structure_of(pair))


def test_a_structure_that_does_not_fit_is_refused_with_a_list_and_nothing_changes():
    model, structure = build("plain"), pruned("plain")[1]
    before = copy.deepcopy(model.state_dict())
    shapes = {**structure.shapes, "conv1.weight": (4, 3, 3), "conv7.weight": (1,)}
    bad = Structure(shapes, {"conv1": {"colour": 3}, "conv8": {}}, {"bn9": {"dim": 1, "width": 2, "index": [0]}})
    with pytest.raises(ValueError) as error:
        apply_structure(model, bad)
    for text in (
        "no tensor 'conv7.weight'",
        "'conv1.weight' has shape (8, 3, 3, 3), the structure has (4, 3, 3)",
        "module 'conv1' has no 'colour'",
        "no module 'conv8'",
        "no module 'bn9' to expand",
    ):
        assert text in str(error.value)
    assert_equal_states(model.state_dict(), before)
    assert structure_of(model) == structure_of(build("plain"))


def test_data_of_another_version_is_refused():
    with pytest.raises(ValueError, match="version 1"):
        apply_structure(build("plain"), {"version": 2})


class Headed(nn.Module):
    """A module with integers that do not follow from its shapes, and a buffer that is not in its state dict."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 6)
        self.heads = 3
        self.sizes = (4, 7)
        self.register_buffer("scale", torch.tensor([0.1, 1.7, -2.3, 0.3, 5.1, 9.9]), persistent=False)
        self.head = nn.Linear(2, 2)

    def forward(self, x):
        return self.head((self.first(x) * self.scale).view(len(x), self.heads, 2).sum(1))

    def graph(self):
        pairs = torch.arange(6).reshape(3, 2).numpy()
        slices = [Slice(name, 0, pairs) for name in ("first.weight", "first.bias", "scale")]
        graph = make_graph(self, [group("first", 3, slices, layers=[LayerUnits("first", pairs)], filters=2)])
        graph.patches = {
            SizeAttribute("", "heads"): SizeRule(0, {"first": 1}),
            SizeAttribute("", "sizes", 1): SizeRule(1, {"first": 2}),
        }
        return graph


def test_integers_and_buffers_outside_of_the_state_dict_are_recorded_and_restored():
    torch.manual_seed(0)
    model, fresh = Headed(), Headed()
    full = structure_of(model)
    x = torch.randn(4, 3)
    unpruned = model(x)
    state = copy.deepcopy(model.state_dict())
    structure = rewrite(model, model.graph(), {"first": torch.tensor([True, False, True])})
    assert structure.attributes[""] == {"scale": model.scale.tolist(), "heads": 2, "sizes": [4, 5]}
    assert model.sizes == (4, 5)
    assert model.scale.tolist() == torch.tensor([0.1, 1.7, 5.1, 9.9]).tolist()
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert structure_of(copied) == structure
    apply_structure(fresh, Structure.from_dict(pickle.loads(pickle.dumps(structure.as_dict()))))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x))
    # A structure that does not list them restores their first values.
    apply_structure(fresh, full)
    fresh.load_state_dict(state)
    assert (fresh.heads, fresh.sizes) == (3, (4, 7))
    assert torch.equal(fresh(x), unpruned)
    assert structure_of(fresh) == full


def test_after_syncbatchnorm_conversion_the_structure_is_applied_again():
    model, structure = pruned("residual")
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    assert not any(m._forward_hooks for m in converted.modules())
    apply_structure(converted, structure)
    assert isinstance(converted.bn2, nn.SyncBatchNorm)
    x = example(model)
    assert torch.equal(converted.eval()(x), model(x))


def test_plain_data_of_versions_without_gathers_is_read():
    model = build("residual")
    data = structure_of(model).as_dict()
    assert data.pop("gathers") == {}
    apply_structure(build("residual"), data)
    assert structure_of(model).as_dict() == {**data, "gathers": {}}
