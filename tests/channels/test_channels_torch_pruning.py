"""Groups of convolutional networks equal those of Torch-Pruning, an independent tool."""

import pytest
import torch
import torchvision
from torch import nn

from gflow_pl import models
from gflow_pl.channels import trace_channels

tp = pytest.importorskip("torch_pruning")

NETS = {
    "vgg13": (lambda: models.vgg13(10), 32),
    "resnet18": (lambda: models.resnet18(10), 32),
    "resnet56": (lambda: models.resnet56(10), 32),
    "mobilenet_v1": (lambda: models.mobilenet_v1(10), 32),
    "tv_resnet50": (torchvision.models.resnet50, 64),
    "tv_mobilenet_v2": (torchvision.models.mobilenet_v2, 64),
    "tv_mobilenet_v3_small": (torchvision.models.mobilenet_v3_small, 64),
    "tv_squeezenet1_1": (torchvision.models.squeezenet1_1, 64),
    "tv_mnasnet0_5": (torchvision.models.mnasnet0_5, 64),
    "tv_vgg11_bn": (torchvision.models.vgg11_bn, 64),
}


def their_groups(model, x):
    """Return every group of Torch-Pruning as a set of (module, side): whether inputs or outputs are pruned."""
    names = {module: name for name, module in model.named_modules()}
    graph = tp.DependencyGraph().build_dependency(model, example_inputs=x)
    found = set()
    for group in graph.get_all_groups(root_module_types=[nn.Conv2d, nn.Linear]):
        parts, size = set(), None
        for dependency, index in group:
            module = dependency.target.module
            if module not in names or not isinstance(module, (nn.Conv2d, nn.Linear, nn.BatchNorm2d)):
                continue
            side = "in" if "in_channels" in dependency.handler.__name__ else "out"
            parts.add((names[module], "out" if isinstance(module, nn.BatchNorm2d) else side))
            size = size or len(index)
        found.add(frozenset(parts))
    return found


def our_groups(model, x):
    """Return our groups in the same form, and the layers whose outputs are those of the model."""
    graph = trace_channels(model, x, residual="remove")
    modules = dict(model.named_modules())
    found = set()
    for group in graph.groups:
        parts = set()
        for part in group.slices:
            module, _, _ = part.tensor.rpartition(".")
            dims_in = isinstance(modules[module], (nn.Conv2d, nn.Linear)) and part.dim == 1
            parts.add((module, "in" if dims_in else "out"))
        found.add(frozenset(parts))
    return found, {name for name, layer in graph.layers.items() if layer.is_output}


def without_followers(parts, model):
    """Name the output side of depthwise layers: inputs and outputs are pruned together, and the tools name either."""
    modules = dict(model.named_modules())
    return frozenset((name, "out" if getattr(modules[name], "groups", 1) > 1 else side) for name, side in parts)


@pytest.mark.parametrize("name", sorted(NETS))
def test_groups_agree_with_torch_pruning(name):
    build, size = NETS[name]
    model = build().eval()
    x = torch.zeros(1, 3, size, size)
    ours, outputs = our_groups(model, x)
    theirs = {without_followers(parts, model) for parts in their_groups(model, x)}
    theirs = {parts for parts in theirs if not any(layer in outputs and side == "out" for layer, side in parts)}
    assert {without_followers(parts, model) for parts in ours} == theirs
