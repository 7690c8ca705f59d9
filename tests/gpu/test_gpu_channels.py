"""Traces on the GPU: they have no side effects, and their graphs equal those of the CPU."""

import copy
from functools import cache
from typing import ClassVar

import pytest
import timm
import torch
import torchvision
from comparisons import assert_identical
from gpu_device import DEVICE, distance, inductor, on_device, only_cuda
from masked_networks import masked_network, random_plan, randomize_parameters
from residual_net import residual_net
from stateful_net import StatefulNet, state_around
from torch import nn
from torch.utils.checkpoint import checkpoint

from gflow_pl import models
from gflow_pl.channels import trace_channels
from gflow_pl.surgery import rewrite


class RecordingNet(StatefulNet):
    """Records the devices on which its forward pass runs; a trace restores attributes, so the record is a global."""

    devices: ClassVar[list[str]] = []

    def forward(self, x):
        self.devices.append(x.device.type)
        return super().forward(x)


@pytest.mark.parametrize("looks_at_values", [False, True], ids=["on meta tensors", "on real tensors"])
def test_a_trace_has_no_side_effects(looks_at_values):
    model = RecordingNet(looks_at_values).to(DEVICE).train()
    model.norm.eval()
    model(torch.randn(2, 3, 8, 8, device=DEVICE)).sum().backward()
    x = torch.randn(2, 3, 8, 8, device=DEVICE)
    before = state_around(model)
    RecordingNet.devices.clear()
    graph = trace_channels(model, x)
    devices = set(RecordingNet.devices)
    assert_identical(state_around(model), before)
    assert (DEVICE.type in devices) == looks_at_values, f"the forward pass ran on {devices}"
    assert [group.name for group in graph.groups] == ["conv"]


@only_cuda
def test_a_forward_pass_outside_a_trace_advances_the_generator_of_the_gpu():
    """Without this, the comparison of generators above could not fail."""
    model = RecordingNet(True).to(DEVICE).train()
    before = torch.cuda.get_rng_state(DEVICE)
    model(torch.randn(2, 3, 8, 8, device=DEVICE))
    assert not torch.equal(torch.cuda.get_rng_state(DEVICE), before)


NETWORKS = {
    "resnet56": (lambda: models.resnet56(10), 32),
    "vgg13": (lambda: models.vgg13(10), 32),
    "resnet18": (lambda: torchvision.models.resnet18(), 64),
    "mobilenet_v3_small": (lambda: torchvision.models.mobilenet_v3_small(), 64),
    "shufflenet_v2_x0_5": (lambda: torchvision.models.shufflenet_v2_x0_5(), 64),
    "convnext_atto": (lambda: timm.create_model("convnext_atto"), 64),
    "vit_tiny": (lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2), 32),
}


def plain_form(graph):
    """The graph in a form that compares by value: its text, and every slice of every group."""
    groups = {}
    for group in graph.groups:
        slices = sorted((part.tensor, part.dim, part.index.tolist()) for part in group.slices)
        groups[group.name] = (group.kind, group.size, group.inexact, slices)
    return str(graph), groups


@cache
def plain_form_on_cpu(name):
    build, side = NETWORKS[name]
    return plain_form(trace_channels(build(), torch.zeros(1, 3, side, side)))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_graph_equals_that_of_the_cpu(name):
    build, side = NETWORKS[name]
    model, x = build().to(DEVICE), torch.zeros(1, 3, side, side, device=DEVICE)
    assert plain_form(trace_channels(model, x)) == plain_form_on_cpu(name)
    assert on_device(model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_graph_is_the_same_under_autocast_and_channels_last(dtype):
    model = models.resnet56(10).to(DEVICE, memory_format=torch.channels_last)
    x = torch.zeros(1, 3, 32, 32, device=DEVICE).to(memory_format=torch.channels_last)
    with torch.autocast(DEVICE.type, dtype=dtype):
        assert plain_form(trace_channels(model, x)) == plain_form_on_cpu("resnet56")
    half = plain_form(trace_channels(models.resnet56(10).to(DEVICE, dtype), x.to(dtype)))
    assert half == plain_form_on_cpu("resnet56")


class Wrapped(nn.Module):
    """A residual network that runs in one of the common modes."""

    def __init__(self, mode):
        super().__init__()
        self.net, self.mode = residual_net(), mode
        if mode in ("aot_eager", "inductor"):
            self.net[3].compile(backend=mode)
        if mode == "synchronized":
            self.net = nn.SyncBatchNorm.convert_sync_batchnorm(self.net)
        if mode == "channels last":
            self.net.to(memory_format=torch.channels_last)

    def forward(self, x):
        if self.mode == "autocast":
            with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
                return self.net(x)
        if "checkpoint" in self.mode:
            y = checkpoint(self.net[3], self.net[:3](x), use_reentrant="reentrant" in self.mode)
            return self.net[4:](y)
        return self.net(x)


MODES = ["autocast", "checkpoint", "reentrant checkpoint", "synchronized", "channels last", "aot_eager", inductor]


@pytest.mark.parametrize("mode", MODES)
def test_a_network_can_be_traced_rewritten_and_trained_in_every_mode(mode):
    torch.manual_seed(0)
    model = randomize_parameters(Wrapped(mode)).to(DEVICE).eval()
    x = torch.randn(4, 3, 6, 6, device=DEVICE)
    if mode == "channels last":
        x = x.to(memory_format=torch.channels_last)
    with torch.no_grad():
        full = model(x)

    # The groups are those of the plain network.
    graph = trace_channels(model, x)
    expected = trace_channels(residual_net(), torch.zeros(2, 3, 6, 6))
    assert [(group.name, group.size) for group in graph.groups] == [("net." + g.name, g.size) for g in expected.groups]

    # The rewritten network equals the masked network.
    plan = random_plan(graph)
    small = copy.deepcopy(model)
    rewrite(small, graph.copy(), plan)
    with torch.no_grad():
        masked = masked_network(model, graph, plan)(x)
        pruned = small(x)
    assert distance(pruned, masked) < (0.05 if mode == "autocast" else 1e-5), mode
    assert distance(full, masked) > 1e-2, "the plan changes the network"

    if mode != "synchronized":  # its training needs a process group; see one_rank.py
        small.train()(x).float().square().mean().backward()
        gradients = [p.grad for p in small.parameters()]
        assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
        assert on_device(small)
