"""Training steps and forwards that change their batches, and batches whose keys are parameters of the forward."""

import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).parent))
from small_nets import trainer

from gflow_pl import PruningCallback


class Pairs(Dataset):
    """Batches are dicts."""

    def __len__(self):
        return 16

    def __getitem__(self, index):
        return {"x": torch.arange(4.0) + index, "y": index % 3}


class Popping(pl.LightningModule):
    """The step takes the labels out of the batch and writes into its inputs."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))

    def training_step(self, batch, batch_idx):
        labels = batch.pop("y")
        batch["x"].div_(16)
        return F.cross_entropy(self.net(batch["x"]), labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class ByKeyword(Popping):
    """The forward takes the items of the batch, as those of transformers do, and returns the loss."""

    def forward(self, x, y):
        return F.cross_entropy(self.net(x), y)

    def training_step(self, batch, batch_idx):
        return self(**batch)


@pytest.mark.parametrize("module", [Popping, ByKeyword])
def test_batches_that_are_dicts(tmp_path, module):
    callback = PruningCallback("loss", fraction=0.5, rounds=1, num_samples=8)
    network = module()
    trainer(tmp_path, max_epochs=2, callbacks=[callback]).fit(network, DataLoader(Pairs(), 4))
    assert network.net[0].out_features == 4
