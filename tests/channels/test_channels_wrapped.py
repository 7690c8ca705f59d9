"""Activation checkpointing, autocast, compiled and scripted parts, Lightning: none of them changes a group."""

import copy

import pytest
import pytorch_lightning as pl
import torch
from masked_networks import compare_with_masked
from residual_net import ResidualBlock, residual_net
from torch import nn
from torch.utils.checkpoint import checkpoint

from gflow_pl.channels import trace_channels


class Checkpointed(nn.Module):
    """A network with activation checkpointing."""

    def __init__(self, reentrant):
        super().__init__()
        self.net, self.reentrant = residual_net(), reentrant

    def forward(self, x):
        y = self.net[:3](x)
        return self.net[4:](checkpoint(self.net[3], y, use_reentrant=self.reentrant))


class Autocast(nn.Module):
    """A network with autocast to bfloat16 in its forward."""

    def __init__(self):
        super().__init__()
        self.net = residual_net()

    def forward(self, x):
        with torch.autocast(x.device.type if x.device.type != "meta" else "cpu", dtype=torch.bfloat16):
            return self.net(x)


class Module(pl.LightningModule):
    """A LightningModule."""

    def __init__(self):
        super().__init__()
        self.net = residual_net()

    def forward(self, x):
        return self.net(x)


class Compiled(nn.Module):
    """A network with a compiled block."""

    def __init__(self):
        super().__init__()
        self.net = residual_net()
        self.net[3].compile()

    def forward(self, x):
        return self.net(x)


class Inference(nn.Module):
    """A network with inference mode in its forward, where composite operators are not decomposed."""

    def __init__(self):
        super().__init__()
        self.net = residual_net()

    @torch.inference_mode()
    def forward(self, x):
        return self.net(x)


def groups_of(graph):
    return [
        (group.name, group.kind, group.size, {(part.tensor, part.dim) for part in group.slices})
        for group in graph.groups
    ]


def expected_groups(prefix):
    return [
        (prefix + name, kind, size, {(prefix + tensor, dim) for tensor, dim in slices})
        for name, kind, size, slices in groups_of(trace_channels(residual_net(), torch.zeros(2, 3, 6, 6)))
    ]


@pytest.mark.parametrize(
    "build",
    [lambda: Checkpointed(False), lambda: Checkpointed(True), Autocast, Module, Compiled, Inference],
    ids=["checkpoint", "reentrant", "autocast", "lightning", "compiled", "inference"],
)
def test_wrapping_changes_no_group(build):
    assert groups_of(trace_channels(build(), torch.zeros(2, 3, 6, 6))) == expected_groups("net.")


def test_channels_last_changes_no_group():
    model = residual_net().to(memory_format=torch.channels_last)
    x = torch.zeros(2, 3, 6, 6).to(memory_format=torch.channels_last)
    assert groups_of(trace_channels(model, x)) == expected_groups("")


def test_synchronized_batch_norms_change_no_group():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(residual_net())
    assert groups_of(trace_channels(model, torch.zeros(2, 3, 6, 6))) == expected_groups("")


def test_half_precision_changes_no_group():
    assert groups_of(
        trace_channels(residual_net().bfloat16(), torch.zeros(2, 3, 6, 6, dtype=torch.bfloat16))
    ) == expected_groups("")


def test_frozen_parameters_and_a_copy_change_no_group():
    model = residual_net().requires_grad_(False)
    assert groups_of(trace_channels(copy.deepcopy(model), torch.zeros(2, 3, 6, 6))) == expected_groups("")
    assert not any(p.requires_grad for p in model.parameters())


def test_layers_around_a_scripted_block_are_traced():
    model = residual_net()
    model[3] = torch.jit.script(ResidualBlock())
    off, _, graph, _ = compare_with_masked(
        model, (torch.randn(2, 3, 6, 6),), only=lambda group: not group.name.startswith("3")
    )
    assert off < 1e-12
    assert set(graph.frozen) | {part.layer for group in graph.groups for part in group.layers} >= {"0", "6"}


def test_graphs_of_a_pickled_copy_are_the_same(tmp_path):
    model = residual_net()
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    x = torch.zeros(2, 3, 6, 6)
    assert groups_of(trace_channels(again, x)) == groups_of(trace_channels(model, x))


def test_tracing_inside_no_grad_or_inference_mode_works():
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert groups_of(trace_channels(residual_net(), torch.zeros(2, 3, 6, 6))) == expected_groups("")


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d, nn.Linear])
def test_spectral_norms_by_hooks_are_traced(kind):
    torch.manual_seed(0)
    linear = kind is nn.Linear
    pool = [] if linear else [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    layer = nn.utils.spectral_norm(kind(3, 8) if linear else kind(3, 8, 1))
    model = nn.Sequential(layer, nn.ReLU(), *pool, nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    off, change, graph, _ = compare_with_masked(model, (torch.randn(2, 3) if linear else torch.randn(2, 3, 6, 6),))
    assert off < 1e-12 < 1e-3 < change
    assert [group.size for group in graph.groups] == [8, 6]
    assert "over the pruned dim" in graph.groups[0].inexact  # the spectral norm changes
