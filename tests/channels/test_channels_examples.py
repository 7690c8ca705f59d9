"""Example inputs: positional and keyword arguments, several examples, copies for every run, errors of the forward."""

import collections
import dataclasses

import pytest
import torch
from torch import nn

from gflow_pl.channels import trace_channels
from gflow_pl.common.errors import SettingsError

X = torch.randn(2, 4)


class TwoLayers(nn.Module):
    """Two linear layers; `two` runs both."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

    def two(self, x):
        return self.b(self.a(x).relu())


def network(forward):
    """Return `TwoLayers` with a forward, which gets the module first."""
    return type("Network", (TwoLayers,), {"forward": forward})()


def groups(*args, **kwargs):
    """Return the names of the groups of a trace."""
    return [group.name for group in trace_channels(*args, **kwargs).groups]


# -- errors ------------------------------------------------------------------------------------------------------------


def raise_key_error(self, x):
    self.a(x)
    raise KeyError("no such key")


def test_a_forward_that_raises_is_the_cause_of_the_error():
    with pytest.raises(
        SettingsError, match=r"^trace_channels: the forward of Network raises .* \(KeyError: 'no such key'\); pass"
    ) as info:
        trace_channels(network(raise_key_error), X)
    assert isinstance(info.value.__cause__, KeyError)


def test_inputs_of_a_wrong_size_raise():
    with pytest.raises(ValueError, match="Linear raises on the example inputs") as info:
        trace_channels(nn.Linear(4, 6), torch.randn(2, 5))
    assert isinstance(info.value.__cause__, RuntimeError)


@pytest.mark.parametrize("raises_in", [True, False])
def test_what_a_mode_that_raises_has_reached_is_frozen(raises_in):
    def forward(self, x):
        x = self.a(x)
        if self.training is raises_in:
            raise RuntimeError("not in this mode")
        return self.b(x)

    graph = trace_channels(network(forward), X)
    assert graph.groups == []
    assert graph.frozen["a"].startswith("the forward could not be followed to its end")


def test_a_forward_that_cannot_be_recorded_is_frozen():
    def forward(self, x):
        y = self.a(x)
        if not y.requires_grad:
            raise RuntimeError("needs gradients")
        return self.b(y)

    graph = trace_channels(network(forward), X)
    assert graph.groups == []
    assert "a" in graph.frozen


# -- keyword arguments -------------------------------------------------------------------------------------------------


def test_keyword_arguments():
    def forward(self, x, *, scale, mask=None):
        return self.two(x * scale)

    assert groups(network(forward), X, example_kwargs={"scale": torch.ones(4)}) == ["a"]
    assert groups(network(forward), example_kwargs={"x": X, "scale": 2.0}) == ["a"]


@pytest.mark.parametrize("kind", [dict, collections.UserDict, collections.OrderedDict])
def test_a_dict_of_parameters_is_passed_as_keywords(kind):
    def forward(self, input_ids=None, attention_mask=None, **more):
        return self.two(input_ids * attention_mask[:, None])

    example = kind(input_ids=X, attention_mask=torch.ones(2))
    graph = trace_channels(network(forward), example)
    assert [group.name for group in graph.groups] == ["a"]


def test_a_dict_that_the_forward_takes_is_passed_as_it_is():
    def forward(self, x):
        return self.two(x["x"])

    assert groups(network(forward), {"x": X}) == ["a"]


def test_unusable_examples_are_refused():
    with pytest.raises(SettingsError, match="give an example"):
        trace_channels(nn.Linear(4, 6))
    with pytest.raises(SettingsError, match=r"`example_kwargs` must be a dict .*, got list"):
        trace_channels(nn.Linear(4, 6), example_kwargs=[X])
    with pytest.raises(SettingsError, match="`more_examples` must be a list of examples, got Tensor"):
        trace_channels(nn.Linear(4, 6), X, more_examples=X)


# -- several examples --------------------------------------------------------------------------------------------------


class Branches(nn.Module):
    """Long inputs pass through one more layer; short ones are read in reverse order."""

    def __init__(self):
        super().__init__()
        self.a, self.long, self.b = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        y = self.a(x)
        return self.b(self.long(y) if x.shape[1] > 3 else y.flip(-1))


def test_examples_are_joined():
    short, long = torch.randn(2, 3, 4), torch.randn(2, 5, 4)
    alone = trace_channels(Branches(), short)
    graph = trace_channels(Branches(), short, more_examples=[(long,)])
    assert {layer.layer for group in alone.groups for layer in group.layers} == {"a"}
    assert {layer.layer for group in graph.groups for layer in group.layers} == {"a", "long"}
    # Both layers write into the inputs of `b`, one of them in reverse order.
    assert [group.size for group in graph.groups] == [6]
    slices = {(part.tensor, part.dim) for part in graph.groups[0].slices}
    assert slices == {(f"{name}.{leaf}", 0) for name in ("a", "long") for leaf in ("weight", "bias")} | {
        ("long.weight", 1),
        ("b.weight", 1),
    }
    assert graph.uses == trace_channels(Branches(), short, more_examples=[long]).uses
    assert graph.uses["a.weight"] == alone.uses["a.weight"]


# -- copies ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Batch:
    """A batch as a data class with a nested dict."""

    parts: dict
    ids: list


class FrozenDict(dict):
    """A dict that refuses changes."""

    def __setitem__(self, key, value):
        raise TypeError("read-only")


def pop(self, batch):
    return self.two(batch.pop("x"))


def write_list(self, xs):
    xs[0] = self.a(xs[0]).relu()
    return self.b(xs[0])


def empty_nested(self, batch):
    batch.ids.pop()
    return self.two(batch.parts.pop("x")[0])


def reshape(self, x):
    return self.two(x.unsqueeze_(0).squeeze_(0).t_())


def overwrite(self, x):
    if x.sum().item() == 0:
        raise RuntimeError("written to before")
    y = self.two(x)
    x.zero_()
    return y


EXAMPLES = {
    "pop": (pop, {"x": X}),
    "write_list": (write_list, ([X],)),
    "nested": (empty_nested, Batch({"x": [X]}, [1])),
    "reshape": (reshape, torch.randn(4, 2)),
    "overwrite": (overwrite, X),
    "frozen": (lambda self, batch: self.two(batch["x"]), FrozenDict(x=X)),
}


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("looks_at_values", [False, True])
def test_every_run_gets_a_copy_of_the_inputs(name, looks_at_values):
    forward, example = EXAMPLES[name]

    def looking(self, x):
        y = forward(self, x)
        return -y if looks_at_values and y.sum().item() > 1e9 else y

    before = repr(example)
    assert groups(network(looking), example) == ["a"]
    assert repr(example) == before


def test_a_tensor_that_occurs_twice_stays_one_tensor():
    def forward(self, x, again):
        if x is not again:
            raise RuntimeError("two tensors")
        return self.two(x)

    assert groups(network(forward), (X, X)) == ["a"]
