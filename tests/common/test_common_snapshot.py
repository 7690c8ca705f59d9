"""Snapshots restore attributes, the items of containers, generators and, on request, the values of tensors."""

import collections
import types

import numpy as np
import pytest
import torch
from torch import nn

from gflow_pl.common.snapshot import ModuleSnapshot, module_snapshots


class Stateful(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.total, self.history, self.calls = torch.zeros(2), {"losses": [], "steps": [0]}, 0
        self.generator = torch.Generator().manual_seed(1)

    def step(self):
        self.count += 1
        self.total += 1
        self.calls += 1
        self.history["losses"].append(self.calls)
        self.history["last"] = self.calls
        self.new = torch.rand(2, generator=self.generator)


def test_a_module_is_restored_with_nested_containers_and_tensor_values():
    module = Stateful()
    snapshot = ModuleSnapshot(module, copy_tensors=True)
    losses = module.history["losses"]
    draws = []
    for _ in range(2):
        module.step()
        draws.append(module.new)
        snapshot.restore()
        assert (module.calls, module.history) == (0, {"losses": [], "steps": [0]})
        assert module.history["losses"] is losses
        assert not hasattr(module, "new")
        assert module.count == 0
        assert module.total.tolist() == [0, 0]
    assert torch.equal(*draws)


def test_excluded_attributes_keep_their_changes():
    module = Stateful()
    snapshot = ModuleSnapshot(module, exclude={"calls", "new"})
    module.step()
    snapshot.restore()
    assert module.calls == 1
    assert module.new.shape == (2,)
    assert module.history["losses"] == []


def test_large_containers_inside_of_others_are_not_visited():
    module = Stateful()
    module.data = {"small": [0], "large": list(range(20))}
    snapshot = ModuleSnapshot(module, max_items=10, copy_tensors=True)
    module.step()
    module.data["small"].append(1)
    module.data["large"].append(20)
    module.data["new"] = 0
    snapshot.restore()
    assert module.history == {"losses": [], "steps": [0]}
    assert module.data == {"small": [0], "large": list(range(21))}
    assert module.count == 0


def test_without_copies_tensors_are_restored_by_reference_only():
    module = Stateful()
    snapshot = ModuleSnapshot(module)
    total = module.total
    module.step()
    module.total = torch.ones(2)
    snapshot.restore()
    assert module.total is total
    assert total.tolist() == [1, 1]
    assert {id(tensor) for tensor in snapshot.tensors} == {id(module.count), id(total)}


def _refuse(self, *args, **kwargs):
    raise TypeError("read-only")


class FrozenDict(dict):
    """A dict that refuses every change, as the configurations of some libraries do."""

    update = __setitem__ = __delitem__ = pop = popitem = clear = setdefault = copy = _refuse


class FrozenOrderedDict(collections.OrderedDict):
    """The same in the order of insertion, with an attribute."""

    def __init__(self, items):
        for key, value in items:
            collections.OrderedDict.__setitem__(self, key, value)
        vars(self)["frozen"] = True

    update = __setitem__ = __delitem__ = pop = popitem = clear = setdefault = copy = _refuse


class FrozenList(list):
    """A list that refuses every change."""

    append = extend = __setitem__ = __delitem__ = clear = pop = copy = _refuse


class FrozenSet(set):
    """A set that refuses every change."""

    add = update = discard = clear = pop = copy = _refuse


class Slotted:
    """An object without a dict, which refuses to be changed by assignment."""

    __slots__ = ("missing", "value")
    __setattr__ = __delattr__ = _refuse


class Holder:
    """An object with attributes."""

    def __init__(self):
        self.last, self.parts, self.nested = None, [], types.SimpleNamespace(calls=0)


class Unusual(nn.Module):
    """A module whose attributes refuse to be changed, or are not registered; some of them are in a slot."""

    __slots__ = ("cache", "unset")

    def __init__(self):
        super().__init__()
        self.config, self.ordered = FrozenDict(width=8, inner=[1]), FrozenOrderedDict([("b", [1]), ("a", 2)])
        self.sizes, self.names, self.pair = FrozenList([1, [2]]), FrozenSet({1}), ([1], {"x": [2]})
        self.slotted, self.holder, self.cache = Slotted(), Holder(), [1]
        object.__setattr__(self.slotted, "value", [1])
        self.view, self.array = types.MappingProxyType({"x": [1]}), np.zeros(2)
        self.counts, self.hidden = collections.defaultdict(list, {"a": [1]}), [nn.BatchNorm1d(2)]

    def change(self):
        """Change everything that can be changed."""
        dict.__setitem__(self.config, "width", 9)
        self.config["inner"].append(2)
        dict.__setitem__(self.ordered, "c", 3)
        collections.OrderedDict.move_to_end(self.ordered, "b")
        vars(self.ordered)["frozen"] = False
        list.append(self.sizes, 3)
        self.sizes[1].append(3)
        set.add(self.names, 2)
        self.pair[0].append(2)
        self.pair[1]["x"].append(3)
        object.__setattr__(self.slotted, "value", 2)
        object.__setattr__(self.slotted, "missing", 2)
        self.holder.last, self.holder.new = torch.ones(2), 1
        self.holder.parts.append(1)
        self.holder.nested.calls += 1
        self.cache, self.unset = 2, 3
        self.view["x"].append(2)
        self.array += 1
        self.counts["b"].append(1)
        self.hidden[0](torch.ones(2, 2))
        self.hidden[0].weight.data += 1

    def state(self):
        """Return everything that `change` changes."""
        slots = [getattr(self.slotted, name, "unset") for name in Slotted.__slots__]
        holder = dict(vars(self.holder), nested=vars(self.holder.nested).copy(), parts=list(self.holder.parts))
        own = [dict(self.config), list(self.ordered.items()), vars(self.ordered).copy(), list(self.sizes)]
        rest = [set(self.names), self.pair, self.cache, getattr(self, "unset", "unset"), dict(self.view)]
        hidden = [tensor.tolist() for tensor in self.hidden[0].state_dict().values()]
        return repr([slots, holder, own, rest, self.array.tolist(), dict(self.counts), hidden])


@pytest.mark.parametrize("max_items", [None, 1000])
def test_attributes_that_refuse_changes_are_restored(max_items):
    module = Unusual()
    before, config, hidden = module.state(), module.config, module.hidden[0].weight
    snapshots = module_snapshots(module, max_items=max_items, copy_tensors=True)
    for _ in range(2):
        module.change()
        assert module.state() != before
        for snapshot in snapshots:
            snapshot.restore()
        assert module.state() == before
    assert module.config is config
    assert module.hidden[0].weight is hidden


def test_attributes_of_a_scripted_module_are_restored():
    class Counting(nn.Module):
        count: int
        names: list[int]

        def __init__(self):
            super().__init__()
            self.count, self.cache, self.names, self.norm = 0, torch.zeros(1), [1], nn.BatchNorm1d(2)

        def forward(self, x):
            self.count += 1
            self.cache = x
            self.names.append(2)
            return self.norm(x)

    module = torch.jit.script(Counting())
    snapshots = module_snapshots(module, copy_tensors=True)
    module(torch.ones(2, 2))
    assert module.count == 1
    for snapshot in snapshots:
        snapshot.restore()
    assert (module.count, module.names, module.cache.tolist()) == (0, [1], [0])
    assert module.norm.running_mean.tolist() == [0, 0]
