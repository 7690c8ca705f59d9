"""Group counts of the networks of the paper, and exactness of whole pruned networks."""

import pytest
import torch
from masked_networks import compare_with_masked

from gflow_pl import models
from gflow_pl.channels import trace_channels

# name, number of classes, number of groups with residual="expand", number of groups with "remove", filters in groups
PINS = [
    ("vgg13", 10, 10, 10, 2944),
    ("mobilenet_v1", 10, 14, 14, 10944),
    ("resnet56", 10, 57, 30, 2128),
    ("resnet34", 100, 36, 20, 8512),
    ("resnet18", 100, 20, 12, 4800),
]


@pytest.mark.parametrize(("name", "classes", "num_expand", "num_remove", "filters"), PINS)
def test_networks_have_their_pinned_groups(name, classes, num_expand, num_remove, filters):
    model = getattr(models, name)(classes)
    for residual, num_groups in (("expand", num_expand), ("remove", num_remove)):
        graph = trace_channels(model, torch.zeros(1, 3, 32, 32), residual=residual)
        assert (len(graph.groups), graph.num_filters) == (num_groups, filters)
        assert graph.coverage() == 1.0
        outputs = [name for name, layer in graph.layers.items() if layer.is_output]
        assert list(graph.frozen) == outputs == [list(graph.layers)[-1]]


def test_resnet56_expands_the_layers_that_write_into_the_residual_stream():
    graph = trace_channels(models.resnet56(10), torch.zeros(1, 3, 32, 32))
    stem = graph.group("conv1")
    assert (stem.kind, stem.expansion.module, stem.expansion.width, stem.expansion.dim) == ("expand", "bn1", 16, 1)
    assert {part.tensor for part in stem.slices} == {
        "conv1.weight", "bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var",
    }  # fmt: skip
    assert graph.group("layer1.0.conv1").kind == "remove"
    assert {part.tensor for part in graph.group("layer1.0.conv1").slices} >= {"layer1.0.conv2.weight"}
    assert graph.group("layer1.0.conv2").expansion.module == "layer1.0.bn2"
    kinds = [group.kind for group in graph.groups]
    assert (kinds.count("remove"), kinds.count("expand")) == (27, 30)  # conv1 of 27 blocks; stem, conv2s, 2 shortcuts


def test_projection_shortcuts_form_separate_groups():
    graph = trace_channels(models.resnet18(10), torch.zeros(1, 3, 32, 32))
    group = graph.group("layer2.0.shortcut.0")
    assert (group.kind, group.expansion.module, group.size) == ("expand", "layer2.0.shortcut.1", 128)


def test_depthwise_layers_follow_and_do_not_vote():
    graph = trace_channels(models.mobilenet_v1(10), torch.zeros(1, 3, 32, 32))
    first = graph.groups[0]
    assert [(part.votes, part.index.shape) for part in first.layers] == [(True, (32, 1)), (False, (32, 1))]
    assert (first.filters, first.size) == (2, 32)


def test_the_norm_of_a_layer_is_found_behind_an_activation():
    graph = trace_channels(models.vgg13(10), torch.zeros(1, 3, 32, 32))
    norms = [layer.norm for layer in graph.layers.values()]
    assert norms[0] == "features.2"
    assert all(norms[:-1])
    assert norms[-1] is None
    assert [layer.name for layer in graph.layers.values() if layer.reads_input] == ["features.0"]


@pytest.mark.parametrize(
    ("name", "macs"),
    [("vgg13", 228_267_008), ("mobilenet_v1", 46_354_432), ("resnet56", 125_747_840), ("resnet18", 555_422_720)],
)
def test_uses_times_elements_are_multiply_accumulates(name, macs):
    for batch in (1, 3):
        graph = trace_channels(getattr(models, name)(10), torch.zeros(batch, 3, 32, 32))
        total = sum(count * torch.Size(graph.shapes[weight]).numel() for weight, count in graph.uses.items())
        assert total == macs


@pytest.mark.parametrize("residual", ["expand", "remove"])
@pytest.mark.parametrize("name", ["vgg13", "mobilenet_v1", "resnet56", "resnet18"])
def test_pruned_networks_of_the_paper_equal_their_masked_networks(name, residual):
    off, change, _, small = compare_with_masked(
        getattr(models, name)(10), (torch.randn(2, 3, 32, 32),), residual=residual
    )
    assert off < 1e-12 < 0.05 < change
    assert sum(p.numel() for p in small.parameters()) < 0.6 * sum(
        p.numel() for p in getattr(models, name)(10).parameters()
    )
