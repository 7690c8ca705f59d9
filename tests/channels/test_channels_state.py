"""A trace leaves the model and the process unchanged: tensors, gradients, generators, flags, hooks, attributes."""

import collections
import copy
import dataclasses
import random
import types

import numpy as np
import pytest
import torch
from comparisons import assert_identical
from stateful_net import StatefulNet, state_around
from torch import nn

from gflow_pl.channels import trace_channels
from gflow_pl.channels.forward_runner import ForwardRunner


@pytest.mark.parametrize("looks_at_values", [False, True])
def test_a_trace_changes_nothing(looks_at_values):
    model = StatefulNet(looks_at_values).train()
    model.norm.eval()
    model.conv.register_forward_hook(lambda module, args, out: None)
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    x = torch.randn(2, 3, 8, 8)
    before = state_around(model)
    graph = trace_channels(model, x)
    assert_identical(state_around(model), before)
    assert [group.name for group in graph.groups] == ["conv"]


def test_nested_containers_are_restored():
    class Caching(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)
            self.last, self.log, self.pair = collections.deque([1], maxlen=2), {"x": []}, ([], {0: set()})

        def forward(self, x):
            y = self.a(x)
            self.last.append(y)
            self.log["x"].append(y)
            self.pair[0].append(y)
            self.pair[1][0].add(y)
            return self.b(y)

    model = Caching()
    inner = model.log["x"], model.pair[1][0]
    graph = trace_channels(model, torch.zeros(2, 4))
    assert [group.name for group in graph.groups] == ["a"]
    assert (model.last, model.log, model.pair) == (collections.deque([1]), {"x": []}, ([], {0: set()}))
    assert inner[0] is model.log["x"]
    assert inner[1] is model.pair[1][0]


def test_lazy_layers_must_be_initialized():
    model = nn.Sequential(nn.Linear(4, 6), nn.LazyLinear(2))
    with pytest.raises(ValueError, match=r"'1.weight' has no shape yet; run the network once"):
        trace_channels(model, torch.zeros(2, 4))
    model(torch.zeros(2, 4))
    assert [group.name for group in trace_channels(model, torch.zeros(2, 4)).groups] == ["0"]


def test_inputs_are_a_tuple_of_arguments_or_the_only_argument():
    class Dicty(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, batch, scale=None):
            return {"out": self.b(self.a(batch["x"]).relu())} if scale is None else self.b(self.a(batch["x"]) * scale)

    for inputs in ({"x": torch.zeros(2, 4)}, ({"x": torch.zeros(2, 4)}, torch.ones(()))):
        graph = trace_channels(Dicty(), inputs)
        assert [(group.name, group.size) for group in graph.groups] == [("a", 6)]


@dataclasses.dataclass
class Prediction:
    """An output object as some libraries return it."""

    logits: torch.Tensor


class Slotted:
    """An object without ``__dict__``."""

    __slots__ = ("logits",)

    def __init__(self, logits):
        self.logits = logits


class OneSlot:
    """Its ``__slots__`` is a string instead of a tuple."""

    __slots__ = "logits"

    def __init__(self, logits):
        self.logits = logits


class PrivateSlot:
    """A slot whose name Python mangles."""

    __slots__ = ("__logits",)

    def __init__(self, logits):
        self.__logits = logits


@pytest.mark.parametrize(
    "wrap",
    [
        Prediction,
        Slotted,
        lambda y: {"all": [Prediction(y)]},
        lambda y: collections.UserDict(logits=y),
        lambda y: {y},
        lambda y: (part for part in [y]),
        lambda y: (y.sum(), map(lambda part: part, [y])),
        lambda y: types.MappingProxyType({"logits": y}),
        lambda y: {"logits": y}.values(),
        OneSlot,
        PrivateSlot,
        lambda y: torch.distributions.Categorical(logits=y, validate_args=False),
    ],
)
def test_outputs_in_any_object_are_frozen(wrap):
    class Wrapping(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x):
            return wrap(self.b(self.a(x).relu()))

    graph = trace_channels(Wrapping(), torch.zeros(2, 4))
    assert [group.name for group in graph.groups] == ["a"]
    assert graph.frozen == {"b": "the model's output"}
    assert graph.layers["b"].is_output


@pytest.mark.parametrize(
    ("wrap", "read"),
    [
        (Prediction, lambda batch: batch.logits),
        (Slotted, lambda batch: batch.logits),
        (lambda x: collections.UserDict(x=x, n=3), lambda batch: batch["x"]),
        (lambda x: {"all": [Prediction(Prediction(x))]}, lambda batch: batch["all"][0].logits.logits),
    ],
)
def test_inputs_in_any_object_are_activations(wrap, read):
    class Reading(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, batch):
            return self.b(self.a(read(batch)).relu())

    x = torch.zeros(1, 4)
    batch = wrap(x)
    runner = ForwardRunner(Reading(), (batch,), meta=True, doubled=True)
    assert {(tensor.is_meta, tuple(tensor.shape)) for tensor in runner.inputs} == {(True, (2, 4))}
    assert read(batch) is x
    graph = trace_channels(Reading(), batch)
    assert [(group.name, group.size) for group in graph.groups] == [("a", 6)]
    assert graph.layers["a"].reads_input


class CopiesToItself:
    """Its copy is the object itself."""

    def __init__(self, x):
        self.x = x

    def __copy__(self):
        return self


class NeedsArgument(CopiesToItself):
    """It cannot be created without its argument, which `copy` does not pass."""

    def __new__(cls, x):
        return super().__new__(cls)

    __copy__ = None


class SelfReferring(CopiesToItself):
    """It refers to a Python module and to itself."""

    def __init__(self, x):
        super().__init__(x)
        self.library, self.owner = torch, self


@dataclasses.dataclass(slots=True, weakref_slot=True)
class WeakReferenced:
    """A data class with slots, including one for weak references."""

    x: torch.Tensor


@pytest.mark.parametrize("cls", [CopiesToItself, NeedsArgument, SelfReferring, WeakReferenced])
def test_inputs_that_cannot_be_copied_stay_unchanged(cls):
    class Reading(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, batch):
            return self.b(self.a(batch.x).relu())

    x = torch.zeros(1, 4)
    batch = cls(x)
    graph = trace_channels(Reading(), batch)
    assert batch.x is x
    assert [(group.name, group.size) for group in graph.groups] == [("a", 6)]
    assert graph.frozen == {"b": "the model's output"}


def test_all_layers_of_an_infinite_forward_are_frozen():
    class Endless(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x):
            while True:
                yield self.b(self.a(x))

    graph = trace_channels(Endless(), torch.zeros(2, 4))
    assert graph.groups == []
    assert set(graph.frozen) == {"a", "b"}


UNUSUAL_TENSORS = {
    "sparse": lambda: torch.eye(4).to_sparse(),
    "csr": lambda: torch.eye(4).to_sparse_csr(),
    "nested": lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
    "meta": lambda: torch.zeros(3, device="meta"),
    "expanded nan": lambda: torch.full((1,), float("nan")).expand(3),
    "inference": lambda: torch.inference_mode()(torch.zeros)(3),
}


@pytest.mark.parametrize("name", UNUSUAL_TENSORS)
@pytest.mark.parametrize("looks_at_values", [False, True])
def test_a_module_may_have_any_tensor_as_an_attribute(name, looks_at_values):
    class Holding(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.kept = nn.Linear(4, 6), nn.Linear(6, 2), UNUSUAL_TENSORS[name]()
            self.system = random.SystemRandom()

        def forward(self, x):
            y = self.a(x)
            return self.b(-y if looks_at_values and y.sum().item() > 1e9 else y)

    model = Holding()
    kept = model.kept
    assert [group.name for group in trace_channels(model, torch.zeros(2, 4)).groups] == ["a"]
    assert model.kept is kept


@pytest.mark.parametrize("change", [lambda q: q.resize_(5), lambda q: setattr(q, "data", torch.ones(2))])
def test_size_and_values_of_tensor_attributes_are_restored(change):
    class Changing(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.kept = nn.Linear(4, 6), nn.Linear(6, 2), torch.zeros(2)

        def forward(self, x):
            change(self.kept)
            y = self.a(x)
            return self.b(-y if y.sum().item() > 1e9 else y)

    model = Changing()
    trace_channels(model, torch.zeros(2, 4))
    assert model.kept.tolist() == [0, 0]


def test_generators_and_tensors_of_a_module_are_restored():
    """Also if the forward runs on real tensors, because it looks at values."""

    class Drawing(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)
            self.torch, self.numpy = torch.Generator().manual_seed(1), np.random.default_rng(1)
            self.legacy, self.python = np.random.RandomState(1), random.Random(1)
            self.total, self.totals = torch.zeros(()), [torch.zeros(2)]

        def draws(self):
            return (
                torch.rand((), generator=self.torch).item(),
                self.numpy.random(),
                self.legacy.rand(),
                self.python.random(),
            )

        def forward(self, x):
            self.total += 1
            self.totals[0].add_(sum(self.draws()))
            y = self.a(x)
            return self.b(-y if y.sum().item() > 1e9 else y)

    model = Drawing()
    graph = trace_channels(model, torch.zeros(2, 4))
    assert [group.name for group in graph.groups] == ["a"]
    assert model.total.item() == 0
    assert model.totals[0].tolist() == [0, 0]
    assert model.draws() == Drawing().draws()


@pytest.mark.parametrize(("name", "value"), [("residual", "shrink"), ("frozen", "remove")])
def test_settings_are_checked(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be one of .* got '{value}'"):
        trace_channels(nn.Linear(2, 2), torch.zeros(1, 2), **{name: value})


def test_graphs_are_deterministic_and_hold_no_tensor():
    model = StatefulNet()
    first, second = (trace_channels(copy.deepcopy(model), torch.zeros(2, 3, 8, 8)) for _ in range(2))
    assert str(first) == str(second)
    for a, b in zip(first.groups, second.groups, strict=True):
        assert a.name == b.name
        assert [(s.tensor, s.dim, s.index.tolist()) for s in a.slices] == [
            (s.tensor, s.dim, s.index.tolist()) for s in b.slices
        ]
    assert not any(isinstance(value, (torch.Tensor, nn.Module)) for value in vars(first).values())


def test_the_table_of_a_graph_has_a_row_for_every_layer():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8, 10))
    lines = str(trace_channels(net, torch.zeros(1, 3, 3, 3))).splitlines()
    assert lines[0].split() == ["layer", "filters", "group", "what", "happens"]
    assert lines[1].split() == ["0", "8", "0", "removed"]
    assert lines[2].endswith("frozen: the model's output")
