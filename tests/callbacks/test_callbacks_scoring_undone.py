"""What a training step changes by hand while filters are scored is undone exactly."""

import copy
import sys
from collections import deque
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parent))
from small_nets import SmallModule, images, trainer

from gflow_pl import PruningCallback
from gflow_pl.callbacks.lightning.silence import without_side_effects


class Average:
    """An averager of the user's own, which is no module."""

    def __init__(self, model: nn.Module) -> None:
        self.shadow = [p.detach().clone() for p in model.parameters()]
        self.updates = 0

    def update(self, model: nn.Module) -> None:
        self.updates += 1
        for shadow, p in zip(self.shadow, model.parameters(), strict=True):
            shadow.lerp_(p.detach(), 0.1)


class Updates(SmallModule):
    """The training step updates a teacher by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.make_teacher()

    def make_teacher(self) -> None:
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)

    def update(self) -> None:
        for t, p in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
            t.mul_(0.9).add_(p, alpha=0.1)

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            self.update()
        return super().training_step(batch, batch_idx) + self.distance(batch[0])

    def distance(self, x):
        return (self(x) - self.teacher(x)).square().mean()


class UpdatesData(Updates):
    def update(self) -> None:
        for t, p in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
            t.data.lerp_(p.data, 0.1)


class SharesData(Updates):
    """The teacher's parameters point to new memory, once to that of the network itself."""

    def update(self) -> None:
        for i, (t, p) in enumerate(zip(self.teacher.parameters(), self.net.parameters(), strict=True)):
            t.data = p.data if i == 0 else 0.9 * t.data + 0.1 * p.data


class Replaces(Updates):
    """A new copy in place of the old one, and a new parameter."""

    def update(self) -> None:
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)
        self.teacher[9].bias = nn.Parameter(self.teacher[9].bias + 0.1, requires_grad=False)


class Foreach(Updates):
    def update(self) -> None:
        teacher, net = list(self.teacher.parameters()), list(self.net.parameters())
        torch._foreach_mul_(teacher, 0.9)
        torch._foreach_add_(teacher, net, alpha=0.1)


class Hidden(Updates):
    """A teacher that is no submodule, averaged weights in an object, and a history of losses."""

    def make_teacher(self) -> None:
        self.hidden = [copy.deepcopy(self.net).requires_grad_(False)]
        self.average, self.history = Average(self.net), deque([0.0], maxlen=3)

    def update(self) -> None:
        self.average.update(self.net)
        self.history.append(self.average.updates)
        for t, p in zip(self.hidden[0].parameters(), self.net.parameters(), strict=True):
            t.mul_(0.9).add_(p, alpha=0.1)

    def distance(self, x):
        return (self(x) - self.hidden[0].eval()(x)).square().mean()


def everything(module) -> dict[str, object]:
    found = dict(module.state_dict())
    if isinstance(module, Hidden):
        found |= {f"hidden.{name}": value for name, value in module.hidden[0].state_dict().items()}
        found |= {f"shadow.{i}": value for i, value in enumerate(module.average.shadow)}
        found["count"] = torch.tensor([module.average.updates, *module.history])
    return {name: value.clone() for name, value in found.items()}


def trained(cls, folder, callbacks) -> dict[str, object]:
    pl.seed_everything(0)
    module = cls()
    trainer(folder, max_epochs=3, callbacks=callbacks).fit(module, DataLoader(images(32), batch_size=16))
    return everything(module)


@pytest.mark.parametrize("cls", [Updates, UpdatesData, SharesData, Replaces, Foreach, Hidden])
def test_a_step_that_updates_a_teacher_is_undone(cls) -> None:
    torch.manual_seed(0)
    module, batch = cls(), images(8)[:]
    for p in module.net.parameters():
        p.data += 0.1
    before, objects = everything(module), {name: (id(p), p.data_ptr()) for name, p in module.named_parameters()}
    with without_side_effects(module) as effects:
        module.training_step(batch, 0)
        after = everything(module)
        assert any(not torch.equal(before[name], after[name]) for name in before), "the step changes something"
        effects.undo()
        assert all(torch.equal(before[name], value) for name, value in everything(module).items())
        module.training_step(batch, 0)
    assert all(torch.equal(before[name], value) for name, value in everything(module).items())
    assert objects == {name: (id(p), p.data_ptr()) for name, p in module.named_parameters()}


def test_a_run_that_scores_and_cuts_nothing_trains_on_bit_equally(tmp_path) -> None:
    plain = trained(Updates, tmp_path, [])
    pruning = PruningCallback("loss", fraction=0.001, num_samples=32, keep_momentum=True, ignore=["net"], rounds=1)
    scored = trained(Updates, tmp_path, [pruning])
    assert pruning.rounds_done == 1
    assert all(torch.equal(plain[name], scored[name]) for name in plain)
