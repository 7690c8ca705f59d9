"""What only a step of the module runs is pruned with the network, or stays whole; no step meets a wrong shape."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parent))
from masked_networks import masked_network, randomize_parameters
from small_nets import SmallModule, images, trainer

from gflow_pl import PruningCallback


def encoder():
    return nn.Sequential(nn.Conv2d(3, 10, 3, padding=1), nn.BatchNorm2d(10), nn.ReLU(), nn.Conv2d(10, 14, 3), nn.ReLU())


class Encoder(SmallModule):
    """The base: `forward` runs an encoder and a head."""

    def __init__(self) -> None:
        super().__init__()
        del self.net
        self.encoder, self.head = encoder(), nn.Linear(14, 4)
        self.make()

    def make(self) -> None:
        pass

    def forward(self, x):
        return self.head(self.encoder(x).mean((2, 3)))

    def loss(self, batch, batch_idx=0):
        return F.cross_entropy(self(batch[0]), batch[1])

    training_step = loss


class Autoencoder(SmallModule):
    """`forward` is the encoder alone."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(192, 12), nn.ReLU(), nn.Linear(12, 5))
        self.decoder = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 192))

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self.decoder(self(batch[0])), batch[0].flatten(1))

    def validation_step(self, batch, batch_idx):
        self.training_step(batch, batch_idx)


class AuxiliaryHead(Encoder):
    def make(self) -> None:
        self.aux = nn.Conv2d(14, 3, 1)

    def training_step(self, batch, batch_idx):
        return self.loss(batch) + F.mse_loss(self.aux(self.encoder(batch[0])), batch[0][:, :, 1:-1, 1:-1])


class HookedFeature(Encoder):
    """A hook keeps a hidden feature, which a second head reads in the step."""

    def make(self) -> None:
        self.side, self.seen = nn.Linear(10, 4), {}
        self.encoder[2].register_forward_hook(lambda module, args, output: self.seen.update(feature=output))

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        return loss + F.cross_entropy(self.side(self.seen["feature"].mean((2, 3))), batch[1])


class Validated(Encoder):
    """A probe on a hidden layer, in validation only."""

    def make(self) -> None:
        self.probe = nn.Sequential(nn.Linear(14, 6), nn.ReLU(), nn.Linear(6, 4))

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.probe(self.encoder(batch[0]).mean((2, 3))), batch[1]))


class InAHook(Encoder):
    """A probe in a hook of the epoch, which nothing can see before it runs."""

    def make(self) -> None:
        self.probe, self.flat = nn.Linear(14, 4), nn.Linear(10 * 64, 2)

    def on_train_epoch_end(self):
        x = images(4)[:][0]
        self.probe(self.encoder(x).mean((2, 3)))
        self.flat(self.encoder[:3](x).flatten(1))


class Manual(Encoder):
    """Manual optimization: two optimizers and a head that `forward` does not run."""

    def make(self) -> None:
        self.automatic_optimization, self.aux = False, nn.Linear(14, 4)

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        self.toggle_optimizer(first)
        self.manual_backward(self.loss(batch))
        first.step()
        first.zero_grad()
        self.untoggle_optimizer(first)
        loss = F.cross_entropy(self.aux(self.encoder(batch[0]).mean((2, 3))), batch[1])
        second.zero_grad()
        loss.backward()
        second.step()
        self.lr_schedulers().step()

    def configure_optimizers(self):
        first = torch.optim.SGD([*self.encoder.parameters(), *self.head.parameters()], 0.01)
        return [first, torch.optim.SGD(self.aux.parameters(), 0.01)], [torch.optim.lr_scheduler.StepLR(first, 1)]


class GradientPenalty(Encoder):
    """A step with a gradient inside cannot be traced; its head needs one feature whole."""

    def make(self) -> None:
        self.critic = nn.Linear(14, 1)

    def training_step(self, batch, batch_idx):
        x = batch[0].clone().requires_grad_()
        value = self.critic(self.encoder(x).mean((2, 3))).sum()
        (gradient,) = torch.autograd.grad(value, x, create_graph=True)
        return self.loss(batch) + gradient.square().mean()


class Distills(Encoder):
    """A frozen teacher of the same shape, and an adaptor between the features."""

    def make(self) -> None:
        self.teacher, self.adapt = encoder().requires_grad_(False), nn.Conv2d(14, 14, 1)

    def training_step(self, batch, batch_idx):
        feature = self.encoder(batch[0])
        return self.loss(batch) + F.mse_loss(self.adapt(feature), self.teacher(batch[0]))


class DistillsDirectly(Distills):
    def training_step(self, batch, batch_idx):
        return self.loss(batch) + F.mse_loss(self.encoder(batch[0]), self.teacher(batch[0]))


class LooksAtValues(AuxiliaryHead):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss if loss.item() < 1e9 else loss * 0


def loss_of(module, batch) -> float:
    with torch.no_grad():
        return float(module.eval().training_step(batch, 0))


def fit(module, folder, **options) -> PruningCallback:
    settings = {"measure": "loss", "fraction": 0.4, "rounds": 2, "num_samples": 32, "min_kept": 0.1, **options}
    if not module.automatic_optimization:
        settings["loss_fn"] = lambda m, b: m.loss(b)
    pruning = PruningCallback(**settings)
    run = trainer(folder, callbacks=[pruning], inference_mode=False)
    run.fit(module, DataLoader(images(32), batch_size=16), DataLoader(images(16), batch_size=16))
    assert pruning.finished
    return pruning


CASES = {
    Autoencoder: ["net.1", "decoder.0"],
    AuxiliaryHead: ["encoder.0", "encoder.3"],
    HookedFeature: ["encoder.0", "encoder.3"],
    Validated: ["encoder.0", "encoder.3", "probe.0"],
    InAHook: [],
    Manual: ["encoder.0", "encoder.3"],
    GradientPenalty: ["encoder.0"],
    Distills: ["encoder.0", "encoder.3"],
    DistillsDirectly: ["encoder.0"],
    LooksAtValues: ["encoder.0", "encoder.3"],
}


@pytest.mark.parametrize("cls", [cls for cls in CASES if cls is not InAHook])
def test_training_goes_on_after_a_cut(cls, tmp_path) -> None:
    torch.manual_seed(0)
    module = cls()
    teacher = {name: p.clone() for name, p in module.named_parameters() if name.startswith("teacher")}
    before = {name: tuple(p.shape) for name, p in module.named_parameters()}
    pruning = fit(module, tmp_path)
    assert pruning.graph is not None
    assert {part.layer for group in pruning.graph.groups for part in group.layers} == set(CASES[cls])
    assert any(before[name] != tuple(p.shape) for name, p in module.named_parameters())
    assert all(torch.equal(p, module.get_parameter(name)) for name, p in teacher.items())


def test_a_feature_of_the_width_of_a_layer_that_nothing_runs_stays_whole(tmp_path) -> None:
    module = InAHook()
    with pytest.raises(ValueError, match="'flat', which neither `forward` nor a step runs, could read it"):
        fit(module, tmp_path)
    module = InAHook()
    module.flat = nn.Identity()
    pruning = fit(module, tmp_path)
    assert pruning.graph is not None
    assert {part.layer for group in pruning.graph.groups for part in group.layers} == {"encoder.0"}
    assert "'probe'" in pruning.graph.frozen["encoder.3"]


def test_a_layer_that_a_step_needs_whole_is_named(tmp_path) -> None:
    torch.manual_seed(0)
    pruning = fit(GradientPenalty(), tmp_path)
    assert pruning.graph is not None
    assert "cannot be followed" in pruning.graph.frozen["encoder.3"]


@pytest.mark.parametrize("cls", [Autoencoder, AuxiliaryHead, Validated, Distills])
def test_the_smaller_network_computes_what_the_masked_one_does(cls, tmp_path) -> None:
    """Both heads of the module, in float64: the loss of the step right after a cut is that of the masked module."""
    torch.manual_seed(0)
    module, losses = randomize_parameters(cls().double()), []
    batch = images(16, torch.float64)[:]

    class Masks(PruningCallback):
        def select(self, graph, scores):
            plan = super().select(graph, scores)
            losses.append(loss_of(masked_network(module, graph, plan), batch))
            return plan

        def on_train_epoch_start(self, trainer, pl_module):
            super().on_train_epoch_start(trainer, pl_module)
            if self.finished:
                losses.append(loss_of(module, batch))

    pruning = Masks("magnitude", fraction=0.5, rounds=1)
    run = trainer(tmp_path, max_epochs=2, callbacks=[pruning], precision="64-true")
    run.fit(module, DataLoader(images(32, torch.float64), batch_size=16), DataLoader(images(16, torch.float64)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
