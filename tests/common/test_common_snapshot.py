"""Snapshots restore attributes, the items of containers, generators and, on request, the values of tensors."""

import torch
from torch import nn

from gflow_pl.common.snapshot import ModuleSnapshot


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


def test_without_nesting_containers_lose_new_items_and_buffers_are_still_copied():
    module = Stateful()
    snapshot = ModuleSnapshot(module, nested=False, copy_tensors=True)
    module.step()
    snapshot.restore()
    assert module.history == {"losses": [1], "steps": [0]}
    assert module.count == 0
    assert module.total.tolist() == [0, 0]


def test_without_copies_tensors_are_restored_by_reference_only():
    module = Stateful()
    snapshot = ModuleSnapshot(module)
    total = module.total
    module.step()
    module.total = torch.ones(2)
    snapshot.restore()
    assert module.total is total
    assert total.tolist() == [1, 1]
    assert [id(tensor) for tensor in snapshot.tensors] == [id(module.count), id(total)]
