"""Copies of the network inside of its module are cut like the network, filter by filter; other networks are not."""

import copy
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parent))
from small_nets import SmallModule, images, small_net, trainer

from gflow_pl import PruningCallback
from gflow_pl.surgery import load_from_checkpoint


class MeanTeacher(SmallModule):
    """A hook after each batch averages the weights by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)

    def training_step(self, batch, batch_idx):
        logits = self(batch[0])
        return F.cross_entropy(logits, batch[1]) + F.mse_loss(logits, self.teacher(batch[0]))

    def on_train_batch_end(self, *_):
        with torch.no_grad():
            for t, p in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
                t.lerp_(p, 0.1)


class InTheStep(MeanTeacher):
    """The step itself averages, by the data of the parameters."""

    def training_step(self, batch, batch_idx):
        for t, p in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
            t.data.mul_(0.9).add_(p.data, alpha=0.1)
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, *_):
        pass


class Target(MeanTeacher):
    """A target that takes over the weights from time to time, and that starts from other weights."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = small_net().requires_grad_(False)

    def on_train_batch_end(self, *_):
        pass

    def on_train_epoch_end(self):
        self.teacher.load_state_dict(self.net.state_dict())


class Averaged(SmallModule):
    """torch's AveragedModel, whose parameters the optimizer holds and never trains."""

    def __init__(self) -> None:
        super().__init__()
        self.average = torch.optim.swa_utils.AveragedModel(self.net)

    def on_train_batch_end(self, *_):
        self.average.update_parameters(self.net)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.average(batch[0]), batch[1]))


class Momentum(SmallModule):
    """BYOL: the online network and its predictor learn the features of a target, inside of another module."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleDict({"online": small_net()})
        self.predictor = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))
        self.momentum = nn.ModuleDict({"target": copy.deepcopy(self.net["online"])})

    def forward(self, x):
        return self.net["online"](x)

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            target = self.momentum["target"](batch[0])
        return -F.cosine_similarity(self.predictor(self(batch[0])), target).mean()

    def on_before_zero_grad(self, *_):
        update(self.momentum, self.net)


def update(target, online):
    for t, p in zip(target.parameters(), online.parameters(), strict=True):
        t.data = 0.9 * t.data + 0.1 * p.data


class Anchor(SmallModule):
    """A penalty on the distance from the weights at the start, kept in a dict."""

    def on_fit_start(self):
        self.anchor = {name: p.detach().clone() for name, p in self.net.named_parameters()}

    def training_step(self, batch, batch_idx):
        distance = sum((p - self.anchor[name]).square().sum() for name, p in self.net.named_parameters())
        return super().training_step(batch, batch_idx) + 1e-3 * distance


class Shadow:
    """An averager of the user's own with a list of weights, as several libraries have one."""

    def __init__(self, parameters) -> None:
        self.weights, self.num_updates = [p.detach().clone() for p in parameters], 0

    def update(self, parameters) -> None:
        self.num_updates += 1
        with torch.no_grad():
            for shadow, p in zip(self.weights, parameters, strict=True):
                shadow.lerp_(p, 0.1)


class WithShadow(SmallModule):
    def __init__(self) -> None:
        super().__init__()
        self.shadow = Shadow(self.net.parameters())

    def on_train_batch_end(self, *_):
        self.shadow.update(self.net.parameters())


class Hidden(SmallModule):
    """A teacher in a list, which keeps it out of checkpoints and optimizers."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = [copy.deepcopy(self.net).requires_grad_(False)]

    @property
    def teacher(self):
        return self.hidden[0]

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + F.mse_loss(self(batch[0]), self.hidden[0](batch[0]))

    def on_train_batch_end(self, *_):
        with torch.no_grad():
            for t, p in zip(self.hidden[0].parameters(), self.net.parameters(), strict=True):
                t.lerp_(p, 0.1)


class Declared(SmallModule):
    """Nothing shows that these are copies but the declaration."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = small_net().requires_grad_(False)
        self.start = [{"first": self.net[0].weight.detach().clone()}]

    def tensors_by_name(self):
        declared = {f"net.{name}": p for name, p in self.teacher.named_parameters()}
        return {**declared, "net.0.weight": self.start[0]["first"]} | {"net.0.bias": self.teacher[0].bias}


def fit(module, folder, **options) -> PruningCallback:
    settings = {"measure": "loss", "fraction": 0.5, "rounds": 2, "num_samples": 32, "scope": "layer", **options}
    pruning = PruningCallback(**settings)
    run = trainer(folder, callbacks=[pruning])
    run.fit(module, DataLoader(images(32), batch_size=16), DataLoader(images(16), batch_size=16))
    assert pruning.finished
    run.save_checkpoint(folder / "last.ckpt")
    return pruning


@pytest.mark.parametrize("residual", ["expand", "remove"])
@pytest.mark.parametrize(
    ("cls", "source", "copied"),
    [
        (MeanTeacher, "net", "teacher"),
        (InTheStep, "net", "teacher"),
        (Target, "net", "teacher"),
        (Averaged, "net", "average.module"),
        (Momentum, "net.online", "momentum.target"),
    ],
)
def test_a_submodule_that_copies_the_network_keeps_the_same_filters(cls, source, copied, residual, tmp_path) -> None:
    torch.manual_seed(0)
    pruning = fit(module := cls(), tmp_path, residual=residual)
    assert pruning.graph is not None
    leaders = {g.name: g for g in pruning.graph.leaders if g.name.startswith(f"{source}.")}
    followers = {g.follows: g for g in pruning.graph.groups if g.follows is not None}
    assert leaders
    assert leaders.keys() == followers.keys()
    assert all(
        group.kept == followers[name].kept and group.kind == followers[name].kind for name, group in leaders.items()
    )
    network, other = module.get_submodule(source), module.get_submodule(copied)
    shapes = {name: p.shape for name, p in network.named_parameters()}
    assert shapes == {name: p.shape for name, p in other.named_parameters()}
    assert any(g.size < g.original_size for g in leaders.values())
    # Training has gone on, and the copy computes what the network computes if it gets its weights.
    x = images(8)[:][0]
    other.load_state_dict(network.state_dict())
    assert torch.equal(network.eval()(x), other.eval()(x))
    # A checkpoint contains both shapes.
    again = load_from_checkpoint(cls, tmp_path / "last.ckpt")
    assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in module.named_parameters()}


def test_the_filters_of_a_copy_are_those_of_the_network(tmp_path) -> None:
    """Not only as many: every filter that stays carries the number that it was given."""

    class Marked(Target):
        """Neither is trained; the target takes over nothing, but a hook could."""

        def __init__(self) -> None:
            super().__init__()
            for network in (self.net, self.teacher):
                for part in network.modules():
                    if isinstance(part, nn.Conv2d):
                        part.bias.data = torch.arange(part.out_channels, dtype=torch.float32)

        def configure_optimizers(self):
            return torch.optim.SGD([p for name, p in self.net.named_parameters() if "bias" not in name], 0.1)

        def on_train_epoch_end(self):
            for name, t in self.teacher.named_parameters():
                if "bias" not in name:
                    t.data.copy_(self.net.get_parameter(name).data)

    torch.manual_seed(0)
    fit(module := Marked(), tmp_path, residual="remove", measure="random")
    numbers = [part.bias.detach() for part in module.net.modules() if isinstance(part, nn.Conv2d)]
    copies = [part.bias.detach() for part in module.teacher.modules() if isinstance(part, nn.Conv2d)]
    assert all(torch.equal(a, b) for a, b in zip(numbers, copies, strict=True))
    assert any((n.diff() > 1).any() for n in numbers), "filters between others are gone"


@pytest.mark.parametrize("residual", ["expand", "remove"])
@pytest.mark.parametrize("cls", [Anchor, WithShadow, Hidden])
def test_weights_in_dicts_lists_and_objects_are_cut_along(cls, residual, tmp_path) -> None:
    torch.manual_seed(0)
    pruning = fit(module := cls(), tmp_path, residual=residual)
    shapes = [p.shape for p in module.net.parameters()]
    held = {
        Anchor: lambda: module.anchor.values(),
        WithShadow: lambda: module.shadow.weights,
        Hidden: lambda: module.hidden[0].parameters(),
    }[cls]()
    assert [tensor.shape for tensor in held] == shapes
    assert pruning.graph is not None
    assert pruning.graph.num_filters < sum(g.original_size * g.filters for g in pruning.graph.leaders)
    if cls is Hidden:
        x = images(8)[:][0]
        module.hidden[0].load_state_dict(module.net.state_dict())
        assert torch.equal(module.net.eval()(x), module.hidden[0].eval()(x))


def test_what_a_module_declares_is_cut_along(tmp_path) -> None:
    torch.manual_seed(0)
    fit(module := Declared(), tmp_path, protect_stem=False)
    assert module.net[0].out_channels < 8
    assert module.start[0]["first"].shape == module.net[0].weight.shape
    assert [p.shape for p in module.teacher.parameters()] == [p.shape for p in module.net.parameters()]


class Distills(MeanTeacher):
    """The teacher is the network as it was, and stays so."""

    def on_train_batch_end(self, *_):
        pass

    def on_train_epoch_start(self):
        self.teacher.eval()


@pytest.mark.parametrize("cuts", [[1, 2], [0, 1]])
def test_a_teacher_that_is_never_updated_stays_whole(cuts, tmp_path) -> None:
    torch.manual_seed(0)
    module = Distills()
    before = copy.deepcopy(module.teacher)
    pruning = PruningCallback("loss", fraction=0.5, rounds=2, num_samples=32, epochs=cuts)
    trainer(tmp_path, callbacks=[pruning]).fit(module, DataLoader(images(32), batch_size=16))
    assert pruning.rows[1]["fraction_reached"] > 0.4
    assert not any(g.follows for g in pruning.graph.groups)
    for name, p in module.teacher.named_parameters():
        assert torch.equal(p, before.get_parameter(name)), name
    assert "teacher" in pruning.graph.frozen["teacher.0"]


def test_a_copy_that_the_setting_ignore_names_stays_whole(tmp_path) -> None:
    class Apart(MeanTeacher):
        def on_train_batch_end(self, *_):
            with torch.no_grad():
                self.teacher[9].bias += 0.1

    torch.manual_seed(0)
    fit(module := Apart(), tmp_path, ignore=["teacher"])
    assert module.teacher[4].out_channels == 12
    assert module.net[4].out_channels < 12


class Twins(SmallModule):
    """Two critics with targets of their own, and blocks of one shape that are no copies."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = small_net(), small_net()
        self.targets = nn.ModuleList([copy.deepcopy(self.first), copy.deepcopy(self.second)]).requires_grad_(False)

    def forward(self, x):
        return self.first(x), self.second(x)

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            for target, network in zip(self.targets, (self.first, self.second), strict=True):
                for t, p in zip(target.parameters(), network.parameters(), strict=True):
                    t.lerp_(p, 0.1)
            wanted = torch.minimum(self.targets[0](batch[0]), self.targets[1](batch[0]))
        return sum((logits - 0.9 * wanted - F.one_hot(batch[1], 4)).square().mean() for logits in self(batch[0]))

    def validation_step(self, batch, batch_idx):
        pass


def test_each_target_follows_its_own_network(tmp_path) -> None:
    torch.manual_seed(0)
    pruning = fit(Twins(), tmp_path)
    follows = {g.name: g.follows for g in pruning.graph.groups if g.follows is not None}
    assert follows
    assert all(f.split(".")[0] == {"0": "first", "1": "second"}[name.split(".")[1]] for name, f in follows.items())
    kept = {g.name: g.kept for g in pruning.graph.groups}
    assert all(kept[name] == kept[leader] for name, leader in follows.items())


def test_a_run_resumes_with_its_copies(tmp_path) -> None:
    torch.manual_seed(0)
    options = {"measure": "loss", "fraction": 0.5, "rounds": 3, "num_samples": 32}
    data = DataLoader(images(32), batch_size=16)
    every = pl.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    trainer(tmp_path, callbacks=[PruningCallback(**options), every]).fit(first := MeanTeacher(), data)
    again = PruningCallback(**options)
    ckpt_path = tmp_path / "epoch=1.ckpt"
    trainer(tmp_path, callbacks=[again]).fit(second := MeanTeacher(), data, ckpt_path=ckpt_path, weights_only=True)
    assert again.finished
    expected = first.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in second.state_dict().items())
