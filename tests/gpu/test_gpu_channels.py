"""A trace of a network on the GPU: it leaves no mark, and finds what it finds on the CPU."""

import copy
import random
from functools import cache

import numpy as np
import pytest
import timm
import torch
import torchvision
from gpu_device import DEVICE, distance, inductor, on_device, only_cuda
from masked_networks import masked_network, random_plan, randomize_parameters
from torch import nn
from torch.utils.checkpoint import checkpoint

from gflow_pl import models
from gflow_pl.channels import trace_channels
from gflow_pl.surgery import rewrite

RAN_ON = []


class Meddlesome(nn.Module):
    """Caches, counts, draws random numbers in four ways, and looks at values where it is told to."""

    def __init__(self, looks):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 4)
        self.drop, self.looks = nn.Dropout(0.5), looks
        self.calls, self.cache, self.seen = 0, {}, []
        self.register_buffer("total", torch.zeros(()))

    def forward(self, x):
        RAN_ON.append(x.device.type)
        self.calls += 1
        self.seen.append(tuple(x.shape))
        self.cache["x"] = x
        random.random(), np.random.rand()
        self.total += 1
        y = self.drop(self.norm(self.conv(x))).relu().mean((2, 3))
        y = y + torch.rand_like(y)
        if self.looks and y.sum().item() > 1e9:
            y = -y
        return self.head(y + torch.randn(()))


def generators():
    states = [torch.get_rng_state(), random.getstate(), str(np.random.get_state())]
    return states + ([torch.cuda.get_rng_state(DEVICE)] if DEVICE.type == "cuda" else [])


def snapshot(model):
    return {
        "generators": generators(),
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "parameters": {
            name: [id(p), p.data_ptr(), p.device, p._version, p.grad.clone()] for name, p in model.named_parameters()
        },
        "buffers": {name: [id(b), b.device] for name, b in model.named_buffers()},
        "flags": [(name, module.training, sorted(vars(module))) for name, module in model.named_modules()],
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        "own": [model.calls, dict(model.cache), list(model.seen)],
    }


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@pytest.mark.parametrize("looks", [False, True], ids=["without contents", "on real tensors"])
def test_a_trace_leaves_no_mark(looks):
    model = Meddlesome(looks).to(DEVICE).train()
    model.norm.eval()
    model(torch.randn(2, 3, 8, 8, device=DEVICE)).sum().backward()
    x = torch.randn(2, 3, 8, 8, device=DEVICE)
    before = snapshot(model)
    RAN_ON.clear()
    graph = trace_channels(model, x)
    ran_on = set(RAN_ON)
    for name, value in snapshot(model).items():
        assert same(before[name], value), name
    assert (DEVICE.type in ran_on) == looks, f"the forward ran on {ran_on}"
    assert [group.name for group in graph.groups] == ["conv"]


@only_cuda
def test_the_generator_of_the_gpu_moves_where_a_trace_does_not_hold_it():
    """What the test above compares would else say nothing."""
    model = Meddlesome(True).to(DEVICE).train()
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


def facts(graph):
    groups = {}
    for group in graph.groups:
        slices = sorted((part.tensor, part.dim, part.index.tolist()) for part in group.slices)
        groups[group.name] = (group.kind, group.size, group.inexact, slices)
    return str(graph), groups


@cache
def facts_on_the_cpu(name):
    build, side = NETWORKS[name]
    return facts(trace_channels(build(), torch.zeros(1, 3, side, side)))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_graph_is_that_of_the_cpu(name):
    build, side = NETWORKS[name]
    model, x = build().to(DEVICE), torch.zeros(1, 3, side, side, device=DEVICE)
    assert facts(trace_channels(model, x)) == facts_on_the_cpu(name)
    assert on_device(model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_graph_is_the_same_under_autocast_and_channels_last(dtype):
    model = models.resnet56(10).to(DEVICE, memory_format=torch.channels_last)
    x = torch.zeros(1, 3, 32, 32, device=DEVICE).to(memory_format=torch.channels_last)
    with torch.autocast(DEVICE.type, dtype=dtype):
        assert facts(trace_channels(model, x)) == facts_on_the_cpu("resnet56")
    half = facts(trace_channels(models.resnet56(10).to(DEVICE, dtype), x.to(dtype)))
    assert half == facts_on_the_cpu("resnet56")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.c1, self.n1 = nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.c2, self.n2 = nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x):
        return (x + self.n2(self.c2(self.n1(self.c1(x)).relu()))).relu()


def plain():
    stem = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*stem, Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


class Wrapped(nn.Module):
    """A network that is run in one of the ways in which people run theirs."""

    def __init__(self, way):
        super().__init__()
        self.net, self.way = plain(), way
        if way in ("aot_eager", "inductor"):
            self.net[3].compile(backend=way)
        if way == "synchronised":
            self.net = nn.SyncBatchNorm.convert_sync_batchnorm(self.net)
        if way == "channels last":
            self.net.to(memory_format=torch.channels_last)

    def forward(self, x):
        if self.way == "autocast":
            with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
                return self.net(x)
        if "checkpoint" in self.way:
            y = checkpoint(self.net[3], self.net[:3](x), use_reentrant="reentrant" in self.way)
            return self.net[4:](y)
        return self.net(x)


WAYS = ["autocast", "checkpoint", "reentrant checkpoint", "synchronised", "channels last", "aot_eager"]
WAYS += [inductor]


@pytest.mark.parametrize("way", WAYS)
def test_a_network_is_traced_rewritten_and_run_however_it_is_run(way):
    torch.manual_seed(0)
    model = randomize_parameters(Wrapped(way)).to(DEVICE).eval()
    x = torch.randn(4, 3, 6, 6, device=DEVICE)
    if way == "channels last":
        x = x.to(memory_format=torch.channels_last)
    with torch.no_grad():
        full = model(x)
    graph = trace_channels(model, x)
    expected = trace_channels(plain(), torch.zeros(2, 3, 6, 6))
    assert [(group.name, group.size) for group in graph.groups] == [("net." + g.name, g.size) for g in expected.groups]
    plan = random_plan(graph)
    small = copy.deepcopy(model)
    rewrite(small, graph.copy(), plan)
    with torch.no_grad():
        masked = masked_network(model, graph, plan)(x)
        pruned = small(x)
    assert distance(pruned, masked) < (0.05 if way == "autocast" else 1e-5), way
    assert distance(full, masked) > 1e-2, "the plan changes the network"
    if way != "synchronised":  # which wants a process group to train; see one_rank.py
        small.train()(x).float().square().mean().backward()
        gradients = [p.grad for p in small.parameters()]
        assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
        assert on_device(small)
