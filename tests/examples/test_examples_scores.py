"""Scores of the filters of a user's module, compared with the formulas in float64, computed with torch.autograd."""

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
    """Return photographs of ten classes of CIFAR-100 at half their size, with labels."""
    images, labels = shuffled("train")
    inputs = torch.from_numpy(images[:number]).permute(0, 3, 1, 2).double() / 127.5 - 1
    return TensorDataset(F.avg_pool2d(inputs, 2), torch.from_numpy(labels[:number]))


class RecordingCallback(gflow_pl.PruningCallback):
    """Records the scores of every round, and the weights and buffers that they were computed from."""

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self.recorded = []

    def setup(self, trainer, pl_module, stage) -> None:
        super().setup(trainer, pl_module, stage)
        self.scored_module = pl_module

    def select(self, graph, scores):
        weights = {name: p.detach().clone() for name, p in self.scored_module.named_parameters()}
        buffers = {name: b.detach().clone() for name, b in self.scored_module.named_buffers()}
        self.recorded.append((dict(scores), {**weights, **buffers}))
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


def filter_rows(layer: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """Reshape a weight to (output channels, weights of one channel)."""
    transposed = isinstance(layer, nn.ConvTranspose2d)
    return (weight.transpose(0, 1) if transposed else weight).flatten(1)


@pytest.mark.parametrize("measure", ["grasp", "grad_preserve", "loss", "biased_loss", "tfo"])
def test_scores_of_an_autoencoder_follow_the_formulas_for_its_own_loss(measure, tmp_path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    module = importlib.import_module("autoencoder").Autoencoder(width=4, code=6)
    callback = RecordingCallback(measure, fraction=0.4, rounds=2, num_samples=40)
    prune(tmp_path, module, callback)

    # The first round scores the network in its original shape, so its weights fit a newly built network.
    scores, weights = callback.recorded[0]
    built = type(module)(width=4, code=6).double().eval()
    parameters = {name: weights[name].requires_grad_(True) for name, _ in built.named_parameters()}

    # Compute the gradients g and the Hessian-gradient products Hg of its loss.
    images = photographs().tensors[0]
    loss = F.mse_loss(torch.func.functional_call(built, parameters, images), images)
    gradients = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
    inner_product = sum((gradient.detach() * gradient).sum() for gradient in gradients)
    products = dict(zip(parameters, torch.autograd.grad(inner_product, list(parameters.values())), strict=True))
    detached = dict(zip(parameters, (gradient.detach() for gradient in gradients), strict=True))

    # Compare with the formulas, layer by layer.
    layers = {name: m for name, m in built.named_modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))}
    assert set(scores) == set(layers)
    for name, layer in layers.items():
        theta, g, hg = (
            filter_rows(layer, table[f"{name}.weight"].detach()) for table in (parameters, detached, products)
        )
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
    """A classifier whose training loss is not the cross-entropy."""

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
def test_a_classifier_is_scored_with_its_own_loss_unless_a_temperature_is_set(temperature, tmp_path) -> None:
    callback = RecordingCallback("loss", fraction=0.3, rounds=1, num_samples=40, temperature=temperature)
    prune(tmp_path, OwnLoss(), callback)
    scores, weights = callback.recorded[0]
    images, labels = photographs().tensors
    built = OwnLoss().double()
    built.load_state_dict(weights)
    logits = built(images)
    loss = F.multi_margin_loss(logits, labels) if temperature is None else F.cross_entropy(logits / temperature, labels)
    loss.backward()
    expected = (built.net[0].weight * built.net[0].weight.grad).abs().flatten(1).sum(1).detach()
    torch.testing.assert_close(scores["net.0"], expected, rtol=1e-9, atol=1e-15)
