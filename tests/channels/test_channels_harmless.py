"""A trace leaves modules unchanged that refuse changes, keep tensors in other objects, or are scripted."""

import collections
import random
import types

import pytest
import torch
from torch import nn

from gflow_pl.channels import trace_channels
from gflow_pl.common.errors import SettingsError
from gflow_pl.common.evaluation_mode import evaluation_mode


def _refuse(self, *args, **kwargs):
    raise TypeError("read-only")


class FrozenDict(collections.OrderedDict):
    """A configuration that refuses changes, and holds the width of a layer."""

    def __init__(self, **items):
        super().__init__()
        for key, value in items.items():
            collections.OrderedDict.__setitem__(self, key, value)

    update = __setitem__ = __delitem__ = pop = popitem = clear = setdefault = copy = _refuse


class TwoLayers(nn.Module):
    """Two linear layers and whatever a test adds; `looks_at_values` needs real tensors."""

    def __init__(self, looks_at_values=False):
        super().__init__()
        self.a, self.b, self.looks_at_values = nn.Linear(4, 6), nn.Linear(6, 2), looks_at_values

    def hidden(self, x):
        """Return the hidden features."""
        return self.a(x).relu()

    def forward(self, x):
        y = self.hidden(x)
        if self.looks_at_values and y.sum().item() > 1e9:
            raise ValueError("too large")
        return self.b(y)


def state(model):
    """Return the values of all tensors and the training flags."""
    return {name: tensor.tolist() for name, tensor in model.state_dict().items()}, [m.training for m in model.modules()]


@pytest.fixture(params=[False, True], ids=["meta", "real"])
def looks_at_values(request):
    return request.param


def test_a_frozen_configuration_stays(looks_at_values):
    model = TwoLayers(looks_at_values)
    model.config = FrozenDict(width=6, sizes=[4, 6])
    before = state(model)
    graph = trace_channels(model, torch.randn(2, 4))
    assert [group.name for group in graph.groups] == ["a"]
    assert state(model) == before
    assert list(model.config.items()) == [("width", 6), ("sizes", [4, 6])]


def test_the_dict_of_parameters_may_refuse_changes(looks_at_values):
    class Parameters(dict):
        __setitem__ = update = pop = clear = _refuse

    model = TwoLayers(looks_at_values)
    model.a._parameters = Parameters(model.a._parameters)
    before = state(model)
    assert [group.name for group in trace_channels(model, torch.randn(2, 4)).groups] == ["a"]
    assert state(model) == before
    assert type(model.a._parameters) is Parameters


def test_objects_and_hidden_modules_that_a_forward_writes_to_are_restored(looks_at_values):
    class Writing(TwoLayers):
        __slots__ = ("kept",)

        def __init__(self):
            super().__init__(looks_at_values)
            self.cache, self.norms = types.SimpleNamespace(last=None), [nn.BatchNorm1d(6)]

        def hidden(self, x):
            self.cache.last = self.kept = y = super().hidden(x)
            return self.norms[0](y)

    model = Writing()
    before, norm = state(model), {name: value.clone() for name, value in model.norms[0].state_dict().items()}
    trace_channels(model, torch.randn(2, 4))
    assert state(model) == before
    assert model.cache.last is None
    assert not hasattr(model, "kept")
    assert all(torch.equal(value, norm[name]) for name, value in model.norms[0].state_dict().items())


class Counting(nn.Module):
    """A module to be scripted, which counts its calls and keeps its last input."""

    calls: int

    def __init__(self):
        super().__init__()
        self.calls, self.last, self.layer = 0, torch.zeros(1), nn.Linear(4, 6)

    def forward(self, x):
        self.calls += 1
        self.last = x
        return self.layer(x)


def test_scripted_modules_are_restored(looks_at_values):
    model = TwoLayers(looks_at_values)
    model.a = torch.jit.script(Counting())
    before = state(model)
    trace_channels(model, torch.randn(2, 4))
    assert state(model) == before
    assert (model.a.calls, model.a.last.tolist()) == (0, [0])


def test_a_state_that_cannot_be_saved_is_refused_before_anything_changes():
    class Unreadable(torch.Generator):
        def get_state(self):
            raise RuntimeError("no state")

    model = TwoLayers()
    model.generator = Unreadable()
    before = state(model)
    with pytest.raises(SettingsError, match=r"TwoLayers must be saved .* RuntimeError: no state; remove the attribute"):
        trace_channels(model, torch.randn(2, 4))
    assert state(model) == before


def test_the_training_flag_may_be_a_property_or_refuse_to_be_set(looks_at_values):
    class Property(nn.Identity):
        training = property(lambda self: self.flag, lambda self, value: vars(self).update(flag=value))

    class Fixed(nn.Identity):
        training = property(lambda self: True, lambda self, value: None if value else _refuse(self))

    class Frozen(nn.Identity):
        def __setattr__(self, name, value):
            if name == "training" and "_modules" in vars(self) and "calls" in vars(self):
                raise AttributeError(name)
            super().__setattr__(name, value)

    model = TwoLayers(looks_at_values)
    model.one, model.two, model.three = Property(), Frozen(), Fixed()
    model.two.calls = 0
    before = state(model)
    trace_channels(model, torch.randn(2, 4))
    assert state(model) == before
    with evaluation_mode(model):
        assert [m.training for m in model.modules()] == [False] * 5 + [True]
    assert state(model) == before


def test_generators_in_objects_are_restored(looks_at_values):
    class Drawing(TwoLayers):
        def __init__(self):
            super().__init__(looks_at_values)
            self.noise = types.SimpleNamespace(torch=torch.Generator().manual_seed(1), python=random.Random(1))

        def hidden(self, x):
            self.noise.python.random()
            return super().hidden(x + torch.rand(4, generator=self.noise.torch))

    model = Drawing()
    before = model.noise.torch.get_state(), model.noise.python.getstate()
    trace_channels(model, torch.randn(2, 4))
    assert torch.equal(model.noise.torch.get_state(), before[0])
    assert model.noise.python.getstate() == before[1]
