"""What filters of somebody else's module are scored by: the formulas, worked out here by torch.autograd in float64."""

import importlib
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from real_images import shuffled
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import gflow_pl

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def photographs(number: int = 40) -> TensorDataset:
    """Photographs of CIFAR-100 in ten classes, at half their size."""
    images, labels = shuffled("train")
    inputs = torch.from_numpy(images[:number]).permute(0, 3, 1, 2).double() / 127.5 - 1
    return TensorDataset(F.avg_pool2d(inputs, 2), torch.from_numpy(labels[:number]))


class Watched(gflow_pl.PruningCallback):
    """Keeps the scores that each round is decided by, and the weights that they are of."""

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self.seen = []

    def setup(self, trainer, pl_module, stage) -> None:
        super().setup(trainer, pl_module, stage)
        self.watched = pl_module

    def select(self, graph, scores):
        weights = {name: p.detach().clone() for name, p in self.watched.named_parameters()}
        buffers = {name: b.detach().clone() for name, b in self.watched.named_buffers()}
        self.seen.append((dict(scores), {**weights, **buffers}))
        return super().select(graph, scores)


def prune(folder, module, callback, **options) -> None:
    trainer = pl.Trainer(
        max_epochs=3,
        accelerator="cpu",
        precision="64-true",
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=folder,
        **options,
    )
    trainer.fit(module, DataLoader(photographs(), batch_size=20, shuffle=True))


def filters(layer: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """The weight as rows, a row an output channel."""
    transposed = isinstance(layer, nn.ConvTranspose2d)
    return (weight.transpose(0, 1) if transposed else weight).flatten(1)


@pytest.mark.parametrize("measure", ["grasp", "grad_preserve", "loss", "biased_loss", "tfo"])
def test_an_autoencoders_scores_are_the_formulas_of_its_own_loss(measure, tmp_path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    module = importlib.import_module("autoencoder").Autoencoder(width=4, code=6)
    callback = Watched(measure, fraction=0.4, rounds=2, num_samples=40)
    prune(tmp_path, module, callback)

    # The first round is cut before the network has another shape; its weights go into a network as it was built.
    scores, weights = callback.seen[0]
    built = type(module)(width=4, code=6).double().eval()
    parameters = {name: weights[name].requires_grad_(True) for name, _ in built.named_parameters()}
    images = photographs().tensors[0]
    loss = F.mse_loss(torch.func.functional_call(built, parameters, images), images)
    gradients = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
    speed = sum((gradient.detach() * gradient).sum() for gradient in gradients)
    products = dict(zip(parameters, torch.autograd.grad(speed, list(parameters.values())), strict=True))
    flow = dict(zip(parameters, (gradient.detach() for gradient in gradients), strict=True))

    layers = {name: m for name, m in built.named_modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))}
    assert set(scores) == set(layers)
    for name, layer in layers.items():
        theta, g, hg = (filters(layer, table[f"{name}.weight"].detach()) for table in (parameters, flow, products))
        expected = {
            "grasp": (theta * hg).sum(1),
            "grad_preserve": (theta * hg).sum(1).abs(),
            "loss": (theta * g).abs().sum(1),
            "biased_loss": (theta.square() * g).abs().sum(1),
            "tfo": (theta * g).sum(1).abs(),
        }[measure]
        assert expected.abs().max() > 0
        torch.testing.assert_close(scores[name], expected, rtol=1e-9, atol=1e-12 * float(expected.abs().max()))


class OwnLoss(pl.LightningModule):
    """Gives logits, but trains on a loss that is not their cross-entropy."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Flatten(1))
        self.head = nn.Linear(8 * 12 * 12, 10)

    def forward(self, x):
        return self.head(self.net(x))

    def training_step(self, batch, batch_idx):
        return F.multi_margin_loss(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.mark.parametrize("temperature", [None, 5.0])
def test_a_classifier_is_scored_by_its_own_loss_unless_a_temperature_is_named(temperature, tmp_path) -> None:
    callback = Watched("loss", fraction=0.3, rounds=1, num_samples=40, temperature=temperature)
    prune(tmp_path, OwnLoss(), callback)
    scores, weights = callback.seen[0]
    images, labels = photographs().tensors
    built = OwnLoss().double()
    built.load_state_dict(weights)
    logits = built(images)
    loss = F.multi_margin_loss(logits, labels) if temperature is None else F.cross_entropy(logits / temperature, labels)
    loss.backward()
    expected = (built.net[0].weight * built.net[0].weight.grad).abs().flatten(1).sum(1).detach()
    torch.testing.assert_close(scores["net.0"], expected, rtol=1e-9, atol=1e-15)
