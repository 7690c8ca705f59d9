"""Rewritten networks on the GPU: exactness, tensors, optimizers, copies, autocast, compilation, export."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from gpu_device import DEVICE, ON_CUDA, distance, inductor, on_device, only_cuda
from masked_networks import compare_with_masked, masked_network, random_plan, randomize_parameters
from torch import nn
from two_convs import slice_tensor, sliced_optimizer, two_convs

from gflow_pl import models
from gflow_pl.channels import trace_channels
from gflow_pl.surgery import apply_structure, rewrite, structure_of

NETWORKS = {
    "resnet56": (lambda: models.resnet56(10), 32),
    "vgg13": (lambda: models.vgg13(10), 32),
    "mobilenet_v1": (lambda: models.mobilenet_v1(10), 32),
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=10), 64),
    "mobilenet_v3_small": (lambda: torchvision.models.mobilenet_v3_small(num_classes=10), 64),
    "regnet_y_400mf": (lambda: torchvision.models.regnet_y_400mf(num_classes=10), 64),
    "densenet121": (lambda: torchvision.models.densenet121(num_classes=10), 64),
    "convnext_atto": (lambda: timm.create_model("convnext_atto", num_classes=10), 64),
}


@pytest.mark.parametrize("residual", ["expand", "remove"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_rewritten_network_equals_the_masked_network(name, residual):
    torch.manual_seed(0)
    build, side = NETWORKS[name]
    x = torch.randn(2, 3, side, side).to(DEVICE)
    error, change, graph, small = compare_with_masked(build().to(DEVICE), (x,), residual=residual)
    assert error < 1e-11, f"{name}, {residual}: {error:.1e} from the masked network (goal: 1e-12)"
    assert change > 1e-4, f"{name}, {residual}: the plan changes the output by only {change:.1e}"
    assert any(group.inexact is None for group in graph.groups)
    assert on_device(small)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_parameters_keep_identity_dtype_device_and_memory_format(dtype, channels_last):
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    model = torchvision.models.resnet18(num_classes=10).to(DEVICE, dtype, memory_format=memory_format)
    model.layer1[0].conv1.weight.requires_grad_(False)
    x = torch.randn(4, 3, 64, 64, device=DEVICE, dtype=dtype).to(memory_format=memory_format)
    before = {name: (p, tuple(p.shape), p.requires_grad) for name, p in model.named_parameters()}
    graph = trace_channels(model, x, residual="remove")
    rewrite(model, graph, random_plan(graph))
    cut = 0
    for name, p in model.named_parameters():
        old, shape, requires_grad = before[name]
        assert p is old, name
        assert (p.dtype, p.device, p.requires_grad) == (dtype, DEVICE, requires_grad), name
        if p.ndim == 4 and p.shape[2] > 1:
            assert p.is_contiguous(memory_format=memory_format), name
        cut += tuple(p.shape) != shape
    assert cut > 30
    loss = model(x).float().square().mean()
    loss.backward()
    assert on_device(model)
    assert model.conv1.weight.grad.shape == model.conv1.weight.shape


# Training after a rewrite


OPTIMIZERS = {
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "SGD foreach": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, foreach=True),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3, fused=True),
    "Adam foreach": lambda p: torch.optim.Adam(p, lr=0.01, foreach=True),
    "Adam fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "Adam amsgrad fused": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True, fused=True),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "RMSprop foreach": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, foreach=True),
}
CAPTURABLE = {
    "Adam capturable": lambda p: torch.optim.Adam(p, lr=0.01, capturable=True),
    "Adam capturable foreach": lambda p: torch.optim.Adam(p, lr=0.01, capturable=True, foreach=True),
    "AdamW capturable fused": lambda p: torch.optim.AdamW(p, lr=0.01, capturable=True, fused=True),
    "AdamW capturable, learning rate on the device": lambda p: torch.optim.AdamW(
        p, lr=torch.tensor(0.01, device=DEVICE), capturable=True, foreach=True
    ),
}
MAKERS = {**OPTIMIZERS, **CAPTURABLE}
FIRST, SECOND = torch.tensor([0, 2, 3, 7]), torch.tensor([1, 2, 5])


def train(model, optimizer, start, steps=3):
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 3, 8, 8, generator=generator, dtype=torch.float64).to(DEVICE)
        y = torch.randint(4, (8,), generator=generator).to(DEVICE)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


@pytest.mark.parametrize("name", [*OPTIMIZERS, *(pytest.param(name, marks=only_cuda) for name in CAPTURABLE)])
def test_training_equals_that_of_a_network_built_small(name, deterministic):
    torch.manual_seed(0)
    model, make = two_convs().to(DEVICE, torch.float64), MAKERS[name]
    optimizer = make(model.parameters())
    train(model, optimizer, 0)

    # Reference: a new network and a new optimizer, loaded from state dicts that are sliced by hand.
    small = two_convs(len(FIRST), len(SECOND)).to(DEVICE, torch.float64)
    state = {name: slice_tensor(name, value, FIRST, SECOND) for name, value in model.state_dict().items()}
    small.load_state_dict(state)
    fresh = sliced_optimizer(optimizer, small, make, FIRST, SECOND)

    graph = trace_channels(model, torch.zeros(1, 3, 8, 8, device=DEVICE, dtype=torch.float64))
    keep = {
        "0": torch.zeros(8, dtype=torch.bool).index_fill(0, FIRST, True),
        "3": torch.zeros(6, dtype=torch.bool).index_fill(0, SECOND, True),
    }
    devices = {key: value.device for state in optimizer.state.values() for key, value in state.items()}
    rewrite(model, graph, keep, optimizers=[optimizer])
    train(model, optimizer, 3)
    train(small, fresh, 3)

    distances = {}
    for (key, ours), theirs in zip(model.state_dict().items(), small.state_dict().values(), strict=True):
        distances[key] = distance(ours, theirs)
    for number, (one, two) in enumerate(zip(model.parameters(), small.parameters(), strict=True)):
        assert optimizer.state[one].keys() == fresh.state[two].keys()
        assert len(optimizer.state[one]) > 0
        for key, value in optimizer.state[one].items():
            if isinstance(value, torch.Tensor):
                assert value.device == devices[key], f"the rewrite moved {key} to another device"
                distances[f"{number}/{key}"] = distance(value, fresh.state[two][key])
    worst = max(distances, key=distances.get)
    limit = 1e-9 if ON_CUDA else 0.0
    assert distances[worst] <= limit, f"{name}: {worst} differs by {distances[worst]:.1e} of its largest value"


# Networks with expansions and gathers


class Depthwise(nn.Module):
    """A block whose depthwise convolution reads the residual stream, which needs an expansion and a gather."""

    def __init__(self):
        super().__init__()
        self.dw, self.norm = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.GroupNorm(1, 8)
        self.up, self.down = nn.Conv2d(8, 12, 1), nn.Conv2d(12, 8, 1)

    def forward(self, x):
        return x + self.down(self.up(self.norm(self.dw(x))).relu())


def depthwise_net():
    """A stem, two depthwise blocks and a head."""
    stem = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*stem, Depthwise(), Depthwise(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


@pytest.fixture
def expanded():
    """A pruned network, its input, and the output of the masked network."""
    torch.manual_seed(0)
    model, x = randomize_parameters(depthwise_net()).to(DEVICE).eval(), torch.randn(4, 3, 6, 6).to(DEVICE)
    graph = trace_channels(model, x)
    plan = random_plan(graph)
    with torch.no_grad():
        masked = masked_network(model, graph, plan)(x)
    structure = rewrite(model, graph, plan)
    assert structure.expansions
    assert structure.gathers
    return model, x, masked


def test_an_expanded_network_survives_copies_and_moves(expanded):
    model, x, masked = expanded
    with torch.no_grad():
        expected = model(x)
        assert distance(expected, masked) < 1e-5
        assert torch.equal(copy.deepcopy(model)(x), expected)
        on_cpu = copy.deepcopy(model).cpu()
        assert distance(on_cpu(x.cpu()), expected) < 1e-5
        assert {b.device.type for b in on_cpu.buffers()} == {"cpu"}
        back = on_cpu.to(DEVICE)
        assert on_device(back)
        assert torch.equal(back(x), expected)
        channels_last = copy.deepcopy(model).to(memory_format=torch.channels_last)
        assert distance(channels_last(x.to(memory_format=torch.channels_last)), expected) < 1e-5


def test_a_structure_from_one_device_applies_on_the_other(expanded):
    model, x, _ = expanded
    for device in (torch.device("cpu"), DEVICE):
        fresh = depthwise_net().to(device).eval()
        apply_structure(fresh, structure_of(model).as_dict())
        fresh.load_state_dict(model.state_dict())
        assert {t.device for t in (*fresh.parameters(), *fresh.buffers())} == {device}
        assert distance(fresh(x.to(device)), model(x)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_expanded_network_trains_under_autocast(expanded, dtype):
    model, x, masked = expanded
    with torch.autocast(DEVICE.type, dtype=dtype):
        y = model(x)
    assert y.dtype == dtype
    assert distance(y, masked) < 0.05
    y.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert on_device(model)


@pytest.mark.parametrize("backend", ["aot_eager", inductor])
def test_an_expanded_network_compiles_without_graph_breaks(expanded, backend):
    model, x, _ = expanded
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    ours, theirs = compiled(x), eager(x)
    assert distance(ours, theirs) < 1e-4
    ours.square().mean().backward()
    theirs.square().mean().backward()
    for (name, one), two in zip(model.named_parameters(), eager.parameters(), strict=True):
        assert distance(one.grad, two.grad) < 1e-3, name


def test_an_expanded_network_can_be_exported(expanded):
    model, x, _ = expanded
    program = torch.export.export(model, (x,))
    assert distance(program.module()(x), model(x)) < 1e-5
